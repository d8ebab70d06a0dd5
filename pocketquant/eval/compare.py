"""Runs a model and its reference over texts; no logits are kept.

Both score the same window, a group of rows after the other, and each pair of rows is folded into one record
(`metrics.POSITION`). The numbers are those of `llama-perplexity --kl-divergence`, but for what its file of
logits loses: 16 bits per log-probability, and nothing below exp(-16). `like="llama-perplexity"` loses the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol
from unicodedata import is_normalized

import numpy as np

from pocketquant.errors import EvalError
from pocketquant.eval.kinship import check_architecture, describe_quantized
from pocketquant.eval.like_llama import score_rows_like_llama
from pocketquant.eval.metrics import Scorer, score_rows
from pocketquant.eval.packs.pack import is_pack
from pocketquant.eval.packs.replay import PackRuntime
from pocketquant.eval.reference import describe_reference, identify_reference, open_reference
from pocketquant.eval.report.evidence import digest_metadata, digest_stream
from pocketquant.eval.report.schema import NoiseFloor, Provenance, Report, ScoredText, measure_noise, summarize
from pocketquant.eval.windows import MIN_LANE_WINDOWS, Progress, score_windows
from pocketquant.extras import list_versions
from pocketquant.files.reading import states_of
from pocketquant.files.unchanged import check_unchanged
from pocketquant.gguf_file.identity import identify, identify_all, identify_model
from pocketquant.llama.runtime import Runtime, TextRuntime, open_runtime
from pocketquant.machine import usable_threads
from pocketquant.texts.conversations import render_chat, template_digest
from pocketquant.texts.corpus import Corpus, Text, check_size, cut_corpus, read_text

NOISE_WINDOWS = 32
"""Windows that the noise floor is measured on, at most: more change its first digits no more."""

SCORERS: dict[str | None, Scorer] = {None: score_rows, "llama-perplexity": score_rows_like_llama}
"""What `like` may be."""


class Opener(Protocol):
    """Opens the file to judge; `open_runtime` is one."""

    def __call__(
        self,
        path: str | Path,
        *,
        context: int,
        threads: int | None,
        gpu_layers: int,
        rows: int | None = None,
        flash_attention: bool = False,
    ) -> AbstractContextManager[TextRuntime]: ...


class ReferenceOpener(Protocol):
    """Opens what it is judged by; `open_runtime` is one."""

    def __call__(
        self, path: str | Path, *, context: int, threads: int | None, gpu_layers: int, flash_attention: bool = False
    ) -> AbstractContextManager[Runtime]: ...


@dataclass(frozen=True)
class _Cut:
    """A text, cut."""

    text: Text
    corpus: Corpus


def compare(
    model: str | Path,
    reference: str | Path,
    text: str | Path | Sequence[Text],
    *,
    context: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    gpu_layers: int = 0,
    seed: int = 0,
    positions: bool = False,
    noise_floor: bool = False,
    like: str | None = None,
    progress: Progress | None = None,
    opener: Opener = open_runtime,
    reference_opener: ReferenceOpener | None = None,
) -> Report:
    """Measures how far a model is from its reference on one or more texts.

    Args:
        model: the GGUF to judge.
        reference: what to judge it by: the same checkpoint as a GGUF in f32, BF16 or Q8_0, as its own folder, or a
            pack that `make_reference` made of one.
        text: UTF-8, best none that served as calibration text; or several, with the domain of each.
        context: tokens in a window; the second half of each is scored.
        chunks: most windows to score of each text; None for all.
        threads: threads that compute; None for all that this process may use.
        gpu_layers: layers computed on a GPU, -1 for all.
        seed: of the bootstrap behind the standard errors.
        positions: score the first half of each window, too, for the numbers by position; no other number contains it.
        noise_floor: run the model against itself at another batch size, on `NOISE_WINDOWS` windows at most.
        like: "llama-perplexity" to round what that program rounds, and to compute attention as it does; else without
            llama.cpp's flash attention, which makes logits depend on how a window is cut into batches.
        progress: told after each window.
        opener: what opens the model.
        reference_opener: what opens the reference; None for `open_reference` where `opener` is the usual one, too.

    Raises:
        SourceError: a file or a text was changed meanwhile.
        EvalError: a file or a text cannot be read, the vocabularies differ, a text is too short, or no logits are
            finite.
    """
    check_size(context, chunks)
    if like not in SCORERS:
        raise EvalError(f"numbers like those of {like!r} are not known; there is: {_names(SCORERS)}")
    if like is not None and (Path(reference).is_dir() or is_pack(reference)):
        raise EvalError(f"numbers like those of {like} need a GGUF as the reference, which {reference} is not")
    texts = [Text(Path(text).stem, Path(text))] if isinstance(text, str | Path) else list(text)
    _check_texts(texts, like)  # before two models are loaded
    check_architecture(Path(model), Path(reference))
    files = states_of(model, reference, *(each.path for each in texts))
    n_threads = threads or usable_threads()
    # two of them run at the same time on half the threads each: fewer threads wait for one another
    half, other_half = max(n_threads // 2, 1), max(n_threads - n_threads // 2, 1)
    if is_pack(reference):  # replaying one is little work beside the model's
        half = n_threads
    flash = like is not None
    with opener(model, context=context, threads=half, gpu_layers=gpu_layers, flash_attention=flash) as model_run:
        reference_opener = reference_opener or (open_reference if opener is open_runtime else opener)
        with ExitStack() as stack:
            reference_run = stack.enter_context(
                reference_opener(
                    reference, context=context, threads=other_half, gpu_layers=gpu_layers, flash_attention=flash
                )
            )
            cuts = _cut_for_both(model, model_run, reference, reference_run, texts, context, chunks, positions)
            count = _Count(progress, sum(len(cut.corpus.windows) for cut in cuts), noise_floor)
            twins = None
            is_long = max(len(cut.corpus.windows) for cut in cuts) >= MIN_LANE_WINDOWS
            if n_threads > 1 and is_long and isinstance(reference_run, TextRuntime):
                twins = (
                    stack.enter_context(model_run.twin(threads=half)),
                    stack.enter_context(reference_run.twin(threads=half)),
                )
            scored = [
                score_windows(
                    model_run,
                    reference_run,
                    cut.corpus,
                    n_threads=n_threads,
                    progress=count.step,
                    score=SCORERS[like],
                    whole=like is not None,
                    twins=twins,
                )
                for cut in cuts
            ]
        for cut, found in zip(cuts, scored, strict=True):
            found["n_bytes"] = _count_bytes(cut.corpus, model_run)
        noise = None
        if noise_floor:
            rows = _other_rows(context)
            with opener(
                model, context=context, threads=other_half, gpu_layers=gpu_layers, rows=rows, flash_attention=flash
            ) as other_run:
                noise = _measure_noise(model_run, other_run, cuts, rows, n_threads, seed, count.step)
        versions = list_versions() | dict(model_run.versions)
        vocabulary = model_run.vocabulary
    identities = [identify(each.path) for each in texts]
    has_chat = any(each.is_chat for each in texts)
    provenance = Provenance(
        model=identify_model(model),
        reference=identify_reference(reference),
        corpus=identify_all(identities),
        vocabulary=vocabulary,
        text_tokens=sum(cut.corpus.text_tokens for cut in cuts),
        context=context,
        chunks=chunks,
        seed=seed,
        threads=n_threads,
        gpu_layers=gpu_layers,
        versions=versions,
        like=like,
        chat_templates=_describe_templates(model, reference) if has_chat else None,
        reference_pack=describe_reference(reference),
        model_metadata=digest_metadata(Path(model)),
        reference_quantized=describe_quantized(Path(reference)) or None,
    )
    check_unchanged(files)
    every = np.concatenate(scored)
    return summarize(
        every[:, context // 2 :] if positions else every,
        provenance,
        texts=[
            ScoredText(
                cut.text.domain,
                identity,
                cut.corpus.text_tokens,
                len(cut.corpus.windows),
                digest_stream(cut.corpus.windows),
            )
            for cut, identity in zip(cuts, identities, strict=True)
        ],
        curve=every if positions else None,
        noise_floor=noise,
    )


@dataclass
class _Count:
    """Windows done, over all texts and the noise floor."""

    progress: Progress | None
    windows: int
    has_noise: bool
    done: int = 0

    def step(self, _done: int, _total: int) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.windows + self.has_noise * min(self.windows, NOISE_WINDOWS))


def _check_texts(texts: Sequence[Text], like: str | None) -> None:
    names = [each.domain for each in texts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise EvalError(f"several texts are called {', '.join(twice)}; name each: NAME=FILE")
    if not texts:
        raise EvalError("no text to score; give at least one")
    for each in texts:
        text = read_text(each.path)
        if like is not None and not is_normalized("NFC", text):
            raise EvalError(
                f"{each.path}: not in Unicode's NFC, which the model's tokenizer brings a text into and {like} does "
                "not, so the two would count other tokens; give the text in NFC"
            )


def _cut_for_both(
    model: str | Path,
    model_run: Runtime,
    reference: str | Path,
    reference_run: Runtime,
    texts: Sequence[Text],
    context: int,
    chunks: int | None,
    positions: bool,
) -> list[_Cut]:
    """The windows of the texts, once both files are known to read them alike."""
    advice = "compare only files made from the same checkpoint"
    if model_run.n_vocab != reference_run.n_vocab:
        raise EvalError(
            f"{model} has {model_run.n_vocab} tokens, {reference} has {reference_run.n_vocab}: their logits cannot "
            f"be compared; {advice}"
        )
    if reference_run.vocabulary and model_run.vocabulary != reference_run.vocabulary:
        raise EvalError(f"{model} and {reference} give different meanings to the same token numbers; {advice}")
    cuts = []
    for text in texts:
        chat = render_chat(text.path, Path(model)) if text.is_chat else None
        first = 0 if positions else None
        corpus = cut_corpus(text.path, model_run, context=context, chunks=chunks, first=first, chat=chat)
        if isinstance(reference_run, PackRuntime):
            reference_run.check(Path(model), text.path, corpus)
            cuts.append(_Cut(text, corpus))
            continue
        other = cut_corpus(text.path, reference_run, context=context, chunks=chunks, first=first, chat=chat)
        if corpus.text_tokens != other.text_tokens or not np.array_equal(corpus.windows, other.windows):
            raise EvalError(
                f"{model} and {reference} have the same tokens and cut {text.path} differently: their merges, "
                f"pre-tokenizers or BOS settings differ; convert both again with the same version"
            )
        cuts.append(_Cut(text, corpus))
    return cuts


def _count_bytes(corpus: Corpus, runtime: TextRuntime) -> np.ndarray:
    """Bytes of the token that is scored at each position: i32[n_window, scored_per_window]."""
    tokens, place = np.unique(corpus.windows[:, corpus.first_scored + 1 :], return_inverse=True)
    lengths = np.array(runtime.token_bytes(tokens.tolist()), dtype=np.int32)
    return lengths[place].reshape(len(corpus.windows), corpus.scored_per_window)


def _other_rows(context: int) -> int:
    """Rows at a time that cut a window elsewhere than the default does: neither in one piece nor in multiples of 64."""
    return max(min(48, (context - 1 - context // 2) // 3), 1)


def _measure_noise(
    model: TextRuntime,
    other: Runtime,
    cuts: Sequence[_Cut],
    rows: int,
    n_threads: int,
    seed: int,
    progress: Progress,
) -> NoiseFloor | None:
    """The model against itself, on as many windows of each text as are its share."""
    total = sum(len(cut.corpus.windows) for cut in cuts)
    found = []
    left = NOISE_WINDOWS
    for i, cut in enumerate(cuts):
        windows = cut.corpus.windows
        share = min(len(windows), -(-left // (len(cuts) - i)), total)
        left -= share
        if share:
            corpus = replace(cut.corpus, windows=windows[:share], first=None)
            scored = score_windows(model, other, corpus, n_threads=n_threads, progress=progress)
            scored["n_bytes"] = _count_bytes(corpus, model)
            found.append(scored)
    return measure_noise(np.concatenate(found), rows, seed)


def _describe_templates(model: str | Path, reference: str | Path) -> dict[str, str | None]:
    return {"model": template_digest(Path(model)), "reference": template_digest(Path(reference))}


def _names(choices: dict[str | None, Scorer]) -> str:
    return ", ".join(name for name in choices if name is not None)

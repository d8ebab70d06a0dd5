"""Runs a model and its reference over texts; no logits are kept.

Both run the same window, one group of rows after the other, and each pair of rows becomes one record
(`metrics.POSITION`). The numbers are those of `llama-perplexity --kl-divergence` without what its file of logits loses:
it keeps 16 bits of each log-probability, and nothing below exp(-16). `like="llama-perplexity"` loses the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from unicodedata import is_normalized

import numpy as np

from pocketquant.errors import EvalError
from pocketquant.eval.kinship import check_architecture, describe_quantized
from pocketquant.eval.like_llama import score_rows_like_llama
from pocketquant.eval.metrics import Positions
from pocketquant.eval.packs.pack import is_pack
from pocketquant.eval.packs.replay import PackRuntime
from pocketquant.eval.reference import describe_reference, identify_reference, open_reference
from pocketquant.eval.report.evidence import digest_metadata, digest_stream
from pocketquant.eval.report.schema import NoiseFloor, Provenance, Report, ScoredText, measure_noise, summarize
from pocketquant.eval.windows import EXACT, MIN_LANE_WINDOWS, Progress, Scoring, score_windows
from pocketquant.extras import list_versions
from pocketquant.files.reading import states_of
from pocketquant.files.unchanged import check_unchanged
from pocketquant.gguf_file.identity import FileIdentity, identify, identify_all, identify_model
from pocketquant.llama.runtime import Runtime, TextRuntime, open_runtime
from pocketquant.machine import usable_threads
from pocketquant.texts.conversations import render_chat, template_digest
from pocketquant.texts.corpus import Corpus, Text, check_size, cut_corpus, read_text

NOISE_WINDOWS = 32
"""The most windows that the noise floor is measured on: more of them do not change its first digits."""

SCORERS: dict[str | None, Scoring] = {None: EXACT, "llama-perplexity": Scoring(score_rows_like_llama, whole=True)}
"""The values that `like` may have."""


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
    """Opens the reference; `open_runtime` is one."""

    def __call__(
        self, path: str | Path, *, context: int, threads: int | None, gpu_layers: int, flash_attention: bool = False
    ) -> AbstractContextManager[Runtime]: ...


@dataclass(frozen=True)
class _Settings:
    """The arguments of `compare` that are numbers and switches; see there."""

    context: int
    chunks: int | None
    threads: int
    gpu_layers: int
    seed: int
    positions: bool
    noise_floor: bool
    like: str | None

    @property
    def flash_attention(self) -> bool:
        return self.like is not None


@dataclass(frozen=True)
class _Openers:
    """What opens the model and the reference."""

    model: Opener
    reference: ReferenceOpener


@dataclass(frozen=True)
class _Cut:
    """A text and its windows."""

    text: Text
    corpus: Corpus


@dataclass(frozen=True)
class _Scored:
    """The scored positions of each text, and what they were scored with."""

    cuts: Sequence[_Cut]
    positions: Sequence[Positions]
    noise: NoiseFloor | None
    versions: Mapping[str, str]
    vocabulary: str


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
        text: UTF-8, best one that was not used for calibration; or several, with the domain of each.
        context: tokens in a window; the second half of each is scored.
        chunks: the most windows of each text to score; None for all.
        threads: threads that compute; None for all that this process may use.
        gpu_layers: layers computed on a GPU, -1 for all.
        seed: of the bootstrap behind the standard errors.
        positions: score the first half of each window too, for the numbers by position; no other number contains it.
        noise_floor: run the model against itself at another batch size, on `NOISE_WINDOWS` windows at most.
        like: "llama-perplexity" to round as that program does, and to use llama.cpp's flash attention as it does.
            Flash attention makes logits depend on how a window is cut into batches, so it is off otherwise.
        progress: told after each window.
        opener: opens the model.
        reference_opener: opens the reference; None for `open_reference` if `opener` is the usual one too.

    Raises:
        SourceError: a file or a text was changed during the run.
        EvalError: a file or a text cannot be read, the vocabularies differ, a text is too short, or no logits are
            finite.
    """
    texts = [Text(Path(text).stem, Path(text))] if isinstance(text, str | Path) else list(text)
    settings = _Settings(context, chunks, threads or usable_threads(), gpu_layers, seed, positions, noise_floor, like)
    model, reference = Path(model), Path(reference)
    _check(model, reference, texts, settings)
    files = states_of(model, reference, *(each.path for each in texts))
    openers = _Openers(opener, reference_opener or (open_reference if opener is open_runtime else opener))
    scored = _score(model, reference, texts, settings, openers, progress)
    identities = [identify(each.path) for each in texts]
    provenance = _describe(model, reference, settings, scored, identities)
    check_unchanged(files)
    return _report(scored, settings, provenance, identities)


def _check(model: Path, reference: Path, texts: Sequence[Text], settings: _Settings) -> None:
    """Refuses what cannot be compared, before two models are loaded."""
    check_size(settings.context, settings.chunks)
    like = settings.like
    if like not in SCORERS:
        raise EvalError(f"numbers like those of {like!r} are not known; there is: {_names(SCORERS)}")
    if like is not None and (reference.is_dir() or is_pack(reference)):
        raise EvalError(f"numbers like those of {like} need a GGUF as the reference, which {reference} is not")
    _check_texts(texts, like)
    check_architecture(model, reference)


def _score(
    model: Path,
    reference: Path,
    texts: Sequence[Text],
    settings: _Settings,
    openers: _Openers,
    progress: Progress | None,
) -> _Scored:
    """Runs both over all texts, and the model against itself where the noise floor is wanted."""
    n_threads = settings.threads
    # two of them run at the same time on half the threads each: fewer threads wait for one another
    half, other_half = max(n_threads // 2, 1), max(n_threads - n_threads // 2, 1)
    if is_pack(reference):  # replaying one is little work beside the model's
        half = n_threads
    open_with: Any = {
        "context": settings.context,
        "gpu_layers": settings.gpu_layers,
        "flash_attention": settings.flash_attention,
    }
    with openers.model(model, threads=half, **open_with) as model_run:
        with ExitStack() as stack:
            reference_run = stack.enter_context(openers.reference(reference, threads=other_half, **open_with))
            cuts = _cut_for_both((model, model_run), (reference, reference_run), texts, settings)
            count = _Count(progress, sum(len(cut.corpus.windows) for cut in cuts), settings.noise_floor)
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
                    scoring=SCORERS[settings.like],
                    twins=twins,
                )
                for cut in cuts
            ]
        for cut, found in zip(cuts, scored, strict=True):
            found["n_bytes"] = _count_bytes(cut.corpus, model_run)
        noise = None
        if settings.noise_floor:
            rows = _other_rows(settings.context)
            with openers.model(model, threads=other_half, rows=rows, **open_with) as other_run:
                noise = _measure_noise(model_run, other_run, cuts, rows, settings, count.step)
        return _Scored(cuts, scored, noise, list_versions() | dict(model_run.versions), model_run.vocabulary)


def _describe(
    model: Path, reference: Path, settings: _Settings, scored: _Scored, identities: Sequence[FileIdentity]
) -> Provenance:
    """What the numbers were measured on, and with."""
    has_chat = any(cut.text.is_chat for cut in scored.cuts)
    pack = describe_reference(reference)
    templates = {"model": template_digest(model), "reference": template_digest(reference)} if has_chat else None
    return Provenance(
        model=identify_model(model),
        reference=identify_reference(reference),
        corpus=identify_all(identities),
        vocabulary=scored.vocabulary,
        text_tokens=sum(cut.corpus.text_tokens for cut in scored.cuts),
        context=settings.context,
        chunks=settings.chunks,
        seed=settings.seed,
        threads=settings.threads,
        gpu_layers=settings.gpu_layers,
        versions=scored.versions,
        like=settings.like,
        chat_templates=templates,
        reference_pack=pack,
        model_metadata=digest_metadata(model),
        reference_quantized=(pack or {}).get("quantized") or describe_quantized(reference) or None,
    )


def _report(scored: _Scored, settings: _Settings, provenance: Provenance, identities: Sequence[FileIdentity]) -> Report:
    every = np.concatenate(scored.positions)
    texts = [
        ScoredText(
            cut.text.domain,
            identity,
            cut.corpus.text_tokens,
            len(cut.corpus.windows),
            digest_stream(cut.corpus.windows),
        )
        for cut, identity in zip(scored.cuts, identities, strict=True)
    ]
    return summarize(
        every[:, settings.context // 2 :] if settings.positions else every,
        provenance,
        texts=texts,
        curve=every if settings.positions else None,
        noise_floor=scored.noise,
    )


@dataclass
class _Count:
    """The windows done, over all texts and the noise floor."""

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
                f"{each.path}: is not in Unicode's NFC; the model's tokenizer brings a text into NFC and {like} "
                "does not, so the two would count other tokens; give the text in NFC"
            )


def _cut_for_both(
    ours: tuple[Path, Runtime], theirs: tuple[Path, Runtime], texts: Sequence[Text], settings: _Settings
) -> list[_Cut]:
    """The windows of the texts, after checking that both files tokenize them alike."""
    (model, model_run), (reference, reference_run) = ours, theirs
    advice = "compare only files made from the same checkpoint"
    if model_run.n_vocab != reference_run.n_vocab:
        raise EvalError(
            f"{model} has {model_run.n_vocab} tokens, {reference} has {reference_run.n_vocab}: their logits cannot "
            f"be compared; {advice}"
        )
    if reference_run.vocabulary and model_run.vocabulary != reference_run.vocabulary:
        raise EvalError(f"{model} and {reference} give different meanings to the same token numbers; {advice}")
    cuts = []
    how: Any = {"context": settings.context, "chunks": settings.chunks, "first": 0 if settings.positions else None}
    for text in texts:
        chat = render_chat(text.path, model) if text.is_chat else None
        corpus = cut_corpus(text.path, model_run, chat=chat, **how)
        if isinstance(reference_run, PackRuntime):
            reference_run.check(model, text.path, corpus)
            cuts.append(_Cut(text, corpus))
            continue
        other = cut_corpus(text.path, reference_run, chat=chat, **how)
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
    """A number of rows at a time that cuts a window elsewhere than the default: not in one piece or multiples of 64."""
    return max(min(48, (context - 1 - context // 2) // 3), 1)


def _measure_noise(
    model: TextRuntime,
    other: Runtime,
    cuts: Sequence[_Cut],
    rows: int,
    settings: _Settings,
    progress: Progress,
) -> NoiseFloor | None:
    """The model against itself; each text gives its share of the windows."""
    total = sum(len(cut.corpus.windows) for cut in cuts)
    found = []
    left = NOISE_WINDOWS
    for i, cut in enumerate(cuts):
        windows = cut.corpus.windows
        share = min(len(windows), -(-left // (len(cuts) - i)), total)
        left -= share
        if share:
            corpus = replace(cut.corpus, windows=windows[:share], first=None)
            scored = score_windows(model, other, corpus, n_threads=settings.threads, progress=progress)
            scored["n_bytes"] = _count_bytes(corpus, model)
            found.append(scored)
    return measure_noise(np.concatenate(found), rows, settings.seed)


def _names(choices: dict[str | None, Scoring]) -> str:
    return ", ".join(name for name in choices if name is not None)

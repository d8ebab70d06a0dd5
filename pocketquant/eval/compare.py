"""Runs a model and its reference side by side over one text; no logits are kept.

Both score the same window at the same time, a group of rows after the other, and each pair of rows is folded into one
record (`metrics.POSITION`). The numbers are those of `llama-perplexity --kl-divergence`, but for what its file of
logits loses: 16 bits per log-probability, and nothing below exp(-16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np

from pocketquant.errors import EvalError
from pocketquant.eval.corpus import Corpus, check_size, cut_corpus, read_text
from pocketquant.eval.metrics import POSITION, Positions, score_rows
from pocketquant.eval.report import Provenance, Report, identify, list_versions, summarize
from pocketquant.files import usable_threads
from pocketquant.formats import F32Array
from pocketquant.runtime import Runtime, open_runtime

Progress = Callable[[int, int], None]
"""Called with windows done and windows in all."""

Groups = Iterator[tuple[int, F32Array]]


class Opener(Protocol):
    """Opens a file as a `Runtime`; `open_runtime` is one."""

    def __call__(
        self, path: str | Path, *, context: int, threads: int | None, gpu_layers: int
    ) -> AbstractContextManager[Runtime]: ...


def compare(
    model: str | Path,
    reference: str | Path,
    text: str | Path,
    *,
    context: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    gpu_layers: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
    opener: Opener = open_runtime,
) -> Report:
    """Measures how far a model is from its reference on a text.

    Args:
        model: the GGUF to judge.
        reference: the GGUF to judge it by: the same checkpoint in f32, BF16 or Q8_0.
        text: UTF-8, best none that served as calibration text.
        context: tokens in a window; the second half of each is scored.
        chunks: most windows to score; None for the whole text.
        threads: threads that compute; None for all that this process may use.
        gpu_layers: layers computed on a GPU, -1 for all.
        seed: of the bootstrap behind the standard errors.
        progress: told after each window.
        opener: what opens the two files.

    Raises:
        EvalError: a file or the text cannot be read, the vocabularies differ, the text is too short, or no logits
            are finite.
    """
    check_size(context, chunks)
    n_threads = threads or usable_threads()
    read_text(text)  # before two models are loaded
    # the two run at the same time on half the threads each: fewer threads wait for one another
    model_threads = max(n_threads // 2, 1)
    reference_threads = max(n_threads - model_threads, 1)
    with (
        opener(model, context=context, threads=model_threads, gpu_layers=gpu_layers) as model_run,
        opener(reference, context=context, threads=reference_threads, gpu_layers=gpu_layers) as reference_run,
    ):
        corpus = _cut_for_both(model, model_run, reference, reference_run, text, context, chunks)
        positions = score_windows(model_run, reference_run, corpus, n_threads=n_threads, progress=progress)
        provenance = Provenance(
            model=identify(model),
            reference=identify(reference),
            corpus=identify(text),
            vocabulary=model_run.vocabulary,
            text_tokens=corpus.text_tokens,
            context=context,
            chunks=chunks,
            seed=seed,
            threads=n_threads,
            gpu_layers=gpu_layers,
            versions=list_versions() | dict(model_run.versions),
        )
    return summarize(positions, provenance)


def score_windows(
    model: Runtime,
    reference: Runtime,
    corpus: Corpus,
    *,
    n_threads: int = 1,
    progress: Progress | None = None,
) -> Positions:
    """Scores every window of a corpus with both runtimes.

    Args:
        model: judged.
        reference: judged by; gives its rows in the same groups as the model.
        corpus: the windows.
        n_threads: threads that fold logits; the numbers do not depend on it.
        progress: told after each window.

    Returns:
        `POSITION`[n_window, scored_per_window].
    """
    scored = np.zeros((len(corpus.windows), corpus.scored_per_window), POSITION)
    with ThreadPoolExecutor(max(n_threads - 1, 1)) as workers:
        for done, window in enumerate(corpus.windows, start=1):
            # the last token only is predicted; its own prediction would be of text outside the window
            tokens, first = window[:-1].tolist(), corpus.first_scored
            model_groups, reference_groups = (run.logits(tokens, first=first) for run in (model, reference))
            for start, rows, reference_rows in _side_by_side(model_groups, reference_groups, workers, n_threads):
                stop = start + len(rows)
                scored[done - 1, start - first : stop - first] = score_rows(
                    rows, reference_rows, window[start + 1 : stop + 1], workers=workers, n_workers=n_threads
                )
            if progress is not None:
                progress(done, len(corpus.windows))
    return scored


def _side_by_side(
    model: Groups, reference: Groups, workers: Executor, n_threads: int
) -> Iterator[tuple[int, F32Array, F32Array]]:
    """Groups of rows of both, computed at the same time: (position of the first, model's rows, reference's rows)."""
    while True:
        if n_threads > 1:
            ahead = workers.submit(next, reference, None)
            ours, theirs = next(model, None), ahead.result()
        else:
            ours, theirs = next(model, None), next(reference, None)
        if ours is None and theirs is None:
            return
        if ours is None or theirs is None or ours[0] != theirs[0] or len(ours[1]) != len(theirs[1]):
            raise ValueError("model and reference give their rows in different groups; open both with the same limits")
        yield ours[0], ours[1], theirs[1]


def _cut_for_both(
    model: str | Path,
    model_run: Runtime,
    reference: str | Path,
    reference_run: Runtime,
    text: str | Path,
    context: int,
    chunks: int | None,
) -> Corpus:
    """The windows of the text, once both files are known to read it alike."""
    advice = "compare only files made from the same checkpoint"
    if model_run.n_vocab != reference_run.n_vocab:
        raise EvalError(
            f"{model} has {model_run.n_vocab} tokens, {reference} has {reference_run.n_vocab}: their logits cannot "
            f"be compared; {advice}"
        )
    if model_run.vocabulary != reference_run.vocabulary:
        raise EvalError(f"{model} and {reference} give different meanings to the same token numbers; {advice}")
    corpus = cut_corpus(text, model_run, context=context, chunks=chunks)
    other = cut_corpus(text, reference_run, context=context, chunks=chunks)
    if corpus.text_tokens != other.text_tokens or not np.array_equal(corpus.windows, other.windows):
        raise EvalError(
            f"{model} and {reference} have the same tokens and cut {text} differently: their merges, pre-tokenizers "
            f"or BOS settings differ; convert both again with the same version"
        )
    return corpus

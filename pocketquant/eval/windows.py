"""Scores the windows of a corpus with a model and its reference.

There are two ways to keep all threads busy, and both give the same numbers. Side by side, the two run the same window
at the same time, each on half the threads, and the faster one waits for the other. In lanes, twins of both take every
other window, and within a lane model and reference run one after the other on half the threads; nothing waits, but both
must be loaded twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pocketquant.eval.metrics import POSITION, Positions, Scorer, score_rows
from pocketquant.eval.packs.top_k import TopRows
from pocketquant.formats import F32Array
from pocketquant.llama.runtime import Runtime
from pocketquant.texts.corpus import Corpus

MIN_LANE_WINDOWS = 4
"""With fewer windows than these, one lane would often have nothing to do."""

Progress = Callable[[int, int], None]
"""Called with the windows done and the windows in all."""

Groups = Iterator[tuple[int, F32Array]]
Pair = tuple[Runtime, Runtime]


@dataclass(frozen=True)
class Scoring:
    """How windows are scored.

    Attributes:
        score: what turns rows of logits into records.
        whole: whether a window's last token is run too. Nothing needs its prediction, but running it changes the last
            digits of the others, and llama-perplexity runs it.
    """

    score: Scorer = score_rows
    whole: bool = False


EXACT = Scoring()


def score_windows(
    model: Runtime,
    reference: Runtime,
    corpus: Corpus,
    *,
    n_threads: int = 1,
    progress: Progress | None = None,
    scoring: Scoring = EXACT,
    twins: Pair | None = None,
) -> Positions:
    """Scores every window of a corpus with both runtimes.

    Args:
        model: the model to judge.
        reference: what it is judged by.
        corpus: the windows.
        n_threads: threads that score logits; the numbers do not depend on it.
        progress: told after each window.
        scoring: how the windows are scored.
        twins: a second model and reference, for a second lane.

    Returns:
        `POSITION`[n_window, scored_per_window].
    """
    scored = np.zeros((len(corpus.windows), corpus.scored_per_window), POSITION)
    is_stopped, lock, done = threading.Event(), threading.Lock(), 0

    def score_lane(pair: Pair, lane: slice, workers: Executor | None, n_workers: int) -> None:
        nonlocal done
        for window, out in zip(corpus.windows[lane], scored[lane], strict=True):
            if is_stopped.is_set():
                return
            _score_window(pair, window, corpus.first_scored, out, scoring, workers, n_workers)
            with lock:
                done += 1
                if progress is not None:
                    progress(done, len(corpus.windows))

    with ThreadPoolExecutor(max(n_threads - 1, 1)) as workers:
        if twins is None or n_threads < 2 or len(corpus.windows) < MIN_LANE_WINDOWS:
            score_lane((model, reference), slice(None), workers, n_threads)
            return scored
        try:
            other = workers.submit(score_lane, twins, slice(1, None, 2), None, 1)
            score_lane((model, reference), slice(0, None, 2), None, 1)
            other.result()
        finally:  # an interrupt arrives here; the other lane ends with its window
            is_stopped.set()
    return scored


def _score_window(
    pair: Pair,
    window: np.ndarray,
    first: int,
    out: Positions,
    scoring: Scoring,
    workers: Executor | None,
    n_workers: int,
) -> None:
    # the last token is only predicted; its own prediction would be of text outside the window
    last = len(window) - 1
    tokens: Sequence[int] = window.tolist() if scoring.whole else window[:last].tolist()
    model_groups, reference_groups = (run.logits(tokens, first=first) for run in pair)
    for start, rows, reference_rows in _side_by_side(model_groups, reference_groups, workers, n_workers):
        stop = min(start + len(rows), last)
        if isinstance(reference_rows, TopRows):
            reference_rows = reference_rows.completed(rows)
        out[start - first : stop - first] = scoring.score(
            rows[: stop - start],
            reference_rows[: stop - start],
            window[start + 1 : stop + 1],
            workers=workers,
            n_workers=n_workers,
        )


def _side_by_side(
    model: Groups, reference: Groups, workers: Executor | None, n_workers: int
) -> Iterator[tuple[int, F32Array, F32Array]]:
    """Rows of both, computed at the same time: (position of the first, model's rows, reference's rows).

    Where the two come in groups of different sizes, the rest of the longer one waits for the other.
    """
    ours, theirs = None, None
    while True:
        if workers is not None and n_workers > 1 and ours is None and theirs is None:
            ahead = workers.submit(next, reference, None)
            ours, theirs = next(model, None), ahead.result()
        else:
            ours = next(model, None) if ours is None else ours
            theirs = next(reference, None) if theirs is None else theirs
        if ours is None and theirs is None:
            return
        if ours is None or theirs is None or ours[0] != theirs[0]:
            raise ValueError("model and reference do not give rows for the same positions")
        count = min(len(ours[1]), len(theirs[1]))
        yield ours[0], ours[1][:count], theirs[1][:count]
        ours, theirs = _after(ours, count), _after(theirs, count)


def _after(group: tuple[int, F32Array], count: int) -> tuple[int, F32Array] | None:
    return (group[0] + count, group[1][count:]) if len(group[1]) > count else None

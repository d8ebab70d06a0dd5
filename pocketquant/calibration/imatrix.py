"""Makes an importance matrix: runs a model over a text and adds up the squared inputs of its weights.

The text is cut into windows as llama-imatrix cuts it (`texts.corpus`). As in llama-imatrix, only the weights of blocks
are covered: neither the output matrix nor a tied embedding is. Unlike there, a multi-token-prediction block is covered
too; it is run over each window after the trunk.

Source: tools/imatrix/imatrix.cpp of llama.cpp (b10359).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.calibration.importance import ImportanceSums
from pocketquant.errors import EvalError, listing
from pocketquant.files.interrupts import resumable
from pocketquant.files.leftovers import holding
from pocketquant.files.reading import digest_file, states_of
from pocketquant.files.replacing import hidden_beside
from pocketquant.files.resuming import check_same_run, open_state, write_state
from pocketquant.files.unchanged import check_unchanged
from pocketquant.llama.drafting import Block, block_beside, find_block, open_block
from pocketquant.llama.observing import InputSums, Observer
from pocketquant.llama.runtime import Runtime, open_runtime
from pocketquant.texts.calibration import DEFAULT, SELF, CalibrationSettings, check_texts, sample_corpus
from pocketquant.texts.corpus import Corpus, cut_corpus

Progress = Callable[[int, int], None]
"""Called with the windows done and the windows in all."""

_RunBlock = Callable[[npt.NDArray[np.int32]], None]
"""Runs a multi-token-prediction block over a window that the trunk was just run over."""

_MAX_STATE_BYTES = 1 << 34


@contextmanager
def unfinished_matrix(out: Path) -> Iterator[Path]:
    """The place of the sums of a run that an interrupt ends, `.NAME.unfinished` beside the matrix.

    It is held against other runs, and gone once the block ends well, which writes the matrix in it.
    """
    state = hidden_beside(out, "unfinished")
    how = f"finished windows are kept in {state}; the same command with --resume goes on from there"
    with holding(state), resumable(state, how):
        yield state
        state.unlink(missing_ok=True)


def collect_importance(
    gguf: str | Path,
    text: str | Path,
    settings: CalibrationSettings = DEFAULT,
    *,
    mtp: str | Path | None = None,
    state: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> tuple[ImportanceSums, Corpus]:
    """Runs a model over a text.

    Args:
        gguf: the model, best in full precision.
        text: path of a UTF-8 text, or `SELF` to sample one from the model.
        settings: how the model is run.
        mtp: the file beside the model that holds its multi-token-prediction block; one inside the model is found.
        state: the file of unfinished sums, also after an interrupt; whoever writes the matrix deletes it then.
        resume: go on from `state` if it is there; the result is the same to the last bit.
        progress: told after each window.

    Returns:
        The sums, and the text that they were made from.

    Raises:
        SourceError: model or text was changed during the run.
        EvalError: model or text cannot be read, the text is too short, an input is not finite, a weight saw another
            number of tokens than the windows have, the state is of another run, or the installed llama-cpp-python
            cannot be looked into.
    """
    check_texts([text], settings)
    files, sums = states_of(gguf, mtp, None if str(text) == SELF else text), InputSums()
    observer = Observer(sums)
    block = None if mtp is None else block_beside(Path(gguf), Path(mtp))
    corpus = sample_corpus(gguf, settings) if str(text) == SELF else None
    context, threads = settings.context, settings.threads
    with ExitStack() as stack:
        runtime = stack.enter_context(
            open_runtime(gguf, context=context, threads=threads, gpu_layers=settings.gpu_layers, observe=observer.see)
        )
        block = block or find_block(gguf)
        run_block = stack.enter_context(_running(block, sums, observer, context, threads)) if block else None
        corpus = corpus or cut_corpus(text, runtime, context=context, chunks=settings.chunks)
        kernels = dict(runtime.versions)
        run = _describe_run(gguf, mtp, corpus, kernels) if state else {}
        saved = _SavedInputs(state, run, settings.save_seconds)
        done, total = saved.load(sums) if resume else 0, len(corpus.windows)
        report = progress or (lambda done, total: None)
        report(done, total)
        with saved.saved_by_interrupts():
            for window in corpus.windows[done:]:
                _run_window(window, runtime, run_block)
                done += 1
                _check_counts(sums, done, context, block)
                report(done, total)
                saved.keep(sums, done, total)
    if not sums.sums:
        raise EvalError(f"{gguf}: llama.cpp multiplied no weight of a block; the matrix would be empty")
    check_unchanged(files)
    return ImportanceSums(sums.sums, sums.counts, context, (corpus.name,), kernels), corpus


def _describe_run(gguf: str | Path, mtp: str | Path | None, corpus: Corpus, kernels: dict[str, str]) -> dict[str, Any]:
    """Everything that the sums depend on."""
    run: dict[str, Any] = {"model": digest_file(Path(gguf)), "tokens": corpus.sha256, "context": corpus.context}
    return run | {"kernels": kernels} | ({} if mtp is None else {"mtp": digest_file(Path(mtp))})


def _run_window(window: npt.NDArray[np.int32], runtime: Runtime, run_block: _RunBlock | None) -> None:
    # one row of logits, which nobody reads, lets a window go through in large batches
    for _ in runtime.logits(window.tolist(), first=len(window) - 1):
        pass
    if run_block is not None:
        run_block(window)


def _check_counts(sums: InputSums, n_window: int, context: int, block: Block | None) -> None:
    """Refuses sums that a token is missing from; the matrix of a part of the text would look like that of the whole."""
    faults = []
    for name, counts in sums.counts.items():
        # of a window, a multi-token-prediction block sees every token but the first
        is_of_block = block is not None and name.startswith(f"blk.{block.layer}.")
        expected = n_window * (context - is_of_block) * sums.n_used.get(name, 1)
        if int(counts.sum()) != expected:
            faults.append(f"{name}: {int(counts.sum())} of {expected}")
    if faults:
        raise EvalError(
            f"after {n_window} windows of {context} tokens, not every weight has seen all of them; the installed "
            f"llama-cpp-python computes otherwise than the one that pocketquant asks for:\n{listing(faults)}"
        )


@contextmanager
def _running(block: Block, sums: InputSums, trunk: Observer, context: int, threads: int | None) -> Iterator[_RunBlock]:
    """Opens a block: it is run over every token of a window but the first, each with the trunk's hidden state before
    it."""
    observer, trunk.hidden = Observer(sums), []
    hidden = trunk.hidden
    with open_block(block, context=context, threads=threads, observe=observer.see) as run:

        def run_over(window: npt.NDArray[np.int32]) -> None:
            states = np.concatenate(hidden) if hidden else np.empty((0, 0), np.float32)
            hidden.clear()
            if states.shape != (len(window), block.n_embd):
                raise EvalError(
                    f"{block.path}: llama.cpp shows hidden states {list(states.shape)}, its multi-token-prediction "
                    f"block wants {[len(window), block.n_embd]}; install the llama-cpp-python that pocketquant asks for"
                )
            run(window[1:], states[:-1])

        yield run_over


class _SavedInputs:
    """Sums of whole windows that outlive an interrupt; without a path for them, none do."""

    def __init__(self, state: Path | None, run: dict[str, Any], save_seconds: float) -> None:
        self._state, self._run, self._save_seconds = state, run, save_seconds
        self._saved, self._saved_done = time.monotonic(), 0
        self._done, self._sums = 0, InputSums()

    def keep(self, sums: InputSums, done: int, total: int) -> None:
        """Copies the sums of `done` windows, and saves them if the last saving is long enough ago."""
        if self._state is None:
            return
        self._sums, self._done = sums.copy(), done
        if done < total and time.monotonic() - self._saved >= self._save_seconds:
            self._save()
            self._saved = time.monotonic()

    @contextmanager
    def saved_by_interrupts(self) -> Iterator[None]:
        """An interrupt of the block saves the sums that were kept last, unless these are saved already."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and self._state is not None and self._done > self._saved_done:
                self._save()
            raise

    def load(self, totals: InputSums) -> int:
        """Fills the totals with the sums that an earlier run saved; returns the number of their windows."""
        if self._state is None or not self._state.exists():
            return 0
        with open_state(self._state, "an unfinished importance matrix", _MAX_STATE_BYTES) as (stated, arrays):
            done, used = int(stated.pop("done")), stated.pop("used")
            check_same_run(self._state, stated, self._run)
            for name in arrays:
                kind, _, weight = name.partition(" ")
                if kind == "sums":
                    totals.sums[weight] = arrays[name].astype(np.float64)
                    totals.counts[weight] = arrays[f"counts {weight}"].astype(np.int64)
            totals.n_used.update({str(weight): int(count) for weight, count in used.items()})
        self._done = self._saved_done = done
        self._sums = totals.copy()
        return done

    def _save(self) -> None:
        assert self._state is not None
        arrays: dict[str, npt.NDArray[Any]] = {f"sums {name}": array for name, array in self._sums.sums.items()}
        arrays |= {f"counts {name}": array for name, array in self._sums.counts.items()}
        write_state(self._state, self._run | {"done": self._done, "used": self._sums.n_used}, arrays)
        self._saved_done = self._done

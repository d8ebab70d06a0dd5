"""Makes an importance matrix: runs a model over a text and adds up the squared inputs of its weights.

Windows are those of llama-imatrix: the text without one final newline, tokenized as a whole, cut into pieces of
`context` tokens, a rest at the end dropped; where the model wants BOS it leads the text and replaces the first token of
each window. Like there, only weights of blocks are covered: neither the output matrix nor a tied embedding is. Unlike
there, a multi-token-prediction block is covered too: it is run over each window after the trunk.

Source: tools/imatrix/imatrix.cpp of llama.cpp (b10359).
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.calibration.importance import ImportanceSums
from pocketquant.errors import EvalError, listing
from pocketquant.files.reading import digest_file, states_of
from pocketquant.files.replacing import replacing
from pocketquant.files.small import open_regular
from pocketquant.files.small import read_text as read_utf8
from pocketquant.files.unchanged import check_unchanged
from pocketquant.llama.drafting import Block, block_beside, find_block, open_block
from pocketquant.llama.observing import InputSums, Observer
from pocketquant.llama.runtime import Runtime, open_runtime, open_sampler

Progress = Callable[[int, int], None]
"""Called with windows done and windows in all."""

SELF = "self"
"""In place of a text's path: let the model write the text."""

SELF_CHUNKS = 16
"""Windows that a model writes, unless told otherwise: a token at a time is slow."""

_STARTS = ("<|endoftext|>", "<|im_end|>", "\n")
"""What a sampled window begins with where the model has no BOS; the first that it knows as one token."""

_MAX_STATE_BYTES = 1 << 34


@dataclass(frozen=True)
class Calibration:
    """Text that a matrix is made from, tokenized.

    Attributes:
        name: of its file, or "self".
        windows: i32[n_window, context].
    """

    name: str
    windows: npt.NDArray[np.int32]

    @property
    def sha256(self) -> str:
        """Digest of the tokens."""
        return digest_of_tokens(self.windows)


def digest_of_tokens(windows: npt.NDArray[np.int32]) -> str:
    """SHA-256 of tokens i32[n_window, context], in hexadecimal digits."""
    return hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()


def collect_importance(
    gguf: str | Path,
    text: str | Path,
    *,
    mtp: str | Path | None = None,
    context: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    gpu_layers: int = 0,
    seed: int = 0,
    state: Path | None = None,
    resume: bool = False,
    save_seconds: float = 60.0,
    progress: Progress | None = None,
) -> tuple[ImportanceSums, Calibration]:
    """Runs a model over a text.

    Args:
        gguf: the model, best in full precision.
        text: path of a UTF-8 text, or `SELF` to sample one from the model.
        mtp: the file beside the model that holds its multi-token-prediction block; one inside the model is found.
        context: tokens in a window.
        chunks: most windows to take; None for the whole text, or `SELF_CHUNKS` sampled ones.
        threads: threads that compute; None for all that this process may use.
        gpu_layers: layers computed on a GPU, -1 for all.
        seed: of the sampling.
        state: where unfinished sums are kept meanwhile, and after an interrupt; whoever writes the matrix deletes it
            then.
        resume: go on from `state` if it is there; the result is the same to the last bit.
        save_seconds: least time between two savings of the state.
        progress: told after each window.

    Returns:
        The sums, and what they were made from.

    Raises:
        SourceError: model or text was changed meanwhile.
        EvalError: model or text cannot be read, the text is too short, an input is not finite, a weight saw another
            number of tokens than the windows have, the state is of another run, or the installed llama-cpp-python
            cannot be looked into.
    """
    if context < 16 or (chunks is not None and chunks < 1):
        raise EvalError(f"context {context}, chunks {chunks}: use windows of at least 16 tokens, and at least one")
    files, sums = states_of(gguf, mtp, None if str(text) == SELF else text), InputSums()
    observer = Observer(sums)
    block = None if mtp is None else block_beside(Path(gguf), Path(mtp))
    if str(text) == SELF:
        calibration = sample_windows(gguf, context, chunks or SELF_CHUNKS, threads, gpu_layers, seed)
    else:
        read_text(text)  # before a model is loaded
    with ExitStack() as stack:
        runtime = stack.enter_context(
            open_runtime(gguf, context=context, threads=threads, gpu_layers=gpu_layers, observe=observer.see)
        )
        if block := block or find_block(gguf):
            run_block = stack.enter_context(_running(block, sums, observer, context, threads))
        if str(text) != SELF:
            calibration = cut_windows(text, runtime, context, chunks)
        kernels = dict(runtime.versions)
        kept = _Kept(state, {}, save_seconds)
        if state:
            run: dict[str, Any] = {"model": digest_file(Path(gguf)), "tokens": calibration.sha256, "context": context}
            run["kernels"] = kernels
            kept = _Kept(state, run if mtp is None else run | {"mtp": digest_file(Path(mtp))}, save_seconds)
        done, total = kept.load(sums) if resume else 0, len(calibration.windows)
        if progress is not None:
            progress(done, total)
        with kept.saved_by_interrupts():
            for window in calibration.windows[done:]:
                # one row of logits, which nobody reads, lets a window go through in large batches
                for _ in runtime.logits(window.tolist(), first=context - 1):
                    pass
                if block is not None:
                    run_block(window)
                done += 1
                _check_counts(sums, done, context, block)
                if progress is not None:
                    progress(done, total)
                kept.keep(sums, done, total)
    if not sums.sums:
        raise EvalError(f"{gguf}: llama.cpp multiplied no weight of a block; the matrix would be empty")
    check_unchanged(files)
    return ImportanceSums(sums.sums, sums.counts, context, (calibration.name,), kernels), calibration


def _check_counts(sums: InputSums, n_window: int, context: int, block: Block | None) -> None:
    """Refuses sums that some token is missing from: a matrix of a part of the text looks as good as one of all."""
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
def _running(
    block: Block, sums: InputSums, trunk: Observer, context: int, threads: int | None
) -> Iterator[Callable[[npt.NDArray[np.int32]], None]]:
    """Gives what runs a block over a window that the trunk was just run over: every token but the first, each with the
    trunk's hidden state before it."""
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


def sample_windows(
    gguf: str | Path, context: int, chunks: int, threads: int | None, gpu_layers: int, seed: int
) -> Calibration:
    """A text that the model itself writes, token by token at temperature 1."""
    with open_sampler(gguf, context=context, threads=threads, gpu_layers=gpu_layers) as sampler:
        starts = [sampler.tokenize(start, special=True) for start in _STARTS]
        start = [sampler.bos] if sampler.bos is not None else next((s for s in starts if len(s) == 1), starts[-1])
        windows = [start + sampler.sample(start, context - len(start), seed=seed + i) for i in range(chunks)]
    return Calibration(SELF, np.array(windows, dtype=np.int32))


def read_text(path: str | Path) -> str:
    """A UTF-8 text without one final newline; EvalError where it cannot be read, or is larger than 256 MiB."""
    return read_utf8(path, error=EvalError).removesuffix("\n")


def cut_windows(path: str | Path, runtime: Runtime, context: int, chunks: int | None) -> Calibration:
    """A text's first `chunks` windows; EvalError where there is not even one."""
    lead = [] if runtime.bos is None else [runtime.bos]
    tokens = np.array(lead + runtime.tokenize(read_text(path)), dtype=np.int32)
    n_window = min(len(tokens) // context, chunks or len(tokens))
    if n_window == 0:
        raise EvalError(
            f"{path}: {len(tokens)} tokens are too few for one window of {context}; give a longer text or a smaller "
            "context"
        )
    windows = tokens[: n_window * context].reshape(n_window, context)
    if runtime.bos is not None:
        windows[:, 0] = runtime.bos
    return Calibration(Path(path).name, windows)


class _Kept:
    """Sums of whole windows that outlive an interrupt; with no path for them, none do."""

    def __init__(self, state: Path | None, run: dict[str, Any], save_seconds: float) -> None:
        self._state, self._run, self._save_seconds = state, run, save_seconds
        self._saved, self._saved_done = time.monotonic(), 0
        self._done, self._sums = 0, InputSums()

    def keep(self, sums: InputSums, done: int, total: int) -> None:
        """Copies the sums of `done` windows, and saves them if that was last done long enough ago."""
        if self._state is None:
            return
        self._sums, self._done = sums.copy(), done
        if done < total and time.monotonic() - self._saved >= self._save_seconds:
            self._save()
            self._saved = time.monotonic()

    @contextmanager
    def saved_by_interrupts(self) -> Iterator[None]:
        """An interrupt of the block saves what was kept last, unless that was saved already."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and self._state is not None and self._done > self._saved_done:
                self._save()
            raise

    def load(self, totals: InputSums) -> int:
        """Fills the totals with what an earlier run saved; how many windows they hold."""
        if self._state is None or not self._state.exists():
            return 0
        self._done = self._saved_done = _load(self._state, self._run, totals)
        self._sums = totals.copy()
        return self._done

    def _save(self) -> None:
        assert self._state is not None
        arrays: dict[str, npt.NDArray[Any]] = {f"sums {name}": array for name, array in self._sums.sums.items()}
        arrays |= {f"counts {name}": array for name, array in self._sums.counts.items()}
        used = self._sums.n_used
        run = json.dumps(self._run | {"done": self._done, "used": used})
        with replacing(self._state, is_result=False) as temporary, open(temporary, "wb") as file:
            np.savez(file, run=np.array(run), **arrays)  # type: ignore[arg-type]
        self._saved_done = self._done


def _load(state: Path, run: dict[str, Any], totals: InputSums) -> int:
    """Fills the totals; how many windows they hold."""
    try:
        if state.stat().st_size > _MAX_STATE_BYTES:
            raise ValueError("too large")
        with open_regular(state, EvalError) as file, np.load(file, allow_pickle=False) as arrays:
            stated = json.loads(str(arrays["run"]))
            kept = {name: arrays[name] for name in arrays.files if name != "run"}
        done, used = stated.pop("done"), stated.pop("used")
        if stated != run:
            differs = ", ".join(key for key in sorted(run | stated) if stated.get(key) != run.get(key))
            raise EvalError(
                f"{state}: was begun with other settings ({differs}); delete it, or repeat the same command"
            )
        for name, array in kept.items():
            kind, weight = name.split(" ", 1)
            if kind == "sums":
                totals.sums[weight] = array.astype(np.float64)
                totals.counts[weight] = kept[f"counts {weight}"].astype(np.int64)
        totals.n_used.update({str(weight): int(count) for weight, count in used.items()})
        return int(done)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise EvalError(
            f"{state}: not the state of an unfinished importance matrix ({type(error).__name__}); delete it"
        ) from error

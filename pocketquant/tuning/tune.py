"""Tuning of a finished file: its blocks moved to where the model diverges least. The extra `curvature`.

Rounding takes each tensor by itself; what one loses another can make up for, and only a run of the whole quantized
model says how. Integer scales, types and size of the file stay as they are. The F16 scales of its blocks get factors
near one, by Adam (Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015) on the KL divergence from the
reference's predictions, and codes follow the same gradients (`free_codes`), with a rate that rises over a few steps and
falls along a cosine.

Some windows are held back; where the divergence on them does not fall, nothing is written. The reference runs once; its
last hidden states, and the positions of codes, lie on disk meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketquant.calibration.imatrix import SELF, digest_of_tokens
from pocketquant.calibration.statistics import Text
from pocketquant.calibration.torch_layers import read_whole, set_up
from pocketquant.errors import EvalError, OutputError, RecipeError, listing
from pocketquant.files.leftovers import work_folder
from pocketquant.files.reading import read_at
from pocketquant.files.replacing import check_target, replacing
from pocketquant.files.unchanged import FileState, check_unchanged
from pocketquant.formats import U8Array
from pocketquant.gguf_file.header import encode_table
from pocketquant.gguf_file.opening import open_unfused
from pocketquant.gguf_file.reading import GgufHeader, GgufTensor, read_header
from pocketquant.llama.sampling import sample_on
from pocketquant.model import Model, Tensor, Value, padded
from pocketquant.tuning.block_scales import BlockScales, read_block_scales
from pocketquant.tuning.optimizer import Numbers, Tuner, run_reference

Progress = Callable[[int, int], None]
"""Called with batches done and batches in all: those that look at held-back windows, too."""

KEY = "pocketquant.tuning"
"""The metadata that a tuned file has."""

_WARM_UP = 10
CODE_RATE = 1e-3
_HELD_BACK = 8
_MOST_HELD_BACK = 32
_BEGINNING = 8
"""One part in so many of a window is given, the rest sampled."""

_COPIED = 1 << 24


@dataclass(frozen=True)
class Tuned:
    """What came of it.

    Attributes:
        before, after: mean KL divergence on held-back windows, nats a token, weights only.
        steps: changes of the scales and codes.
        n_scales: scales that were free.
        n_codes: codes that were free; 0 if none.
        n_moved: codes that came out other than they were.
    """

    before: float
    after: float
    steps: int
    n_scales: int
    n_codes: int
    n_moved: int


class DoesNotPay(EvalError):
    """Tuning made nothing better. No fault of the input: the command ends with exit code 1.

    Attributes:
        before: divergence on windows held back.
        after: the same with what was tuned.
    """

    def __init__(self, file: Path, before: float, after: float) -> None:
        super().__init__(
            f"{file}: tuning does not pay: the divergence on windows held back went from {before:.6f} to {after:.6f}; "
            "nothing is written; more text or a lower rate may help"
        )
        self.before, self.after = before, after


def tune_file(
    file: Path,
    reference: Model,
    windows: npt.NDArray[np.int32],
    texts: Sequence[Text],
    out: Path,
    *,
    more: npt.NDArray[np.int32] | None = None,
    epochs: float = 2.0,
    rate: float = 1e-3,
    code_rate: float = CODE_RATE,
    batch: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tuned:
    """Writes a file with the same types and better scales and codes.

    Args:
        file: the quantized GGUF.
        reference: the opened model that it was made from, in full precision.
        windows: i32[n_window, context], tokens; every eighth, at most 32, is held back.
        texts: what all windows come from.
        out: where the tuned file goes.
        more: i32[n, context], windows of which none is held back: those of `go_on`.
        epochs: how often each window is used.
        rate: of Adam, in parts of a scale.
        code_rate: of codes, in levels' distances; 0 leaves codes alone.
        batch: windows in a step; None for as many as hold 2,048 tokens.
        device: torch's name of what computes.
        threads: threads that compute; None for all that this process may use.
        seed: of the order of the windows.
        progress: told after each batch.

    Raises:
        DoesNotPay: the divergence on the windows held back did not fall: `out` is not written.
        EvalError: torch or transformers is absent, or too few windows.
        RecipeError: the file was made from another model, is split, tuned already, or has nothing to tune.
        ArchitectureError: no text model, or one whose positions are scaled.
        OutputError: `out` cannot be written.
    """
    header = read_header(file)
    scales = _read_scales(file, header, reference)
    batch = batch or max(1, 2048 // windows.shape[1])
    held, used = split_windows(len(windows))
    if more is not None:
        used = np.concatenate([used, len(windows) + np.arange(len(more))])
        windows = np.concatenate([windows, more])
    if len(used) < batch or not len(held):
        raise EvalError(f"{len(windows)} windows are too few to tune on; give more text or smaller windows")
    setting = set_up(reference, device, threads)
    steps = max(1, round(epochs * len(used) / batch))
    done, total = 0, -(-len(windows) // batch) + 2 * -(-len(held) // batch) + steps

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with work_folder(check_target(out)) as states:
        scales = _prepare(states, scales, reference, free=code_rate > 0)
        hidden = run_reference(setting, windows, _cut(np.arange(len(windows)), batch), states, step)
        tuner = Tuner(setting, open_unfused(file), scales, windows, hidden)
        before = tuner.divergence(_cut(held, batch), step)
        for number, chosen in enumerate(_batches(used, batch, steps, seed)):
            share = min(1.0, (number + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * number / steps))
            tuner.step(chosen, rate * share, code_rate * share)
            step()
        after = tuner.divergence(_cut(held, batch), step)
        if not after < before:
            raise DoesNotPay(file, before, after)
        about = ", ".join(text.name for text in texts)
        check_unchanged([header.state, *reference.files])
        _write(header, scales, out, {KEY: Value("str", f"{steps} steps; {windows.size} tokens of {about}")})
        n_codes = sum(0 if each.codes is None else each.codes.positions.size for each in scales.values())
        n_moved = sum(each.n_moved() for each in scales.values())
    return Tuned(before, after, steps, _count(scales), n_codes, n_moved)


def split_windows(count: int) -> tuple[Numbers, Numbers]:
    """Numbers of the windows that are held back, and of the others."""
    is_held = np.arange(count) % max(_HELD_BACK, -(-count // _MOST_HELD_BACK)) == 0
    return np.flatnonzero(is_held), np.flatnonzero(~is_held)


def go_on(
    gguf: Path,
    windows: npt.NDArray[np.int32],
    count: int,
    *,
    threads: int | None = None,
    gpu_layers: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> npt.NDArray[np.int32]:
    """More windows for `tune_file`: beginnings of those that are not held back, as the model itself goes on.

    A little text soon is learned by heart, a model's own never ends. Source for tuning on it: Liu et al., "LLM-QAT",
    2023, without their beginnings.

    Args:
        gguf: the model in full precision.
        windows: as `tune_file` gets them.
        count: windows to make.
        threads, gpu_layers, seed, progress: as in `sample_on`.

    Returns:
        i32[count, context].

    Raises:
        EvalError: as `sample_on`, or there are too few windows.
    """
    used = split_windows(len(windows))[1]
    if not len(used):
        raise EvalError(f"{len(windows)} windows are too few to tune on; give more text or smaller windows")
    beginnings = windows[np.resize(used, count), : max(1, windows.shape[1] // _BEGINNING)]
    return sample_on(
        gguf, beginnings, windows.shape[1], threads=threads, gpu_layers=gpu_layers, seed=seed, progress=progress
    )


def sampled_text(more: npt.NDArray[np.int32]) -> Text:
    """What windows of `go_on` are called among the texts."""
    return Text(SELF, more.size, digest_of_tokens(more))


def check_file(file: Path, reference: Model) -> tuple[int, int]:
    """How many scales and codes can be tuned; raises what `tune_file` does for a file that does not fit."""
    scales = _read_scales(file, read_header(file), reference)
    return _count(scales), sum(math.prod(each.tensor.shape) for each in scales.values())


def _count(scales: dict[str, BlockScales]) -> int:
    return sum(change.size for each in scales.values() for change in each.changes.values())


def tuning_bytes(texts: Sequence[Text]) -> int:
    """At most so many bytes larger is a tuned file."""
    return 96 + len(KEY) + sum(len(text.name.encode()) + 2 for text in texts)


def _read_scales(file: Path, header: GgufHeader, reference: Model) -> dict[str, BlockScales]:
    if "split.count" in header.metadata:
        raise RecipeError(f"{file}: one shard of several; merge them first")
    if KEY in header.metadata:
        raise RecipeError(f"{file}: tuned already; tune the file that it was made from")
    model = open_unfused(file)
    theirs = {tensor.name: tensor for tensor in reference.tensors}
    n_layer = model.sizes["n_layer"]
    run = [tensor for tensor in model.tensors if tensor.layer is None or tensor.layer < n_layer]
    faults = [
        f"{tensor.name}: {list(tensor.shape)}"
        for tensor in run
        if tensor.name not in theirs or theirs[tensor.name].shape != tensor.shape or not _is_same(tensor, theirs)
    ]
    if faults:
        raise RecipeError(f"{file}: not made from this reference; these tensors differ\n{listing(faults)}")
    names = {tensor.name for tensor in run if not tensor.keep_f32}
    found = {e.name: read_block_scales(file, e, header.state) for e in header.tensors if e.name in names}
    scales = {name: each for name, each in found.items() if each is not None}
    if not scales:
        raise RecipeError(f"{file}: holds no quantized weights; there is nothing to tune")
    return scales


def _is_same(tensor: Tensor, theirs: dict[str, Tensor]) -> bool:
    """Whether a tensor that is never quantized has the reference's numbers; others differ by their rounding."""
    return not tensor.keep_f32 or np.array_equal(read_whole(tensor), read_whole(theirs[tensor.name]))


def _cut(numbers: Numbers, batch: int) -> list[Numbers]:
    return [numbers[start : start + batch] for start in range(0, len(numbers), batch)]


def _batches(used: Numbers, batch: int, steps: int, seed: int) -> list[Numbers]:
    """Windows of each step: all of them in a random order, then all again."""
    rng = np.random.default_rng(seed)
    rounds = -(-steps * batch // len(used))
    return _cut(np.concatenate([rng.permutation(used) for _ in range(rounds)]), batch)[:steps]


def _prepare(states: Path, scales: dict[str, BlockScales], reference: Model, *, free: bool) -> dict[str, BlockScales]:
    """With `free`, the codes can be moved; what that takes lies in the folder `states` meanwhile."""
    originals = {tensor.name: tensor for tensor in reference.tensors}
    try:
        return {name: each.with_free_codes(originals[name], states) if free else each for name, each in scales.items()}
    except OSError as error:
        raise OutputError(f"{states}: cannot be written: {error.strerror}") from error


def _write(header: GgufHeader, scales: dict[str, BlockScales], out: Path, extra: dict[str, Value]) -> None:
    """The file with its scales changed and `extra` in its metadata."""
    table = encode_table({**header.metadata, **extra}, header.tensors)
    start = padded(len(table))
    with replacing(out) as temporary:
        with open(temporary, "r+b") as target:
            target.write(table.ljust(start, b"\0"))
            for tensor in header.tensors:
                target.seek(start)
                for data in _data_of(header.state, tensor, scales.get(tensor.name)):
                    data.tofile(target)
                start += padded(tensor.nbytes)
            target.truncate(start)
        written = read_header(temporary)
        if [t.name for t in written.tensors] != [t.name for t in header.tensors]:
            raise OutputError(f"{out}: what was written does not read back; the disk may be failing")


def _data_of(file: FileState, tensor: GgufTensor, scales: BlockScales | None) -> Iterator[U8Array]:
    """A tensor's bytes, piece by piece."""
    if scales is None:
        for at in range(0, tensor.nbytes, _COPIED):
            yield read_at(file.path, tensor.offset + at, min(_COPIED, tensor.nbytes - at), file)
        return
    n_rows = len(scales.scales["d"])
    for first in range(0, n_rows, 4096):
        yield scales.stored(first, min(first + 4096, n_rows))

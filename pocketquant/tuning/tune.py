"""Tuning: the blocks of a finished file are moved so that the whole model diverges least from its reference.

Rounding looks at one tensor at a time. One tensor can make up for the loss of another, but only a run of the whole
quantized model shows how. The types, the integer scales and the size of the file stay as they are. The F16 scales of
the blocks are multiplied by factors near one, which Adam finds (Kingma and Ba, "Adam: A Method for Stochastic
Optimization", 2015) with the KL divergence from the reference's predictions as the loss. The codes follow the same
gradients (`free_codes`). The learning rate rises over the first steps and then falls along a cosine.

Some windows are held back. If the divergence on them does not fall, nothing is written. The reference runs once; its
last hidden states, and the positions of the codes, lie on disk while the model is tuned. Needs the extra `curvature`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

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
from pocketquant.texts.calibration import SELF
from pocketquant.texts.corpus import TextRecord, digest_of_tokens
from pocketquant.tuning.block_scales import BlockScales, read_block_scales
from pocketquant.tuning.optimizer import Numbers, Tuner, run_reference

I32Array = npt.NDArray[np.int32]
Progress = Callable[[int, int], None]
"""Called with the batches done and the batches in all, those over held-back windows included."""

KEY = "pocketquant.tuning"
"""The metadata key that marks a tuned file."""

_WARM_UP = 10
"""Number of steps over which the learning rate rises."""

_HELD_BACK = 8
_MOST_HELD_BACK = 32
"""One window in eight is held back, and 32 at most."""

_BEGINNING = 8
"""The first eighth of a window is given, the rest is sampled."""

_BATCH_TOKENS = 2048
_COPIED = 1 << 24


@dataclass(frozen=True)
class TuneSettings:
    """How a file is tuned.

    Attributes:
        epochs: how often each window is used.
        rate: learning rate of the scales, as a share of a scale.
        code_rate: learning rate of the codes, in units of the distance between levels; 0 leaves the codes alone.
        batch: windows in a step; None for as many as hold 2,048 tokens.
        device: torch's name of the device that computes.
        threads: threads that compute; None for all that this process may use.
        seed: of the order of the windows.
    """

    epochs: float = 2.0
    rate: float = 1e-3
    code_rate: float = 1e-3
    batch: int | None = None
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class TuningWindows:
    """The tokens that a file is tuned on.

    Attributes:
        windows: i32[n_window, context]; every eighth, at most 32, is held back.
        texts: the texts that all windows come from.
        sampled: i32[n, context], windows from `sample_continuations`, none of which is held back; None for none.
    """

    windows: I32Array
    texts: tuple[TextRecord, ...]
    sampled: I32Array | None = None


@dataclass(frozen=True)
class Tuned:
    """The result of tuning.

    Attributes:
        before, after: mean KL divergence on the held-back windows, in nats a token, of the weights alone.
        steps: number of steps.
        n_scales: scales that could move.
        n_codes: codes that could move; 0 if none.
        n_moved: codes that differ from those of the file.
    """

    before: float
    after: float
    steps: int
    n_scales: int
    n_codes: int
    n_moved: int


class DoesNotPay(EvalError):
    """Tuning did not lower the divergence. The input is not at fault, so the command ends with exit code 1.

    Attributes:
        before: divergence on the held-back windows.
        after: the same of the tuned model.
    """

    def __init__(self, file: Path, before: float, after: float) -> None:
        super().__init__(
            f"{file}: tuning does not pay: the divergence on the held-back windows went from {before:.6f} to "
            f"{after:.6f}; nothing is written; more text or a lower rate may help"
        )
        self.before, self.after = before, after


def tune_file(
    file: Path,
    reference: Model,
    tokens: TuningWindows,
    out: Path,
    settings: TuneSettings = TuneSettings(),
    *,
    progress: Progress | None = None,
) -> Tuned:
    """Writes a file with the same types and better scales and codes.

    Args:
        file: the quantized GGUF.
        reference: the opened model that it was made from, in full precision.
        tokens: the windows to tune on.
        out: the tuned file.
        settings: how the file is tuned.
        progress: told after each batch.

    Raises:
        DoesNotPay: the divergence on the held-back windows did not fall: `out` is not written.
        EvalError: torch or transformers is absent, or there are too few windows.
        RecipeError: the file was made from another model, is split, is tuned already, or has nothing to tune.
        ArchitectureError: it is not a text model, or its positions are scaled.
        OutputError: `out` cannot be written.
    """
    header = read_header(file)
    scales = _read_scales(file, header, reference)
    run = _Run(tokens, settings, progress)
    setting = set_up(reference, settings.device, settings.threads)
    with work_folder(check_target(out)) as states:
        scales = _prepare(states, scales, reference, free=settings.code_rate > 0)
        hidden = run_reference(setting, run.windows, run.batches_of_all, states, run.count)
        tuner = Tuner(setting, open_unfused(file), scales, run.windows, hidden)
        before = tuner.divergence(run.held_back, run.count)
        for batch, share in run.steps():
            tuner.step(batch, settings.rate * share, settings.code_rate * share)
            run.count()
        after = tuner.divergence(run.held_back, run.count)
        if not after < before:
            raise DoesNotPay(file, before, after)
        about = ", ".join(text.name for text in tokens.texts)
        check_unchanged([header.state, *reference.files])
        said = f"{run.n_step} steps; {run.windows.size} tokens of {about}"
        _write(header, scales, out, {KEY: Value("str", said)})
        n_codes = sum(0 if each.codes is None else each.codes.positions.size for each in scales.values())
        n_moved = sum(each.n_moved() for each in scales.values())
    return Tuned(before, after, run.n_step, _count(scales), n_codes, n_moved)


class _Run:
    """The windows, batches and steps of a run, and how many batches are done."""

    def __init__(self, tokens: TuningWindows, settings: TuneSettings, progress: Progress | None) -> None:
        windows, held_back, used = tokens.windows, *split_windows(len(tokens.windows))
        if tokens.sampled is not None:
            used = np.concatenate([used, len(windows) + np.arange(len(tokens.sampled))])
            windows = np.concatenate([windows, tokens.sampled])
        batch = settings.batch or max(1, _BATCH_TOKENS // windows.shape[1])
        if len(used) < batch or not len(held_back):
            raise EvalError(f"{len(windows)} windows are too few to tune on; give more text or smaller windows")
        self.windows, self._used, self._batch, self._seed = windows, used, batch, settings.seed
        self.held_back, self.batches_of_all = _cut(held_back, batch), _cut(np.arange(len(windows)), batch)
        self.n_step = max(1, round(settings.epochs * len(used) / batch))
        self._progress, self._done = progress, 0

    def count(self) -> None:
        """One more batch is done."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, len(self.batches_of_all) + 2 * len(self.held_back) + self.n_step)

    def steps(self) -> Iterator[tuple[Numbers, float]]:
        """The windows of each step, and the share of the learning rate that it gets."""
        for number, batch in enumerate(_batches(self._used, self._batch, self.n_step, self._seed)):
            yield batch, min(1.0, (number + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * number / self.n_step))


def split_windows(count: int) -> tuple[Numbers, Numbers]:
    """The numbers of the held-back windows, and of the others."""
    is_held = np.arange(count) % max(_HELD_BACK, -(-count // _MOST_HELD_BACK)) == 0
    return np.flatnonzero(is_held), np.flatnonzero(~is_held)


def sample_continuations(
    gguf: Path,
    windows: I32Array,
    count: int,
    *,
    threads: int | None = None,
    gpu_layers: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> I32Array:
    """More windows for `tune_file`: the beginnings of those that are not held back, continued by the model itself.

    A model soon learns a short text by heart, but its own text never ends. Source for tuning on it: Liu et al.,
    "LLM-QAT", 2023, which gives no beginnings.

    Args:
        gguf: the model in full precision.
        windows: as in `TuningWindows`.
        count: number of windows to make.
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


def sampled_text(sampled: I32Array) -> TextRecord:
    """The entry of windows from `sample_continuations` among the texts."""
    return TextRecord(SELF, sampled.size, digest_of_tokens(sampled))


def check_file(file: Path, reference: Model) -> tuple[int, int]:
    """The number of scales and of codes that can be tuned; raises as `tune_file` does for a file that does not fit."""
    scales = _read_scales(file, read_header(file), reference)
    return _count(scales), sum(math.prod(each.tensor.shape) for each in scales.values())


def _count(scales: dict[str, BlockScales]) -> int:
    return sum(change.size for each in scales.values() for change in each.changes.values())


def tuning_bytes(texts: Sequence[TextRecord]) -> int:
    """The most bytes by which a tuned file is larger."""
    return 96 + len(KEY) + sum(len(text.name.encode()) + 2 for text in texts)


def _read_scales(file: Path, header: GgufHeader, reference: Model) -> dict[str, BlockScales]:
    if "split.count" in header.metadata:
        raise RecipeError(f"{file}: is one shard of several; join the shards first")
    if KEY in header.metadata:
        raise RecipeError(f"{file}: is tuned already; tune the file that it was made from")
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
        raise RecipeError(f"{file}: was not made from this reference; these tensors differ\n{listing(faults)}")
    names = {tensor.name for tensor in run if not tensor.keep_f32}
    found = {e.name: read_block_scales(file, e, header.state) for e in header.tensors if e.name in names}
    scales = {name: each for name, each in found.items() if each is not None}
    if not scales:
        raise RecipeError(f"{file}: holds no quantized weights; there is nothing to tune")
    return scales


def _is_same(tensor: Tensor, theirs: dict[str, Tensor]) -> bool:
    """Whether a tensor that is never quantized equals the reference's; the others differ by their rounding."""
    return not tensor.keep_f32 or np.array_equal(read_whole(tensor), read_whole(theirs[tensor.name]))


def _cut(numbers: Numbers, batch: int) -> list[Numbers]:
    return [numbers[start : start + batch] for start in range(0, len(numbers), batch)]


def _batches(used: Numbers, batch: int, steps: int, seed: int) -> list[Numbers]:
    """The windows of each step: all of them in a random order, then all again in another."""
    rng = np.random.default_rng(seed)
    rounds = -(-steps * batch // len(used))
    return _cut(np.concatenate([rng.permutation(used) for _ in range(rounds)]), batch)[:steps]


def _prepare(states: Path, scales: dict[str, BlockScales], reference: Model, *, free: bool) -> dict[str, BlockScales]:
    """Makes the codes movable where they are `free`; their positions lie in the folder `states`."""
    originals = {tensor.name: tensor for tensor in reference.tensors}
    try:
        return {name: each.with_free_codes(originals[name], states) if free else each for name, each in scales.items()}
    except OSError as error:
        raise OutputError(f"{states}: cannot be written: {error.strerror}") from error


def _write(header: GgufHeader, scales: dict[str, BlockScales], out: Path, extra: dict[str, Value]) -> None:
    """Writes the file with its scales changed and `extra` added to its metadata."""
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
            raise OutputError(f"{out}: the written file does not read back; the disk may be failing")


def _data_of(file: FileState, tensor: GgufTensor, scales: BlockScales | None) -> Iterator[U8Array]:
    """The bytes of a tensor, piece by piece."""
    if scales is None:
        for at in range(0, tensor.nbytes, _COPIED):
            yield read_at(file.path, tensor.offset + at, min(_COPIED, tensor.nbytes - at), file)
        return
    n_rows = len(scales.scales["d"])
    for first in range(0, n_rows, 4096):
        yield scales.stored(first, min(first + 4096, n_rows))

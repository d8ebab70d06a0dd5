"""Collects statistics by running a GGUF over texts, in as many passes as a bound of memory needs.

A pass runs the whole text and sums the inputs of some layers, or of some of the output head's groups; the graph ends
after the last layer that is wanted. The sums of a finished pass go into the unfinished file at once, so the disk holds
them only once. The sums of an unfinished pass are saved from time to time, and by an interrupt (`saved_sums`). The file
is the same whether it was made in one pass or in many, or interrupted and resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketquant.calibration.hessian import MAX_GROUPS, HeadSums, HessianSums, MatrixRange, group_rows
from pocketquant.calibration.saved_sums import SavedSums
from pocketquant.calibration.statistics import COUNT, HEAD_ROUNDING, INPUT, ROUNDING, fingerprint
from pocketquant.calibration.statistics_writing import HEAD_HESSIANS, About, Piece, StatisticsLayout, lay_out, triangles
from pocketquant.errors import ArchitectureError, EvalError
from pocketquant.files.reading import digest_file, states_of
from pocketquant.files.unchanged import check_unchanged
from pocketquant.gguf_file.opening import open_unfused
from pocketquant.llama.observing import Observer
from pocketquant.llama.runtime import default_rows, open_runtime
from pocketquant.model import Model, Role, Tensor
from pocketquant.texts.calibration import (
    DEFAULT,
    SELF,
    CalibrationSettings,
    TokenizedTexts,
    check_texts,
    cut_texts,
)

Progress = Callable[[int, int], None]
"""Called with the windows done and the windows in all, over every pass."""

_SAME_INPUT = (
    (Role.DELTA_QKV, Role.DELTA_GATE, Role.DELTA_ALPHA, Role.DELTA_BETA),
    (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V),
    (Role.FFN_GATE, Role.FFN_UP),
    (Role.SHARED_ROUTER, Role.SHARED_GATE, Role.SHARED_UP),
    (Role.EXPERT_GATE, Role.EXPERT_UP),
)
_BATCH = 512


@dataclass(frozen=True)
class Pass:
    """The matrices that one run over the text sums: ranges of inputs, and perhaps groups of the head."""

    ranges: tuple[MatrixRange, ...]
    last_layer: int | None
    head: MatrixRange | None

    @property
    def sum_bytes(self) -> int:
        parts = (*self.ranges, *([self.head] if self.head else []))
        # one more matrix: the product of a window, before it is added
        return sum(part.sum_bytes for part in parts) + max(4 * part.k**2 for part in parts)


@dataclass(frozen=True)
class StatisticsPlan:
    """The passes that collect statistics, decided from names and shapes alone.

    Attributes:
        shared: tensor -> the tensor under whose name their common input stands.
        inputs: that tensor -> (n_matrix, k).
        passes: the runs over the text.
        n_group: the most groups of the head's rows.
    """

    shared: Mapping[str, str]
    inputs: Mapping[str, tuple[int, int]]
    passes: tuple[Pass, ...]
    n_embd: int
    n_vocab: int
    n_group: int

    @property
    def file_bytes(self) -> int:
        """The approximate size of the file."""
        sides = [*self.inputs.values(), (self.n_group, self.n_embd)]
        return sum(2 * n * k * (k + 1) for n, k in sides) + 20 * self.n_vocab


def plan_statistics(model: Model, *, memory_bytes: int = 2 << 30, n_group: int = MAX_GROUPS) -> StatisticsPlan:
    """Distributes a model's inputs over passes whose sums fit in `memory_bytes`.

    Raises:
        EvalError: a single matrix does not fit.
    """
    wanted = [t for t in model.tensors if _has_inputs(t, model.sizes["n_layer"])]
    shared: dict[str, str] = {}
    first_of: dict[tuple[int | None, int], str] = {}
    for tensor in wanted:
        group = next((i for i, roles in enumerate(_SAME_INPUT) if tensor.role in roles), None)
        shared[tensor.name] = tensor.name if group is None else first_of.setdefault((tensor.layer, group), tensor.name)
    by_name = {tensor.name: tensor for tensor in wanted}
    inputs = {key: (by_name[key].n_matrix, by_name[key].n_cols) for key in dict.fromkeys(shared.values())}
    n_embd, n_vocab = model.sizes["n_embd"], next(t.n_rows for t in model.tensors if t.role is Role.EMBED)
    largest = max([4 * k * k for _, k in inputs.values()] + [4 * n_embd**2])
    if 2 * largest > memory_bytes:
        raise EvalError(
            f"{memory_bytes} bytes of memory are too few for the largest matrix; give {2 * largest} or more"
        )
    layers = {key: by_name[key].layer or 0 for key in inputs}
    sides = [(key, n, k) for key, (n, k) in sorted(inputs.items(), key=lambda item: layers[item[0]])]
    passes: list[list[MatrixRange]] = [[]]
    room = memory_bytes - largest
    for key, n_matrix, k in [*sides, (HEAD_HESSIANS, n_group, n_embd)]:
        first = 0
        if key == HEAD_HESSIANS and default_rows(n_vocab) < _BATCH:
            # its logits come in small batches, which would make the sums of the layers slower and round them otherwise
            passes.append([])
            room = memory_bytes - largest
        while first < n_matrix:
            stop = min(n_matrix, first + room // (4 * k * k))
            if stop > first:
                passes[-1].append(MatrixRange(key, k, first, stop))
                room -= passes[-1][-1].sum_bytes
                first = stop
            if first < n_matrix:
                passes.append([])
                room = memory_bytes - largest
    return StatisticsPlan(
        shared, inputs, tuple(_as_pass(ranges, layers) for ranges in passes if ranges), n_embd, n_vocab, n_group
    )


def _as_pass(ranges: Sequence[MatrixRange], layers: Mapping[str, int]) -> Pass:
    head = next((matrices for matrices in ranges if matrices.key == HEAD_HESSIANS), None)
    blocks = tuple(matrices for matrices in ranges if matrices.key != HEAD_HESSIANS)
    return Pass(blocks, None if head else max(layers[matrices.key] for matrices in blocks), head)


def _has_inputs(tensor: Tensor, n_layer: int) -> bool:
    # blocks after the last layer predict further tokens; they are not run over a text here
    return tensor.layer is not None and tensor.layer < n_layer and len(tensor.shape) > 1 and not tensor.keep_f32


def collect_statistics(
    gguf: str | Path,
    texts: Sequence[str | Path],
    out: Path,
    settings: CalibrationSettings = DEFAULT,
    *,
    memory_bytes: int = 2 << 30,
    resume: bool = False,
    progress: Progress | None = None,
) -> StatisticsPlan:
    """Runs a model over texts and writes the Hessians of its inputs.

    Args:
        gguf: the model, in F32 or BF16.
        texts: paths of UTF-8 texts, or `SELF` to sample one from the model.
        out: the statistics file; unfinished work lies beside it as `.NAME.unfinished` and `.NAME.state`.
        settings: how the model is run.
        memory_bytes: bound of the sums in memory; the model itself comes on top.
        resume: go on where an interrupted run was saved.
        progress: told after each window.

    Raises:
        SourceError: model or text was changed during the run.
        EvalError: model or text cannot be read, a text is too short, an input is not finite, the unfinished work is of
            another run, memory does not suffice, or the installed llama-cpp-python cannot be looked into.
    """
    check_texts(texts, settings)
    files = states_of(gguf, *(text for text in texts if str(text) != SELF))
    model = open_unfused(gguf)
    if not any(tensor.role is Role.EMBED for tensor in model.tensors):
        raise ArchitectureError(f"{gguf}: holds no embedding; give the whole model")
    planned = plan_statistics(model, memory_bytes=memory_bytes)
    tokens = cut_texts(gguf, texts, settings)
    collection = _Collection(Path(gguf), planned, tokens, settings, progress)
    # passes differ in their batches, so no batch is stated
    kernels = {key: value for key, value in tokens.versions.items() if key != "llama_cpp_batch"}
    about = About(tokens.windows.size, fingerprint(model), tokens.records, planned.shared, kernels)
    layout = _lay_out(planned, about, collection.n_group)
    run = {
        "model": digest_file(Path(gguf)),
        "header": hashlib.sha256(layout.header).hexdigest(),
        "memory": memory_bytes,
        "state": 3,
    }
    work = SavedSums(out, run, settings.save_seconds)
    with work.begun(layout, resume):
        collection.report(work.first_pass, work.first_window)
        for number in range(work.first_pass, len(planned.passes)):
            collection.run_pass(number, work, layout)
        check_unchanged(files)
        work.finish()
    return planned


class _Collection:
    """A model, the windows that it is run over, and the passes to run."""

    def __init__(
        self,
        gguf: Path,
        planned: StatisticsPlan,
        tokens: TokenizedTexts,
        settings: CalibrationSettings,
        progress: Progress | None,
    ) -> None:
        self._gguf, self._planned, self._settings, self._progress = gguf, planned, settings, progress
        self._windows = tokens.windows
        self._frequency = np.bincount(tokens.windows.reshape(-1), minlength=planned.n_vocab)
        self._row_group = group_rows(self._frequency, planned.n_group)
        self.n_group = int(self._row_group.max()) + 1

    def report(self, number: int, window: int) -> None:
        """Tells that so many windows of a pass are done."""
        if self._progress is not None:
            n_window = len(self._windows)
            self._progress(number * n_window + window, len(self._planned.passes) * n_window)

    def run_pass(self, number: int, work: SavedSums, layout: StatisticsLayout) -> None:
        """Runs all windows that a pass lacks, and puts its matrices into the file."""
        settings, windows = self._settings, self._windows
        sums = _sums_of(self._planned.passes[number], self._row_group, self.n_group)
        first = work.first_window if number == work.first_pass else 0
        work.begin_pass(sums, number, first)
        sums.begin_at(first * settings.context)
        with open_runtime(
            self._gguf,
            context=settings.context,
            threads=settings.threads,
            gpu_layers=settings.gpu_layers,
            # without the head no logits are computed, so room for them costs nothing
            rows=min(settings.context, _BATCH) if sums.head is None else None,
            observe=Observer(sums).see,
        ) as runtime:
            for i in range(first, len(windows)):
                for _, logits in runtime.logits(windows[i].tolist()):
                    if sums.head is not None:
                        sums.head.add_logits(logits)
                self.report(number, i + 1)
                work.reached(i + 1, is_last=i + 1 == len(windows))
        sums.check_tokens(windows.size)
        sums.free_room()
        is_last = number + 1 == len(self._planned.passes)
        layout.put(work.unfinished, _finished(sums, self._frequency, is_last=is_last))
        work.close_pass()


def _lay_out(planned: StatisticsPlan, about: About, n_group: int) -> StatisticsLayout:
    n_vocab = planned.n_vocab
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {
        "head/row_group": ("I32", (n_vocab,)),
        "head/variance": ("F64", (n_vocab,)),
        "head/frequency": ("F64", (n_vocab,)),
        HEAD_HESSIANS + COUNT: ("I64", (n_group,)),
        HEAD_HESSIANS: triangles(n_group, planned.n_embd),
        HEAD_ROUNDING: ("F32", (1, 2 * planned.n_embd)),
    }
    for key, (n_matrix, k) in planned.inputs.items():
        arrays[key + INPUT + COUNT] = ("I64", (n_matrix,))
        arrays[key + INPUT] = triangles(n_matrix, k)
        arrays[key + ROUNDING] = ("F32", (n_matrix, 2 * k))
    return lay_out(about, arrays)


def _sums_of(run: Pass, row_group: npt.NDArray[np.int32], n_group: int) -> HessianSums:
    head = None
    if run.head is not None:
        matrices = MatrixRange(run.head.key, run.head.k, min(run.head.first, n_group), min(run.head.stop, n_group))
        sums = np.zeros((matrices.stop - matrices.first, matrices.k, matrices.k), np.float32)
        counts = np.zeros(2 + len(sums), np.int64)
        head = HeadSums(row_group, matrices, sums, np.zeros(len(row_group)), np.zeros((2, matrices.k)), counts)
    return HessianSums({matrices.key: matrices for matrices in run.ranges}, run.last_layer, head)


def _finished(sums: HessianSums, frequency: npt.NDArray[np.int64], *, is_last: bool) -> Iterator[Piece]:
    """The means, and their counts: those of an expert tensor that came in parts are written part by part.

    The sums stay as they are, for an interrupt to save.
    """
    for key, matrices in sums.ranges.items():
        for i, count in enumerate(sums.counts[key]):
            yield key + INPUT + COUNT, matrices.first + i, np.array(count)
            yield key + INPUT, matrices.first + i, sums.sums[key][i] / np.float32(max(int(count), 1))
            yield key + ROUNDING, matrices.first + i, sums.rounding[key][i].reshape(-1) / max(int(count), 1)
    if sums.head is None:
        return
    head, tokens = sums.head, int(sums.head.tokens[0])
    sizes = np.bincount(head.row_group)
    for i in range(head.range.stop - head.range.first):
        group = head.range.first + i
        yield HEAD_HESSIANS + COUNT, group, np.array(tokens)
        yield HEAD_HESSIANS, group, head.sums[i] / np.float32(tokens * sizes[group])
    if is_last:
        yield "head/row_group", None, head.row_group
        yield "head/variance", None, head.variance / tokens
        yield "head/frequency", None, frequency / frequency.sum()
        yield HEAD_ROUNDING, 0, head.rounding.reshape(-1) / tokens

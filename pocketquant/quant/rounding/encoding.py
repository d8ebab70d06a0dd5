"""Rounds the tensors of a plan by statistics: who encodes which, and with what.

A tensor whose outputs' curvature is known is rounded whole, from both sides; one whose inputs alone are known in row
chunks; the embedding and the output head by groups of rows that have a moment of their own. A tensor that the
statistics say nothing about keeps the format's own encoder.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from pocketquant.errors import RecipeError
from pocketquant.formats import F32Array, QuantFormat, U8Array
from pocketquant.gguf_file import encode_header
from pocketquant.model import Model, Plan, PlannedTensor, Role, RowEncoder, Tensor, Value
from pocketquant.pipeline import encode_rows
from pocketquant.quant.rounding.layouts import layout_of
from pocketquant.quant.rounding.matrix import round_matrix
from pocketquant.quant.rounding.prepared import Prepared, prepare
from pocketquant.quant.rounding.rows import DEFAULT, Rounding, round_rows
from pocketquant.quant.statistics import HeadStatistics, Statistics, check_statistics

STEPS = {
    "search": Rounding(feedback=False, sweeps=0, two_sided=False),
    "feedback": Rounding(sweeps=0, two_sided=False),
    "descent": Rounding(two_sided=False),
    "two-sided": Rounding(),
}
"""Names of `--rounding`: each takes the steps of those before it."""


@dataclass(frozen=True)
class _Ready:
    """Prepared moments, kept as long as they are the last ones asked for."""

    size: int = 2
    kept: OrderedDict[Hashable, Prepared] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __reduce__(self) -> tuple[type[_Ready], tuple[int]]:
        return _Ready, (self.size,)  # another process makes its own

    def get(self, key: Hashable, make: Callable[[], Prepared]) -> Prepared:
        with self.lock:  # others wait: two would take the memory of two, and linear algebra has threads of its own
            if key not in self.kept:
                while len(self.kept) >= self.size:
                    self.kept.popitem(last=False)
                self.kept[key] = make()
            self.kept.move_to_end(key)
            return self.kept[key]


@dataclass(frozen=True)
class LayerEncoder:
    """Rounds a linear layer, or the experts of one, each by its own moments.

    Attributes:
        whole: whether a matrix is rounded as one piece.
        importance: for experts that no token came by.
    """

    statistics: Statistics
    options: Rounding
    whole: bool
    importance: F32Array | None
    ready: _Ready

    def encode(self, tensor: Tensor, start: int, stop: int, quant_format: QuantFormat) -> U8Array:
        if len(tensor.shape) == 2:
            return self._encode(tensor, None, start, stop, quant_format)
        pieces = []
        while start < stop:
            expert, row = divmod(start, tensor.shape[-2])
            end = min(stop, start + tensor.shape[-2] - row)
            pieces.append(self._encode(tensor, expert, start, end, quant_format))
            start = end
        return np.concatenate(pieces)

    def _encode(self, tensor: Tensor, expert: int | None, start: int, stop: int, quant_format: QuantFormat) -> U8Array:
        statistics, name = self.statistics, tensor.name
        if expert is not None and statistics.input(name, expert) is None:
            return encode_rows(tensor, start, stop, quant_format, self.importance)
        key = (statistics.shared.get(name, name), expert)
        inputs = self.ready.get(key, lambda: _prepare(statistics.input(name, expert), name, self.options))
        outputs = statistics.output(name, expert) if self.whole else None
        if outputs is None or not outputs.any():
            return round_rows(tensor.rows(start, stop), quant_format, inputs, self.options)
        return round_matrix(
            tensor.rows(start, stop), quant_format, inputs, _prepare(outputs, name, self.options), self.options
        )


@dataclass(frozen=True)
class VocabularyEncoder:
    """Rounds the embedding, the output head, or both in one: rows of a group share a moment.

    Attributes:
        groups: i32[n_vocab], the moment of each row.
        weights: f32[n_moment, 2], how much of the head's moment and of the embedding's is in each.
        moments: i32[n_moment], the head's moment of each.
    """

    head: HeadStatistics
    options: Rounding
    groups: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float64]
    moments: npt.NDArray[np.int32]
    ready: _Ready
    whole: bool = False

    def encode(self, tensor: Tensor, start: int, stop: int, quant_format: QuantFormat) -> U8Array:
        rows = tensor.rows(start, stop)
        data = np.empty((stop - start, quant_format.row_bytes(tensor.n_cols)), np.uint8)
        groups = self.groups[start:stop]
        for group in np.unique(groups):
            chosen = np.flatnonzero(groups == group)
            data[chosen] = round_rows(rows[chosen], quant_format, self._ready(int(group), tensor.name), self.options)
        return data

    def _ready(self, group: int, name: str) -> Prepared:
        return self.ready.get(group, lambda: self._prepare(group, name))

    def _prepare(self, group: int, name: str) -> Prepared:
        of_head, of_embedding = self.weights[group]
        moment = np.zeros(1)
        if of_head > 0:
            moment = moment + of_head * self.head.moment(int(self.moments[group]))
        if of_embedding > 0 and self.head.embed_output is not None:
            moment = moment + of_embedding * self.head.embed_output
        return _prepare(moment.astype(np.float32), name, self.options)


def with_rounding(plan: Plan, statistics: Statistics, options: Rounding = DEFAULT) -> Plan:
    """The same plan, its tensors rounded by statistics; what that changes in the file's header is what `plan` says.

    Give `rounding_metadata` to `plan` as `metadata_extra`, so that the size is decided with it; else it is added here.

    Raises:
        RecipeError: the statistics are of another model.
    """
    check_statistics(statistics, Model("", {}, tuple(item.tensor for item in plan.tensors), {}))
    encoders: dict[str, RowEncoder] = {}
    planned, ready = [], _Ready()
    for item in plan.tensors:
        encoder = _encoder_of(item, plan, statistics, options, ready)
        if encoder is not None:
            encoders[item.tensor.name] = encoder
            sides = "inputs and outputs" if encoder.whole else "inputs"
            item = replace(item, reason=f"{item.reason}; rounded by its {sides}")
        planned.append(item)
    metadata = {**plan.metadata, **rounding_metadata(statistics, options)} if encoders else plan.metadata
    header = plan.header if metadata == plan.metadata else encode_header(metadata, planned)
    return replace(plan, metadata=metadata, tensors=tuple(planned), header=header, rounding=encoders)


def rounding_metadata(statistics: Statistics, options: Rounding) -> dict[str, Value]:
    """How a file's weights were rounded, as its metadata says it."""
    steps = next((name for name, known in STEPS.items() if known == options), str(options))
    texts = ", ".join(text.name for text in statistics.texts)
    return {"pocketquant.rounding": Value("str", f"{steps}; {statistics.tokens} tokens of {texts}")}


def _encoder_of(
    item: PlannedTensor, plan: Plan, statistics: Statistics, options: Rounding, ready: _Ready
) -> LayerEncoder | VocabularyEncoder | None:
    tensor = item.tensor
    if item.format.block_len == 1 or layout_of(item.format) is None or tensor.dtype == item.format.name:
        return None
    if tensor.role in (Role.EMBED, Role.HEAD):
        is_tied = not any(other.tensor.role is Role.HEAD for other in plan.tensors)
        return _vocabulary_encoder(tensor, is_tied, statistics, options)
    name = statistics.shared.get(tensor.name, tensor.name) + "/input"
    if name not in statistics.entries:
        return None
    _check_side(tensor, name, tensor.n_cols, statistics)
    output = tensor.name + "/output"
    whole = options.two_sided and output in statistics.entries
    if whole:
        _check_side(tensor, output, tensor.shape[-2], statistics)
    return LayerEncoder(statistics, options, whole, plan.importance.get(tensor.name), ready)


def _check_side(tensor: Tensor, name: str, side: int, statistics: Statistics) -> None:
    n_matrix, length = statistics.entries[name].shape
    if length != side * (side + 1) // 2 or n_matrix != int(np.prod(tensor.shape[:-2])):
        raise RecipeError(
            f"{statistics.path}: {name} is not of the size of {tensor.name} {list(tensor.shape)}; the statistics are "
            "of another model"
        )


def _vocabulary_encoder(
    tensor: Tensor, is_tied: bool, statistics: Statistics, options: Rounding
) -> VocabularyEncoder | None:
    head = statistics.head()
    if head is None or len(head.row_group) != tensor.n_rows:
        return None
    n_group, counts = head.n_group, np.maximum(np.bincount(head.row_group, minlength=head.n_group), 1)
    if tensor.role is Role.HEAD or (is_tied and head.embed_output is None):
        of_head, of_embedding = np.ones(n_group), np.zeros(n_group)
    elif head.embed_output is None:
        return None
    else:
        of_head = np.bincount(head.row_group, weights=head.row_scale, minlength=n_group) / counts
        of_embedding = np.bincount(head.row_group, weights=head.frequency, minlength=n_group) / counts
        if not is_tied:
            one = np.zeros(tensor.n_rows, np.int32)
            return VocabularyEncoder(head, options, one, np.array([[0.0, 1.0]]), one[:1], _Ready(1))
    weights = np.stack([of_head, of_embedding], axis=1)
    return VocabularyEncoder(
        head, options, head.row_group, weights, np.arange(n_group, dtype=np.int32), _Ready(n_group)
    )


def _prepare(moment: F32Array | None, name: str, options: Rounding) -> Prepared:
    if moment is None:
        raise RecipeError(f"{name}: the statistics name its moment but hold none; make them again")
    try:
        return prepare(moment, options.damping)
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from error

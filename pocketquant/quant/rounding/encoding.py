"""Rounds the tensors of a plan by statistics: who encodes which, and with what.

A tensor whose outputs' curvature is known is rounded whole, from both sides; one whose inputs alone are known in row
chunks; the embedding and the output head by groups of rows that have a moment of their own. A tensor that the
statistics say nothing about keeps the format's own encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pocketquant.calibration.statistics import COUNT, EMBED_OUTPUT, HEAD, INPUT, OUTPUT, Statistics, check_statistics
from pocketquant.errors import RecipeError
from pocketquant.formats import F32Array, QuantFormat, U8Array
from pocketquant.gguf_file.header import encode_header
from pocketquant.gguf_file.writing import encode_rows, naming_overflow
from pocketquant.model import Model, Plan, PlannedTensor, Role, RowEncoder, Tensor, Value
from pocketquant.quant.rounding.kept import ROOM, alone, bytes_of, keep
from pocketquant.quant.rounding.prepared import F64Array, Prepared, prepare
from pocketquant.quant.rounding.rows import DEFAULT, Rounding, round_rows
from pocketquant.quant.rounding.two_sided import round_matrix

STEPS = {
    "search": Rounding(feedback=False, sweeps=0, two_sided=False),
    "feedback": Rounding(sweeps=0, two_sided=False),
    "descent": Rounding(two_sided=False),
    "two-sided": Rounding(),
}
"""Names of `--rounding`: each takes the steps of those before it."""

MOMENTS = HEAD[3]
HEAD_ROOM = 2 << 30
"""Bytes of the prepared moments of the vocabulary's groups; where all would take more, neighbours are joined."""
_Side = Callable[[str, int | None], F32Array | None]
_NAMED = 8
"""Experts that a reason names."""


@dataclass(frozen=True)
class LayerEncoder:
    """Rounds a linear layer, or the experts of one, each by its own moments.

    Attributes:
        whole: whether a matrix is rounded as one piece.
        importance: for experts that no token came by; None if there are none, or no importance matrix.
    """

    statistics: Statistics
    options: Rounding
    whole: bool
    importance: F32Array | None

    def encode(self, tensor: Tensor, start: int, stop: int, quant_format: QuantFormat) -> U8Array:
        with naming_overflow(tensor):
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
        if expert is not None and not statistics.share(name, expert) > 0:
            return encode_rows(tensor, start, stop, quant_format, self.importance)
        key = (_file_of(statistics), self.options.damping, statistics.shared.get(name, name), expert)
        inputs = keep(key, tensor.n_cols, lambda: self._prepare(statistics.input, name, expert))
        outputs = statistics.output(name, expert) if self.whole else None
        if outputs is None or not outputs.any():
            return round_rows(tensor.rows(start, stop), quant_format, inputs, self.options)
        del outputs
        across = alone(lambda: self._prepare(statistics.output, name, expert))
        return round_matrix(tensor.rows(start, stop), quant_format, inputs, across, self.options)

    def _prepare(self, side: _Side, name: str, expert: int | None) -> Prepared:
        return _prepare(_read(side, name, expert), name, self.options)


@dataclass(frozen=True)
class VocabularyEncoder:
    """Rounds the embedding, the output head, or both in one: rows of a group share a moment.

    Attributes:
        groups: i32[n_vocab], the group of each row.
        weights: f64[n_group, n_moment + 1], how much of each of the head's moments is in a group's, and of the
            embedding's.
    """

    statistics: Statistics
    options: Rounding
    groups: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float64]
    whole: bool = False

    def encode(self, tensor: Tensor, start: int, stop: int, quant_format: QuantFormat) -> U8Array:
        rows = tensor.rows(start, stop)
        data = np.empty((stop - start, quant_format.row_bytes(tensor.n_cols)), np.uint8)
        groups = self.groups[start:stop]
        for group in np.unique(groups):
            chosen = np.flatnonzero(groups == group)
            with naming_overflow(tensor):
                data[chosen] = round_rows(rows[chosen], quant_format, self._ready(int(group), tensor), self.options)
        return data

    def _ready(self, group: int, tensor: Tensor) -> Prepared:
        key = (_file_of(self.statistics), self.options.damping, tensor.name, group)
        room = max(ROOM, len(self.weights) * bytes_of(tensor.n_cols))  # every chunk of rows needs all groups
        return keep(key, tensor.n_cols, lambda: self._prepare(group, tensor), room)

    def _prepare(self, group: int, tensor: Tensor) -> Prepared:
        moment = np.zeros((tensor.n_cols, tensor.n_cols))
        *of_head, of_embedding = self.weights[group]
        for i in np.flatnonzero(of_head):
            moment += of_head[i] * self.statistics.matrix(MOMENTS, int(i)).astype(np.float64)
        if of_embedding > 0:
            moment += of_embedding * self.statistics.matrix(EMBED_OUTPUT).astype(np.float64)
        return _prepare(moment, tensor.name, self.options)


def with_rounding(plan: Plan, statistics: Statistics, options: Rounding = DEFAULT) -> Plan:
    """The same plan, its tensors rounded by statistics, with the importance only of tensors and experts that need it.

    Give `rounding_metadata` to `plan` as `metadata_extra`, so that the size is decided with it; else it is added here.

    Raises:
        RecipeError: the statistics are of another model.
    """
    check_statistics(statistics, Model("", {}, tuple(item.tensor for item in plan.tensors), {}))
    encoders: dict[str, RowEncoder] = {}
    planned, importance = [], dict(plan.importance)
    for item in plan.tensors:
        encoder, name = _encoder_of(item, plan, statistics, options), item.tensor.name
        if encoder is not None:
            encoders[name] = encoder
            unseen = _unseen_experts(item.tensor, statistics)
            if not unseen:
                importance.pop(name, None)
            sides = "inputs and outputs" if encoder.whole else "inputs"
            item = replace(item, reason=f"{item.reason}; rounded by its {sides}{_describe_unseen(unseen)}")
        planned.append(item)
    metadata = {**plan.metadata, **rounding_metadata(statistics, options)} if encoders else plan.metadata
    header = plan.header if metadata == plan.metadata else encode_header(metadata, planned)
    files = plan.files if statistics.state is None else (*plan.files, statistics.state)
    return replace(
        plan,
        metadata=metadata,
        tensors=tuple(planned),
        header=header,
        importance=importance,
        rounding=encoders,
        files=files,
    )


def rounding_metadata(statistics: Statistics, options: Rounding) -> dict[str, Value]:
    """How a file's weights were rounded, as its metadata says it."""
    steps = next((name for name, known in STEPS.items() if known == options), str(options))
    texts = ", ".join(text.name for text in statistics.texts)
    return {"pocketquant.rounding": Value("str", f"{steps}; {statistics.tokens} tokens of {texts}")}


def _encoder_of(
    item: PlannedTensor, plan: Plan, statistics: Statistics, options: Rounding
) -> LayerEncoder | VocabularyEncoder | None:
    tensor = item.tensor
    if item.format.block_len == 1 or item.format.layout is None or tensor.dtype == item.format.name:
        return None
    if tensor.role in (Role.EMBED, Role.HEAD):
        is_tied = not any(other.tensor.role is Role.HEAD for other in plan.tensors)
        return _vocabulary_encoder(tensor, is_tied, statistics, options)
    name = statistics.shared.get(tensor.name, tensor.name) + INPUT
    if name not in statistics.entries:
        return None
    _check_side(tensor, name, tensor.n_cols, statistics)
    output = tensor.name + OUTPUT
    whole = options.two_sided and output in statistics.entries
    if whole:
        _check_side(tensor, output, tensor.shape[-2], statistics)
    needs_importance = bool(_unseen_experts(tensor, statistics))
    return LayerEncoder(statistics, options, whole, plan.importance.get(tensor.name) if needs_importance else None)


def _unseen_experts(tensor: Tensor, statistics: Statistics) -> list[int]:
    """Experts that no token came by."""
    if len(tensor.shape) < 3:
        return []
    counts = statistics.array(statistics.shared.get(tensor.name, tensor.name) + INPUT + COUNT)
    return [int(expert) for expert in np.flatnonzero(counts <= 0)]


def _describe_unseen(experts: list[int]) -> str:
    if not experts:
        return ""
    named = ", ".join(map(str, experts[:_NAMED])) + (", ..." if len(experts) > _NAMED else "")
    return f", but no token came by {len(experts)} of its experts, which get the plain kernel: {named}"


def _check_side(tensor: Tensor, name: str, side: int, statistics: Statistics, n_matrix: int | None = None) -> None:
    expected = tensor.n_matrix if n_matrix is None else n_matrix
    if statistics.entries[name].shape != (expected, side * (side + 1) // 2):
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
    n_moment, by_head = head.n_group, tensor.role is Role.HEAD or is_tied
    if by_head:
        _check_side(tensor, MOMENTS, tensor.n_cols, statistics, n_moment)
    if head.embed_output is not None:
        _check_side(tensor, EMBED_OUTPUT, tensor.n_cols, statistics)
    if not by_head:
        if head.embed_output is None:
            return None
        return VocabularyEncoder(
            statistics, options, np.zeros(tensor.n_rows, np.int32), np.eye(1, n_moment + 1, n_moment)
        )
    # neighbours in number are neighbours in frequency
    n_group = min(n_moment, max(1, HEAD_ROOM // bytes_of(tensor.n_cols)))
    joined = np.arange(n_moment) * n_group // n_moment
    counts = np.bincount(head.row_group, minlength=n_moment)
    groups = joined[head.row_group].astype(np.int32)
    sizes = np.maximum(np.bincount(groups, minlength=n_group), 1)
    weights = np.zeros((n_group, n_moment + 1))
    weights[joined, np.arange(n_moment)] = counts / sizes[joined]
    if is_tied and head.embed_output is not None:
        weights[:, -1] = np.bincount(groups, weights=head.frequency, minlength=n_group) / sizes
    return VocabularyEncoder(statistics, options, groups, weights)


def _file_of(statistics: Statistics) -> Hashable:
    """What tells a statistics file from another at the same path."""
    try:
        stat = statistics.path.stat()
    except OSError as error:
        raise RecipeError(f"{statistics.path}: cannot be read: {error.strerror}") from error
    return str(statistics.path), stat.st_size, stat.st_mtime_ns, statistics.model_sha256


def _read(side: _Side, name: str, expert: int | None) -> F64Array:
    """A moment in f64, which alone stays in memory."""
    moment = side(name, expert)
    if moment is None:
        raise RecipeError(f"{name}: the statistics name its moment but hold none; make them again")
    return moment.astype(np.float64)


def _prepare(moment: F64Array, name: str, options: Rounding) -> Prepared:
    try:
        return prepare(moment, options.damping)
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from error

"""Rounds the tensors of a plan with statistics: which encoder a tensor gets, and with which matrices.

A tensor with a Hessian of its inputs and a Fisher matrix of its outputs is rounded as a whole (`two_sided`). A tensor
with a Hessian alone is rounded in chunks of rows (`rows`). The rows of the embedding and of the output head are rounded
in groups, each with a Hessian of its own. A tensor that the statistics do not hold keeps the format's own encoder.
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
from pocketquant.model import Plan, PlannedTensor, Role, RowEncoder, Tensor, Value
from pocketquant.quant.rounding.factor_cache import CACHE_BYTES, cached, factored_bytes, uncached
from pocketquant.quant.rounding.factored import F64Array, FactoredHessian, factor_hessian
from pocketquant.quant.rounding.rows import DEFAULT, Rounding, round_rows
from pocketquant.quant.rounding.two_sided import round_matrix

STEPS = {
    "search": Rounding(feedback=False, sweeps=0, two_sided=False),
    "feedback": Rounding(sweeps=0, two_sided=False),
    "descent": Rounding(two_sided=False),
    "two-sided": Rounding(),
}
"""The names that `--rounding` accepts; each includes the steps of those before it."""

HEAD_HESSIANS = HEAD[3]
HEAD_CACHE_BYTES = 2 << 30
"""The most memory for the factored Hessians of the vocabulary's groups; beyond it, neighbouring groups are joined."""
_Side = Callable[[str, int | None], F32Array | None]
_NAMED = 8
"""Number of experts that a reason names."""


@dataclass(frozen=True)
class LayerEncoder:
    """Rounds a linear layer, or each expert of one, with its own Hessian and Fisher matrix.

    Attributes:
        whole: whether a matrix is rounded as a whole, with its Fisher matrix.
        importance: for the experts that no token was routed to; None if there are none, or no importance matrix.
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
        hessian = cached(key, tensor.n_cols, lambda: self._factor(statistics.input, name, expert))
        fisher = statistics.output(name, expert) if self.whole else None
        if fisher is None or not fisher.any():
            return round_rows(tensor.rows(start, stop), quant_format, hessian, self.options)
        del fisher
        factored = uncached(lambda: self._factor(statistics.output, name, expert))
        return round_matrix(tensor.rows(start, stop), quant_format, hessian, factored, self.options)

    def _factor(self, side: _Side, name: str, expert: int | None) -> FactoredHessian:
        return _factor(_read(side, name, expert), name, self.options)


@dataclass(frozen=True)
class VocabularyEncoder:
    """Rounds the embedding, the output head, or the one tensor that is both: the rows of a group share a Hessian.

    Attributes:
        groups: i32[n_vocab], the group of each row.
        weights: f64[n_group, n_hessian + 1], the share of each of the head's Hessians in the Hessian of a group, and
            last that of the embedding's Fisher matrix.
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
                data[chosen] = round_rows(rows[chosen], quant_format, self._hessian(int(group), tensor), self.options)
        return data

    def _hessian(self, group: int, tensor: Tensor) -> FactoredHessian:
        key = (_file_of(self.statistics), self.options.damping, tensor.name, group)
        cache_bytes = max(
            CACHE_BYTES, len(self.weights) * factored_bytes(tensor.n_cols)
        )  # a chunk of rows needs all groups
        return cached(key, tensor.n_cols, lambda: self._factor(group, tensor), cache_bytes)

    def _factor(self, group: int, tensor: Tensor) -> FactoredHessian:
        hessian = np.zeros((tensor.n_cols, tensor.n_cols))
        *of_head, of_embedding = self.weights[group]
        for i in np.flatnonzero(of_head):
            hessian += of_head[i] * self.statistics.matrix(HEAD_HESSIANS, int(i)).astype(np.float64)
        if of_embedding > 0:
            hessian += of_embedding * self.statistics.matrix(EMBED_OUTPUT).astype(np.float64)
        return _factor(hessian, tensor.name, self.options)


def with_rounding(plan: Plan, statistics: Statistics, options: Rounding = DEFAULT) -> Plan:
    """The same plan with its tensors rounded by statistics; only what is not keeps its importance.

    Give `rounding_metadata` to `plan` as `metadata_extra`, so that the size is decided with it; else it is added here.

    Raises:
        RecipeError: the statistics are of another model.
    """
    check_statistics(statistics, (item.tensor for item in plan.tensors))
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
    """The metadata of a file that says how its weights were rounded."""
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
    """The experts that no token was routed to."""
    if len(tensor.shape) < 3:
        return []
    counts = statistics.array(statistics.shared.get(tensor.name, tensor.name) + INPUT + COUNT)
    return [int(expert) for expert in np.flatnonzero(counts <= 0)]


def _describe_unseen(experts: list[int]) -> str:
    if not experts:
        return ""
    named = ", ".join(map(str, experts[:_NAMED])) + (", ..." if len(experts) > _NAMED else "")
    return f", but no token was routed to {len(experts)} of its experts, which keep the plain kernel: {named}"


def _check_side(tensor: Tensor, name: str, side: int, statistics: Statistics, n_matrix: int | None = None) -> None:
    expected = tensor.n_matrix if n_matrix is None else n_matrix
    if statistics.entries[name].shape != (expected, side * (side + 1) // 2):
        raise RecipeError(
            f"{statistics.path}: {name} does not have the size of {tensor.name} {list(tensor.shape)}; the statistics "
            "are those of another model"
        )


def _vocabulary_encoder(
    tensor: Tensor, is_tied: bool, statistics: Statistics, options: Rounding
) -> VocabularyEncoder | None:
    head = statistics.head()
    if head is None or len(head.row_group) != tensor.n_rows:
        return None
    n_hessian, by_head = head.n_group, tensor.role is Role.HEAD or is_tied
    if by_head:
        _check_side(tensor, HEAD_HESSIANS, tensor.n_cols, statistics, n_hessian)
    if head.embed_output is not None:
        _check_side(tensor, EMBED_OUTPUT, tensor.n_cols, statistics)
    if not by_head:
        if head.embed_output is None:
            return None
        return VocabularyEncoder(
            statistics, options, np.zeros(tensor.n_rows, np.int32), np.eye(1, n_hessian + 1, n_hessian)
        )
    # groups with neighbouring numbers have similar frequencies
    n_group = min(n_hessian, max(1, HEAD_CACHE_BYTES // factored_bytes(tensor.n_cols)))
    joined = np.arange(n_hessian) * n_group // n_hessian
    counts = np.bincount(head.row_group, minlength=n_hessian)
    groups = joined[head.row_group].astype(np.int32)
    sizes = np.maximum(np.bincount(groups, minlength=n_group), 1)
    weights = np.zeros((n_group, n_hessian + 1))
    weights[joined, np.arange(n_hessian)] = counts / sizes[joined]
    if is_tied and head.embed_output is not None:
        weights[:, -1] = np.bincount(groups, weights=head.frequency, minlength=n_group) / sizes
    return VocabularyEncoder(statistics, options, groups, weights)


def _file_of(statistics: Statistics) -> Hashable:
    """Tells a statistics file from another one at the same path."""
    try:
        stat = statistics.path.stat()
    except OSError as error:
        raise RecipeError(f"{statistics.path}: cannot be read: {error.strerror}") from error
    return str(statistics.path), stat.st_size, stat.st_mtime_ns, statistics.model_sha256


def _read(side: _Side, name: str, expert: int | None) -> F64Array:
    """The matrix in f64; no other copy of it stays in memory."""
    matrix = side(name, expert)
    if matrix is None:
        raise RecipeError(f"{name}: the statistics name its matrix but do not hold it; make the statistics again")
    return matrix.astype(np.float64)


def _factor(hessian: F64Array, name: str, options: Rounding) -> FactoredHessian:
    try:
        return factor_hessian(hessian, options.damping)
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from error

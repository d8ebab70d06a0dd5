"""The Hessians X^T X of inputs, summed while llama.cpp computes, and the rounding errors of the inputs.

Sums are f32. The product of a window is one BLAS call that exploits its symmetry, and adding a few hundred windows in
f32 costs less than one part in 10^5. Each group of the output head sums h h^T times its part of sum p (1 - p); softmax
is computed row by row for it, so that no probabilities are kept.

Every sum knows the number of tokens that it holds, and an interrupt never leaves it between two of them. So the sums of
an interrupted window can be kept: when that window is run again, each sum takes only the tokens that it lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numba
import numpy as np
import numpy.typing as npt

from pocketquant.errors import EvalError, listing
from pocketquant.files.interrupts import signals_held
from pocketquant.formats import F32Array
from pocketquant.formats.activations import add_rounding_errors
from pocketquant.llama.observing import Matmul, not_finite

MAX_GROUPS = 32
_UNSEEN_GROUPS = 4


@dataclass(frozen=True)
class MatrixRange:
    """The matrices [first, stop) of one input: the one of a plain weight, or those of some experts or head groups."""

    key: str
    k: int
    first: int
    stop: int

    @property
    def sum_bytes(self) -> int:
        return 4 * self.k**2 * (self.stop - self.first)


@dataclass
class HessianSums:
    """Sums X^T X for the matrices of one pass.

    Attributes:
        ranges: weight whose inputs are summed -> the range of its matrices.
        last_layer: the last layer that is wanted; None if the head is wanted.
        sums: weight -> f32[n, k, k].
        counts: weight -> i64[n], the rows summed.
        rounding: weight -> f64[n, 2, k], squared errors of the kernels' rounding of the inputs (`activations`).
        tokens: weight -> i64[1], the tokens whose inputs were summed, whichever experts they were routed to.
        head: the sums of the head; None if the pass has none.
        is_between: whether no sum is being changed at the moment; it stays False after a change has failed.
    """

    ranges: Mapping[str, MatrixRange]
    last_layer: int | None
    head: HeadSums | None = None
    sums: dict[str, F32Array] = field(default_factory=dict)
    counts: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    rounding: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    tokens: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    is_between: bool = True
    _seen: dict[str, int] = field(default_factory=dict)  # weight -> tokens of the text that were seen, summed or not
    _product: F32Array = field(default_factory=lambda: np.empty(0, np.float32))

    def __post_init__(self) -> None:
        for key, range_ in self.ranges.items():
            self.sums.setdefault(key, np.zeros((range_.stop - range_.first, range_.k, range_.k), np.float32))
            self.counts.setdefault(key, np.zeros(range_.stop - range_.first, np.int64))
            self.rounding.setdefault(key, np.zeros((range_.stop - range_.first, 2, range_.k)))
            self.tokens.setdefault(key, np.zeros(1, np.int64))

    def begin_at(self, token: int) -> None:
        """Says which token of the text comes next; a sum that holds it already does not take it again."""
        self._seen = dict.fromkeys(self.ranges, token)
        if self.head is not None:
            self.head.seen = token

    def count_tokens(self) -> dict[str, int]:
        """The tokens in each sum, by the name of the weight; the parts of the head are called "output"."""
        found = {key: int(count[0]) for key, count in self.tokens.items()}
        if self.head is not None:
            found |= {f"output, part {i}": int(count) for i, count in enumerate(self.head.tokens, start=1)}
        return found

    def check_tokens(self, expected: int) -> None:
        """Refuses sums that a token is missing from.

        Raises:
            EvalError: a weight, or a part of the head, saw another number of tokens than were run (all listed).
        """
        faults = [f"{key}: {count}" for key, count in self.count_tokens().items() if count != expected]
        if faults:
            raise EvalError(
                f"not every weight has seen all {expected} tokens; the installed llama-cpp-python computes otherwise "
                f"than the one that pocketquant asks for:\n{listing(faults)}"
            )

    def free_room(self) -> None:
        """Frees the memory of a matrix product, when no more will come."""
        self._product = np.empty(0, np.float32)

    def wants(self, weight: str) -> bool:
        return weight in self.ranges

    def is_past(self, weight: str) -> bool:
        layer = weight.split(".")[1] if weight.startswith("blk.") else ""
        return self.last_layer is not None and layer.isdigit() and int(layer) > self.last_layer

    def wants_hidden(self) -> bool:
        return self.head is not None

    def add_hidden(self, hidden: F32Array) -> None:
        assert self.head is not None
        self.head.hidden = hidden.copy()

    def add(self, matmul: Matmul) -> None:
        range_, inputs = self.ranges[matmul.weight], matmul.inputs
        if inputs.shape[3] != range_.k:
            raise EvalError(f"{matmul.weight}: {inputs.shape[3]} inputs, expected {range_.k}")
        n_rows = inputs.shape[0] * inputs.shape[1] * inputs.shape[2]
        n_token = n_rows if matmul.chosen is None else len(matmul.chosen)
        seen = self._seen.get(matmul.weight, 0) + n_token
        self._seen[matmul.weight] = seen
        if self.tokens[matmul.weight][0] >= seen:
            return
        self.is_between = False
        if matmul.chosen is None:
            if matmul.inner != (1, 1):
                raise EvalError(f"{matmul.weight}: is of {matmul.inner} matrices, but its rows are not routed")
            self._add(matmul.weight, inputs.reshape(-1, range_.k), 0)
            self.counts[matmul.weight][0] += n_rows
        else:
            for expert in range(range_.first, range_.stop):
                tokens, places = np.nonzero(matmul.chosen == expert)
                if len(tokens):
                    self._add(matmul.weight, inputs[0, tokens, places % inputs.shape[2]], expert - range_.first)
                    self.counts[matmul.weight][expert - range_.first] += len(tokens)
        self.tokens[matmul.weight] += n_token
        self.is_between = True

    def _add(self, name: str, rows: F32Array, index: int) -> None:
        k = rows.shape[1]
        if self._product.size < k * k:
            self._product = np.empty(k * k, np.float32)
        product = self._product[: k * k].reshape(k, k)
        rows = np.ascontiguousarray(rows)
        np.matmul(rows.T, rows, out=product)  # numpy recognizes that the result is symmetric
        if not np.isfinite(np.trace(product)):
            raise not_finite(name)
        self.sums[name][index] += product
        add_rounding_errors(rows, self.rounding[name][index])


@dataclass
class HeadSums:
    """Sums of w_g h h^T over the text, for the groups g of one pass; w_g is the sum of p (1 - p) over the rows of g.

    Attributes:
        row_group: i32[n_vocab].
        range: the groups.
        sums: f32[n, k, k].
        variance: f64[n_vocab], the sum of p (1 - p).
        rounding: f64[2, k], squared errors of the kernels' rounding of the hidden states (`activations`).
        tokens: i64[2 + n], positions summed in `variance`, in `rounding`, and in each of `sums`.
        seen: the positions of the text that were seen, summed or not.
        hidden: f32[n_token, k] of the logits that come next.
    """

    row_group: npt.NDArray[np.int32]
    range: MatrixRange
    sums: F32Array
    variance: npt.NDArray[np.float64]
    rounding: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    seen: int = 0
    hidden: F32Array | None = None

    def add_logits(self, logits: F32Array) -> None:
        """Takes the logits f32[n_token, n_vocab] of the hidden states that came last."""
        hidden, self.hidden = self.hidden, None
        if hidden is None or len(hidden) != len(logits):
            raise EvalError("llama.cpp shows no hidden states to its logits, so the head's statistics cannot be made")
        if not (np.isfinite(hidden).all() and np.isfinite(logits).all()):
            raise not_finite("output")
        self.seen += len(logits)
        is_missing = self.tokens < self.seen
        if not is_missing.any():
            return
        weights = np.zeros((len(logits), int(self.row_group.max()) + 1))
        with signals_held():
            variance = self.variance if is_missing[0] else np.zeros_like(self.variance)
            _accumulate_softmax(logits, self.row_group, weights, variance)
            self.tokens[0] += len(logits) * is_missing[0]
        if is_missing[1]:
            with signals_held():
                add_rounding_errors(hidden, self.rounding)
                self.tokens[1] += len(logits)
        for i in np.flatnonzero(is_missing[2:]):
            rows = hidden * np.sqrt(weights[:, self.range.first + i, None]).astype(np.float32)
            product = rows.T @ rows
            with signals_held():
                self.sums[i] += product
                self.tokens[2 + i] += len(logits)


@numba.njit(nogil=True, cache=True)
def _accumulate_softmax(
    logits: F32Array,
    row_group: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float64],
    variance: npt.NDArray[np.float64],
) -> None:
    # weights f64[n_token, n_group] and variance f64[n_vocab] get the sums of p (1 - p)
    exps = np.empty(logits.shape[1], np.float64)
    for token in range(logits.shape[0]):
        row = logits[token]
        highest = row.max()
        total = 0.0
        for v in range(len(row)):
            exps[v] = np.exp(np.float64(row[v] - highest))
            total += exps[v]
        for v in range(len(row)):
            p = exps[v] / total
            weights[token, row_group[v]] += p * (1.0 - p)
            variance[v] += p * (1.0 - p)


def group_rows(counts: npt.NDArray[np.int64], n_group: int = MAX_GROUPS) -> npt.NDArray[np.int32]:
    """Groups the vocabulary's rows by their frequency in the text: counts i64[n_vocab] -> groups i32[n_vocab].

    The rows of tokens in the text are sorted by frequency and cut into groups with equal sums of the square roots of
    their counts, so that frequent tokens share a group with few others. The other rows are cut by their number, which
    follows the frequency in the text that the tokenizer was trained on.
    """
    order = np.lexsort((np.arange(len(counts)), -counts))
    n_seen = int((counts > 0).sum())
    n_unseen_groups = min(_UNSEEN_GROUPS, n_group - 1, len(counts) - n_seen) if n_seen else n_group
    mass = np.cumsum(np.sqrt(counts[order[:n_seen]]))
    groups = np.zeros(len(counts), np.int64)
    if n_seen:
        groups[:n_seen] = np.minimum(mass / mass[-1] * (n_group - n_unseen_groups), n_group - n_unseen_groups - 1)
    n_unseen = len(counts) - n_seen
    groups[n_seen:] = n_group - n_unseen_groups + np.arange(n_unseen) * n_unseen_groups // max(n_unseen, 1)
    row_group = np.empty(len(counts), np.int32)
    row_group[order] = np.unique(groups, return_inverse=True)[1]  # without gaps
    return row_group

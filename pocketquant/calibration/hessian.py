"""Second moments of inputs: X^T X of every weight wanted, summed while llama.cpp computes; and how rounding errs.

Sums are f32: a window's product is one BLAS call that knows it is symmetric, and a few hundred windows added in f32
cost less than one part in 10^5. A head's groups each take h h^T times their part of sum p (1 - p), for which softmax is
folded row by row, so that no probabilities are kept.

Every sum knows how many tokens it holds, and is never left between two of them by an interrupt. So what an interrupt
finds in the middle of a window can be kept: run over that window again, each sum takes only what it does not have.
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
    """Matrices [first, stop) of one input: all one of a plain weight, or some experts', or some groups of the head."""

    key: str
    k: int
    first: int
    stop: int

    @property
    def sum_bytes(self) -> int:
        return 4 * self.k**2 * (self.stop - self.first)


@dataclass
class HessianSums:
    """Adds X^T X up for the shares of one pass.

    Attributes:
        shares: weight whose inputs are summed -> which of its matrices.
        last_layer: nothing of later layers is wanted; None if the head is.
        sums: weight -> f32[n, k, k].
        counts: weight -> i64[n] rows summed.
        rounding: weight -> f64[n, 2, k], squared errors of the kernels' rounding (`activations`).
        tokens: weight -> i64[1], tokens whose inputs were summed; of experts, whichever they were sent to.
        head: the pass's part of the head, None if it has none.
        is_between: whether no sum is being added to; False for good once adding to one has failed.
    """

    shares: Mapping[str, MatrixRange]
    last_layer: int | None
    head: HeadSums | None = None
    sums: dict[str, F32Array] = field(default_factory=dict)
    counts: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    rounding: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    tokens: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    is_between: bool = True
    _seen: dict[str, int] = field(default_factory=dict)  # weight -> tokens of the text that came by, summed or not
    _product: F32Array = field(default_factory=lambda: np.empty(0, np.float32))

    def __post_init__(self) -> None:
        for key, share in self.shares.items():
            self.sums.setdefault(key, np.zeros((share.stop - share.first, share.k, share.k), np.float32))
            self.counts.setdefault(key, np.zeros(share.stop - share.first, np.int64))
            self.rounding.setdefault(key, np.zeros((share.stop - share.first, 2, share.k)))
            self.tokens.setdefault(key, np.zeros(1, np.int64))

    def begin_at(self, token: int) -> None:
        """Says which token of the text comes next; a sum that has it already does not take it again."""
        self._seen = dict.fromkeys(self.shares, token)
        if self.head is not None:
            self.head.seen = token

    def count_tokens(self) -> dict[str, int]:
        """Tokens in each sum, by the weight's name; the head's parts are called "output"."""
        found = {key: int(count[0]) for key, count in self.tokens.items()}
        if self.head is not None:
            found |= {f"output, part {i}": int(count) for i, count in enumerate(self.head.tokens, start=1)}
        return found

    def check_tokens(self, expected: int) -> None:
        """Refuses sums that some token is missing from.

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
        """Gives the room for a product back; none will come."""
        self._product = np.empty(0, np.float32)

    def wants(self, weight: str) -> bool:
        return weight in self.shares

    def is_past(self, weight: str) -> bool:
        layer = weight.split(".")[1] if weight.startswith("blk.") else ""
        return self.last_layer is not None and layer.isdigit() and int(layer) > self.last_layer

    def wants_hidden(self) -> bool:
        return self.head is not None

    def add_hidden(self, hidden: F32Array) -> None:
        assert self.head is not None
        self.head.hidden = hidden.copy()

    def add(self, product: Matmul) -> None:
        share, inputs = self.shares[product.weight], product.inputs
        if inputs.shape[3] != share.k:
            raise EvalError(f"{product.weight}: {inputs.shape[3]} inputs, expected {share.k}")
        n_rows = inputs.shape[0] * inputs.shape[1] * inputs.shape[2]
        n_token = n_rows if product.chosen is None else len(product.chosen)
        seen = self._seen.get(product.weight, 0) + n_token
        self._seen[product.weight] = seen
        if self.tokens[product.weight][0] >= seen:
            return
        self.is_between = False
        if product.chosen is None:
            if product.inner != (1, 1):
                raise EvalError(f"{product.weight}: is of {product.inner} matrices, but its rows are not routed")
            self._add(product.weight, inputs.reshape(-1, share.k), 0)
            self.counts[product.weight][0] += n_rows
        else:
            for expert in range(share.first, share.stop):
                tokens, places = np.nonzero(product.chosen == expert)
                if len(tokens):
                    self._add(product.weight, inputs[0, tokens, places % inputs.shape[2]], expert - share.first)
                    self.counts[product.weight][expert - share.first] += len(tokens)
        self.tokens[product.weight] += n_token
        self.is_between = True

    def _add(self, name: str, rows: F32Array, index: int) -> None:
        k = rows.shape[1]
        if self._product.size < k * k:
            self._product = np.empty(k * k, np.float32)
        product = self._product[: k * k].reshape(k, k)
        rows = np.ascontiguousarray(rows)
        np.matmul(rows.T, rows, out=product)  # numpy sees that it is symmetric
        if not np.isfinite(np.trace(product)):
            raise not_finite(name)
        self.sums[name][index] += product
        add_rounding_errors(rows, self.rounding[name][index])


@dataclass
class HeadSums:
    """Sums over the text of w_g h h^T for the groups of one pass, w_g the sum of p (1 - p) over the rows of group g.

    Attributes:
        row_group: i32[n_vocab].
        share: which groups.
        sums: f32[n, k, k].
        variance: f64[n_vocab], the sum of p (1 - p).
        rounding: f64[2, k], squared errors of the kernels' rounding of the hidden states (`activations`).
        tokens: i64[2 + n], positions summed in `variance`, in `rounding`, and in each of `sums`.
        seen: positions of the text that came by, summed or not.
        hidden: f32[n_token, k] of the logits that come next.
    """

    row_group: npt.NDArray[np.int32]
    share: MatrixRange
    sums: F32Array
    variance: npt.NDArray[np.float64]
    rounding: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    seen: int = 0
    hidden: F32Array | None = None

    def add_logits(self, logits: F32Array) -> None:
        """Takes the logits f32[n_token, n_vocab] of the hidden states seen last."""
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
            rows = hidden * np.sqrt(weights[:, self.share.first + i, None]).astype(np.float32)
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
    """Groups of vocabulary rows by how often the text has them: i64[n_vocab] -> i32[n_vocab].

    Rows of tokens in the text are sorted by frequency and cut where the sum of the square roots of the counts is cut in
    equal parts, so that frequent tokens have few companions; the rest is cut by number, which is by frequency in the
    text that the tokenizer was made from.
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

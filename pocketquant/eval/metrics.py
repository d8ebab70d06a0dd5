"""Turns logits into a record per scored position, with its KL divergence; nothing else passes over tokens x vocabulary.

Two rows of logits and the token that came next become a `POSITION`: the divergence, both losses, and whether the most
likely token is the same. Every number of a report is a statistic of these records. A new statistic of them needs no
change here; a new number per position is one more field and a few lines in `_score_row`.

With r and m the log-probabilities of reference and model, KL(reference || model) = sum exp(r) (r - m), and the total
variation is half the sum of |exp(r) - exp(m)|. All sums and exponentials are f64: with f32 the two normalizers alone
leave a noise of 1e-7, and the divergence of nearly equal rows becomes negative. Only the probabilities that the total
variation is summed from are kept as f32 between two loops, which leaves a noise of 3e-8 in it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from itertools import pairwise
from typing import Any, Protocol

import numba
import numpy as np
import numpy.typing as npt
from numba.core import types
from numba.extending import intrinsic

from pocketquant.formats import F32Array

POSITION = np.dtype(
    [
        ("kld_nats", "f8"),
        ("nll_model_nats", "f8"),
        ("nll_reference_nats", "f8"),
        ("variation", "f8"),
        ("top_reference", "f8"),
        ("n_above_top", "i4"),
        ("n_bytes", "i4"),
        ("is_same_top", "?"),
        ("is_finite_model", "?"),
        ("is_finite_reference", "?"),
    ]
)
"""One scored position. Where one of the two rows is not finite, the other fields are zero and mean nothing.

`variation` is the total variation, `top_reference` the probability of the reference's most likely token, `n_above_top`
the number of tokens that the model holds more likely than that one. `n_bytes`, the length of the right token's text, is
not known here; the caller, who knows the vocabulary, fills it in.
"""

Positions = npt.NDArray[np.void]


class Scorer(Protocol):
    """Turns pairs of rows into records; `score_rows` is one."""

    def __call__(
        self,
        model: F32Array,
        reference: F32Array,
        tokens: npt.NDArray[np.int32],
        *,
        workers: Executor | None = None,
        n_workers: int = 1,
    ) -> Positions: ...


_EXPONENT = np.uint32(0x7F800000)
_LOG2_E = 1.4426950408889634
_LN2 = 0.6931471805599453
_SHIFT = 2.0**52 + 1023.0
_LOWEST = -708.0
"""exp(-708) is the smallest before subnormal numbers; a probability of 1e-308 adds nothing."""


@intrinsic
def _bits(typing_context: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """The bits of an f64 as i64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.int64))

    return types.int64(types.float64), generate


@intrinsic
def _from_bits(typing_context: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """The f64 with these bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float64))

    return types.float64(types.int64), generate


@numba.njit(inline="always")
def _exp(x: float) -> float:
    """exp(x) for x <= 0 to a relative 1e-12, without branches or calls, so that the loops around it become SIMD."""
    x = max(x, _LOWEST)
    power = np.floor(x * _LOG2_E + 0.5)
    r = x - power * _LN2
    # Taylor's series of exp to r^10; |r| <= ln(2) / 2
    series = 1 / 3628800
    series = series * r + 1 / 362880
    series = series * r + 1 / 40320
    series = series * r + 1 / 5040
    series = series * r + 1 / 720
    series = series * r + 1 / 120
    series = series * r + 1 / 24
    series = series * r + 1 / 6
    series = series * r + 1 / 2
    series = series * r + 1.0
    series = series * r + 1.0
    # adding 2^52 leaves power + 1023, the exponent's bits, in the lowest bits
    return series * _from_bits(_bits(power + _SHIFT) << 52)


@numba.njit(nogil=True, cache=True)
def _is_finite(row: F32Array) -> bool:
    exponents = row.view(np.uint32)
    found = np.uint32(0)
    for i in range(exponents.size):
        found |= np.uint32((exponents[i] & _EXPONENT) == _EXPONENT)
    return found == 0


@numba.njit(nogil=True, cache=True, fastmath=True)
def _largest(row: F32Array) -> tuple[np.float32, int]:
    """The largest value of a finite row and the first place where it stands."""
    largest = row[0]
    for i in range(row.size):
        largest = max(largest, row[i])
    place = 0
    while row[place] != largest:
        place += 1
    return largest, place


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def _sum_row(
    model: F32Array, reference: F32Array, model_max: float, reference_max: float, shares: F32Array
) -> tuple[float, float, float]:
    """Both normalizers and the sum of probability x difference; `shares` f32[2, n_vocab] gets exp of both rows."""
    model_sum = 0.0
    reference_sum = 0.0
    difference = 0.0
    for i in range(model.size):
        m = np.float64(model[i]) - model_max
        r = np.float64(reference[i]) - reference_max
        model_share = _exp(m)
        share = _exp(r)
        shares[0, i] = np.float32(model_share)
        shares[1, i] = np.float32(share)
        model_sum += model_share
        reference_sum += share
        difference += share * (r - m)
    return model_sum, reference_sum, difference


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def _variation(shares: F32Array, model_sum: float, reference_sum: float) -> float:
    model_scale, reference_scale = 1 / model_sum, 1 / reference_sum
    total = 0.0
    for i in range(shares.shape[1]):
        total += abs(np.float64(shares[0, i]) * model_scale - np.float64(shares[1, i]) * reference_scale)
    return total / 2


@numba.njit(nogil=True, cache=True)
def _count_above(row: F32Array, limit: np.float32) -> int:
    count = 0
    for i in range(row.size):
        count += row[i] > limit
    return count


@numba.njit(nogil=True, cache=True)
def _score_row(model: F32Array, reference: F32Array, token: int, shares: F32Array, out: Any) -> None:
    """Fills the record of one pair of finite rows."""
    model_top, model_place = _largest(model)
    reference_top, reference_place = _largest(reference)
    model_max, reference_max = np.float64(model_top), np.float64(reference_top)
    model_sum, reference_sum, difference = _sum_row(model, reference, model_max, reference_max, shares)
    log_model, log_reference = np.log(model_sum), np.log(reference_sum)
    out.kld_nats = difference / reference_sum + (log_model - log_reference)
    out.nll_model_nats = log_model - (np.float64(model[token]) - model_max)
    out.nll_reference_nats = log_reference - (np.float64(reference[token]) - reference_max)
    out.variation = _variation(shares, model_sum, reference_sum)
    out.top_reference = 1 / reference_sum
    out.n_above_top = _count_above(model, model[reference_place])
    out.is_same_top = model_place == reference_place


@numba.njit(nogil=True, cache=True)
def _score_rows(model: F32Array, reference: F32Array, tokens: npt.NDArray[np.int32], out: Positions) -> None:
    shares = np.empty((2, model.shape[1]), np.float32)
    for i in range(tokens.size):
        out[i].is_finite_model = _is_finite(model[i])
        out[i].is_finite_reference = _is_finite(reference[i])
        if out[i].is_finite_model and out[i].is_finite_reference:
            _score_row(model[i], reference[i], tokens[i], shares, out[i])


def score_rows(
    model: F32Array,
    reference: F32Array,
    tokens: npt.NDArray[np.int32],
    *,
    workers: Executor | None = None,
    n_workers: int = 1,
) -> Positions:
    """Scores pairs of rows of logits.

    Args:
        model: f32[n, n_vocab], C-contiguous.
        reference: f32[n, n_vocab], C-contiguous.
        tokens: i32[n], the token that came next at each position.
        workers: runs `n_workers` shares of the rows side by side; the numbers do not depend on it.
        n_workers: shares to cut the rows into.

    Returns:
        `POSITION`[n].

    Raises:
        ValueError: the shapes differ, or a token is not in the vocabulary.
    """
    if model.shape != reference.shape or tokens.shape != model.shape[:1]:
        raise ValueError(f"shapes differ: model {model.shape}, reference {reference.shape}, tokens {tokens.shape}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < model.shape[1]:
        raise ValueError(f"a token lies outside the vocabulary of {model.shape[1]}")
    out = np.zeros(len(tokens), POSITION)
    if workers is None or n_workers == 1:
        _score_rows(model, reference, tokens, out)
        return out
    cuts = np.linspace(0, len(tokens), n_workers + 1).astype(int)
    shares = [slice(start, stop) for start, stop in pairwise(cuts.tolist()) if stop > start]
    list(workers.map(lambda share: _score_rows(model[share], reference[share], tokens[share], out[share]), shares))
    return out

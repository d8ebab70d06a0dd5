"""The search for a block's scale: sixteen candidates side by side in the SIMD lanes, none of them in a branch.

A candidate fixes the codes of all 32 weights; its best scale (and minimum) then follows by weighted least squares, is
rounded to half precision, and its squared error follows from a few sums. So each round needs one pass over the block
and no second look at the error. A coarse round spans clipping and both signs, a fine one looks around its winner;
`closer_search` looks again at the rare blocks for which that is too little.

Source: least squares for fixed codes is the textbook normal equation; llama.cpp's make_qx_quants and make_qkx3_quants
(ggml/src/ggml-quants.c, b10359) walk a narrower line of candidates one at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pocketquant.formats import F32Array
from pocketquant.formats.half import F16_MAX
from pocketquant.formats.kernel import jit
from pocketquant.formats.lanes import (
    first_equal,
    highest,
    lane,
    largest,
    load,
    lowest,
    rounded,
    smallest,
    splat,
    store,
    total,
    where_less,
)

BLOCK_LEN = 32
F = np.float32

# Candidates in literals, so that no machine's `pow` can change a byte. Symmetric: the scale's sign, and how far the
# levels fall short of the block's extremes (coarse) or of the winner's (fine). Affine: the levels cut off at either end
# of the block's span, then how much the winner's levels are squeezed about the mean and how many codes they slide.
_BOTH_SIGNS = np.array([1] * 8 + [-1] * 8, dtype=np.float32)
COARSE_4 = np.array([0.97, 1.076, 1.193, 1.323, 1.467, 1.626, 1.804, 0.87] * 2, dtype=np.float32)
COARSE_5 = np.array(
    [0.97, 1.075, 1.192, 1.321, 1.464, 1.623, 1.799, 1.995] * 2
    + [1.021, 1.132, 1.255, 1.391, 1.542, 1.709, 1.894, 2.1] * 2,
    dtype=np.float32,
)
FINE_4 = (1 + np.arange(-8, 8) / 100).astype(np.float32)
FINE_5 = (1 + np.arange(-8, 8) / 160).astype(np.float32)
_LOW_CUT = np.array([-0.2, 0.5, 1.5, 4.0] * 4, dtype=np.float32)
_HIGH_CUT = _LOW_CUT.reshape(4, 4).T.ravel()
_LOW_CUT[15], _HIGH_CUT[15] = 0.0, -1.05  # one step less than the codes have: weights of two, three or eight levels
_SQUEEZE = np.array([0.96, 0.985, 1.01, 1.035] * 4 + [0.975, 0.99, 1.005, 1.02] * 4, dtype=np.float32)
_SLIDE = np.array([-0.3, -0.1, 0.1, 0.3, -0.2, -0.07, 0.07, 0.2], dtype=np.float32).repeat(4)


@jit
def _scaled_to_peak(importance: F32Array, block_len: int, weights: F32Array) -> None:
    for first in range(0, importance.size, block_len):
        peak = F(0.0)
        for j in range(first, first + block_len):
            peak = max(peak, importance[j])
        for j in range(first, first + block_len):
            weights[j] = importance[j] / peak if peak > 0.0 else F(1.0)


def block_weights(importance: F32Array | None, n_cols: int, block_len: int) -> F32Array:
    """Importance scaled to at most 1 in each block, f32[n_cols]; a block of zeros becomes a block of ones."""
    weights = np.ones(n_cols, dtype=np.float32)
    if importance is not None:
        _scaled_to_peak(np.ascontiguousarray(importance, dtype=np.float32), block_len, weights)
    return weights


@jit
def take_block(row: F32Array, at: int, length: int, x: F32Array) -> tuple[np.float32, bool]:
    """Copies `length` weights of a row to `x`, divided by a power of two.

    The power of two keeps sums of squares within f32 and changes no rounding.

    Returns:
        The power of two, 0 if every half would be 0; and whether all weights have one sign.
    """
    lows = highs = splat(0.0)
    for j in range(at, at + length, 16):
        v = load(row, j)
        lows, highs = lowest(lows, v), highest(highs, v)
    low, high = F(smallest(lows)), F(largest(highs))
    exponent = min(F(max(high, -low)).view(np.uint32) >> np.uint32(23) & np.uint32(255), np.uint32(253))
    if exponent < 100:
        return F(0.0), False
    shrink = np.uint32((np.uint32(254) - exponent) << np.uint32(23)).view(np.float32)
    for j in range(at, at + length, 16):
        store(x, j, load(row, j) * shrink)
    return np.uint32(exponent << np.uint32(23)).view(np.float32), low == 0.0 or high == 0.0


@jit
def in_half(value: Any, unit: np.float32) -> Any:
    """Lanes times `unit` rounded to half precision, in units again."""
    real = highest(lowest(value * unit, F16_MAX), -F16_MAX)
    split = real * 8193.0  # Veltkamp: 2^13 + 1 leaves the upper 11 bits
    normal = split - (split - real)
    subnormal = (real + 0.75) - 0.75  # 0.75 has the ulp of half's subnormals
    size = highest(real, 0.0 - real)
    return where_less(size, splat(2.0**-14), subnormal, normal) * (F(1.0) / unit)


@jit
def pick_half(sum_qx: Any, sum_qq: Any, unit: np.float32) -> tuple[np.float32, np.float32]:
    """The least-squares scale, as a half, of the lane that it suits best, and the squared error that it saves."""
    scale = in_half(sum_qx / highest(sum_qq, 1e-30), unit)
    loss = scale * (scale * sum_qq - sum_qx - sum_qx)
    least = smallest(loss)
    return lane(scale, first_equal(loss, least)), -least


@jit
def reach_of_signs(x: F32Array, at: int, top: float | np.float32, bottom: float) -> Any:
    """For each sign of the scale, the one that just reaches the block's extremes with levels from -bottom to top."""
    a = load(x, at)
    b = load(x, at + 16)
    low = -smallest(lowest(a, b))
    high = largest(highest(a, b))
    upright = max(high / F(top), low / F(bottom))
    upside_down = max(low / F(top), high / F(bottom))
    return where_less(load(_BOTH_SIGNS, 0), splat(0.0), splat(-upside_down), splat(upright))


@jit
def symmetric_sums(x: F32Array, w: F32Array, at: int, inverse: Any, half: float) -> Any:
    """Sums of w q x and w q q over a block, for codes q from -half to half - 1 at sixteen inverse scales."""
    sum_qx = splat(0.0)
    sum_qq = splat(0.0)
    bottom = splat(-half)
    top = splat(half - F(1.0))
    for j in range(BLOCK_LEN):
        q = lowest(highest(rounded(inverse * x[at + j]), bottom), top)
        wq = q * w[at + j]
        sum_qx += wq * x[at + j]
        sum_qq += wq * q
    return sum_qx, sum_qq


@jit
def coarse_symmetric(x: F32Array, w: F32Array, at: int, half: float, shortfalls: F32Array) -> np.float32:
    """A scale near a block's best, of either sign; 0 if none is better than no scale."""
    reach = reach_of_signs(x, at, half - F(1.0), half)
    best_scale = splat(0.0)
    best_gain = splat(0.0)
    for i in range(0, shortfalls.size, 16):
        sum_qx, sum_qq = symmetric_sums(x, w, at, load(shortfalls, i) / reach, half)
        scale = sum_qx / highest(sum_qq, 1e-30)
        gain = scale * sum_qx
        best_scale = where_less(best_gain, gain, scale, best_scale)
        best_gain = highest(gain, best_gain)
    return lane(best_scale, first_equal(best_gain, largest(best_gain)))


@jit
def fine_symmetric(
    x: F32Array, w: F32Array, at: int, half: float, shortfalls: F32Array, scale: np.float32, unit: np.float32
) -> tuple[np.float32, np.float32]:
    """The best scale around `scale`, a half, in units of `unit`, and the squared error that it saves."""
    sum_qx, sum_qq = symmetric_sums(x, w, at, load(shortfalls, 0) / scale, half)
    return pick_half(sum_qx, sum_qq, unit)


@jit
def try_affine(
    x: F32Array,
    w: F32Array,
    at: int,
    mean: np.float32,
    weight: np.float32,
    inverse: Any,
    offset: Any,
    top: float,
    unit: np.float32,
) -> Any:
    """Best scale and minimum among sixteen, both halves, for codes round(x * inverse + offset) from 0 to `top`.

    Returns (scale, minimum, saved squared error) where `mean` and `weight` are the block's weighted mean and weight.
    """
    zero = splat(0.0)
    sum_q = splat(0.0)
    sum_qq = splat(0.0)
    sum_qv = splat(0.0)
    ceiling = splat(top)
    for j in range(BLOCK_LEN):
        q = lowest(highest(rounded(inverse * x[at + j] + offset), zero), ceiling)
        wq = q * w[at + j]
        sum_q += wq
        sum_qq += wq * q
        sum_qv += wq * (x[at + j] - mean)
    spread = sum_qq - sum_q * sum_q / weight
    slope = where_less(splat(1e-30), spread, sum_qv / spread, zero)
    minimum = in_half(mean - slope * sum_q / weight, unit)
    rest = minimum - mean
    scale = in_half(where_less(splat(1e-30), sum_qq, (sum_qv - rest * sum_q) / sum_qq, zero), unit)
    loss = rest * rest * weight + scale * (scale * sum_qq + 2.0 * (rest * sum_q - sum_qv))
    least = smallest(loss)
    k = first_equal(loss, least)
    return lane(scale, k), lane(minimum, k), -least


@jit
def fit_affine(
    x: F32Array, w: F32Array, at: int, top: float, unit: np.float32
) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """The best (scale, minimum) found for a block, halves in units of `unit`.

    Returns:
        Scale, minimum, the squared error that they save, counted from the block's weighted mean, and that mean.
    """
    a = load(x, at)
    b = load(x, at + 16)
    low = smallest(lowest(a, b))
    span = largest(highest(a, b)) - low
    if span <= 0.0:
        return F(0.0), lane(in_half(splat(low), unit), 0), F(0.0), low
    weight = total(load(w, at) + load(w, at + 16))
    mean = total(load(w, at) * a + load(w, at + 16) * b) / weight
    level = span / F(top)
    start = load(_LOW_CUT, 0) * level + low
    inverse = F(top) / (span - (load(_LOW_CUT, 0) + load(_HIGH_CUT, 0)) * level)
    # No scale and no minimum: all that remains where even the smallest halves are too coarse
    scale, minimum, gain = F(0.0), F(0.0), F(-mean * mean * weight)
    tried, base, saved = try_affine(x, w, at, mean, weight, inverse, 0.0 - start * inverse, top, unit)
    if saved > gain:
        scale, minimum, gain = tried, base, saved
    for i in range(0, _SQUEEZE.size, 16):
        if scale > 0.0:
            inverse = load(_SQUEEZE, i) / scale
            middle = (mean - minimum) / scale
            offset = load(_SLIDE, i) + middle - inverse * mean
            tried, base, saved = try_affine(x, w, at, mean, weight, inverse, offset, top, unit)
            if saved > gain:
                scale, minimum, gain = tried, base, saved
    return scale, minimum, gain, mean

"""The second, closer search for the blocks of 32 weights where sixteen candidates around the best may miss it.

Such blocks are rare in trained weights: the codes fit them almost exactly (few distinct values, or importance on few
columns), so that the rounding of the scale to a half decides, or all their weights have one sign, so that the error
swings up and down from one scale to the next. Here many more candidates compete, each measured with the codes that its
stored scale leads to, and then the neighbouring halves of the best one.

Source: the candidates include those of llama.cpp's make_qx_quants and make_qkx3_quants (ggml/src/ggml-quants.c,
b10359), whose scales are seven to ten per cent around the block's extreme.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pocketquant.formats import F32Array
from pocketquant.formats.half import f16_bits, f16_value
from pocketquant.formats.kernel import jit
from pocketquant.formats.lanes import (
    first_equal,
    highest,
    lane,
    load,
    lowest,
    rounded,
    smallest,
    splat,
    total,
    where_less,
)
from pocketquant.formats.scale_search import BLOCK_LEN, in_half

F = np.float32
_TINY = F(1e-36)  # scales below have no finite inverse
_NEIGHBOURS = np.arange(-8, 8, dtype=np.int32)
_SLOPE_STEP = np.repeat(np.arange(-2, 2), 4).astype(np.int32)
_MINIMUM_STEP = np.tile(np.arange(-2, 2), 4).astype(np.int32)


def candidates(levels: F32Array) -> F32Array:
    """What the weight of largest magnitude may become, f32[16 n]: each level, and numbers around either end."""
    near = np.array([86 + 1.5 * i for i in range(24)]) / 100
    far = np.array([125, 135, 145, 155, 170, 185, 200, 220]) / 100
    ends = [end * factor for end in (levels[0], levels[-1]) for factor in (near, far)]
    return np.concatenate([np.where(levels == 0, 0.5, levels), *ends]).astype(np.float32)


def line_candidates(top: int) -> F32Array:
    """Lines for `closer_line` in blocks of codes 0 to `top`, f32[m, 2, 16]."""
    whole = np.arange(top, top - 16, -1)
    whole = np.where(whole > 0, whole, 0.5)
    fractions = top - 0.9 + 0.05 * np.arange(32)
    pairs = [(whole, 0 * whole), (whole, top - whole), *((part, 0 * part) for part in np.split(fractions, 2))]
    for cuts in ([-0.25, 0.25, 0.5, 1.0], [0.0, 0.75, 1.5, 2.5]):  # levels cut off at the low and the high end
        low, high = np.repeat(cuts, 4), np.tile(cuts, 4)
        steps = top * top / (top - low - high)
        pairs.append((steps, -low * steps / top))
    return np.array(pairs, dtype=np.float32)


@jit
def nearest(y: Any, levels: F32Array, half: float) -> Any:
    """The levels nearest to sixteen numbers; integers from -half to half - 1 where `half` is not 0."""
    if half > 0.0:
        return lowest(highest(rounded(lowest(highest(y, -100.0), 100.0)), -half), half - F(1.0))
    q = splat(levels[0])
    for t in range(levels.size - 1):
        middle = splat((levels[t] + levels[t + 1]) * F(0.5))
        q += where_less(middle, y, splat(levels[t + 1] - levels[t]), splat(0.0))
    return q


@jit
def stored_loss(x: F32Array, w: F32Array, at: int, scale: Any, levels: F32Array, half: float) -> Any:
    """The error that each of sixteen scales leaves with the codes that it leads to."""
    loss = splat(0.0)
    inverse = where_less(splat(_TINY), highest(scale, 0.0 - scale), 1.0 / scale, splat(0.0))
    for j in range(at, at + BLOCK_LEN):
        miss = nearest(inverse * x[j], levels, half) * scale - x[j]
        loss += miss * miss * w[j]
    return loss


@jit
def closer_scale(
    x: F32Array,
    w: F32Array,
    at: int,
    levels: F32Array,
    half: float,
    table: F32Array,
    scale: np.float32,
    unit: np.float32,
) -> np.float32:
    """The best scale found, a half in units of `unit`; `scale` if none is better.

    Args:
        levels: the values of the codes, rising, f32[16 n].
        half: see `nearest`.
        table: `candidates(levels)`.
    """
    peak, heavy, heaviest = F(0.0), F(0.0), F(0.0)
    for j in range(at, at + BLOCK_LEN):
        if abs(x[j]) > abs(peak):
            peak = x[j]
        if x[j] * x[j] * w[j] > heaviest:
            heavy, heaviest = x[j], x[j] * x[j] * w[j]
    best_loss = lane(stored_loss(x, w, at, splat(scale), levels, half), 0)
    for i in range(0, table.size + levels.size, 16):
        # the levels come a second time, for the weight that counts most
        if i < table.size:
            inverse = load(table, i) / peak
        elif heavy != 0.0:
            inverse = load(table, i - table.size) / heavy
        else:
            break
        sum_qx, sum_qq = splat(0.0), splat(0.0)
        for j in range(at, at + BLOCK_LEN):
            q = nearest(inverse * x[j], levels, half)
            wq = q * w[j]
            sum_qx += wq * x[j]
            sum_qq += wq * q
        tried = in_half(sum_qx / highest(sum_qq, 1e-30), unit)
        loss = stored_loss(x, w, at, tried, levels, half)
        k = first_equal(loss, smallest(loss))
        if lane(loss, k) < best_loss:
            scale, best_loss = lane(tried, k), lane(loss, k)
    halves = halves_near(scale, unit)
    loss = stored_loss(x, w, at, load(halves, 0), levels, half)
    k = first_equal(loss, smallest(loss))
    return halves[k] if lane(loss, k) < best_loss else scale


@jit
def halves_near(scale: np.float32, unit: np.float32) -> F32Array:
    """Sixteen neighbouring halves around `scale`, which is one of them, in units of `unit`."""
    halves = np.empty(16, np.float32)
    middle = np.int32(f16_bits(scale * unit))
    for i in range(16):
        halves[i] = _half_near(middle, _NEIGHBOURS[i]) / unit
    return halves


@jit
def _half_near(bits: np.int32, step: np.int32) -> np.float32:
    """The half `step` places further from zero than that of `bits`, kept finite and of its sign."""
    magnitude = min(max((bits & np.int32(0x7FFF)) + step, np.int32(0)), np.int32(0x7BFF))
    return f16_value(np.uint16((bits & np.int32(0x8000)) | magnitude))


@jit
def _line_loss(x: F32Array, w: F32Array, at: int, scale: Any, minimum: Any, top: float) -> Any:
    """The error that each of sixteen pairs of scale and minimum leaves with the codes that they lead to."""
    loss = splat(0.0)
    inverse = where_less(splat(_TINY), highest(scale, 0.0 - scale), 1.0 / scale, splat(0.0))
    for j in range(at, at + BLOCK_LEN):
        code = lowest(highest((x[j] - minimum) * inverse, 0.0), top)
        miss = rounded(code) * scale + (minimum - x[j])
        loss += miss * miss * w[j]
    return loss


@jit
def _fit_line(
    x: F32Array, w: F32Array, at: int, origin: np.float32, inverse: Any, offset: Any, top: float, unit: np.float32
) -> Any:
    """Scales and minima, halves, that fit the codes clamp(round(x * inverse + offset)) best; `origin` is near them."""
    zero = splat(0.0)
    weight, sum_q, sum_qq, sum_v, sum_qv = zero, zero, zero, zero, zero
    # counted from the code of `origin`, so that one weight that rules the block leaves nothing to cancel
    base = rounded(lowest(highest(origin * inverse + offset, 0.0), top))
    for j in range(at, at + BLOCK_LEN):
        q = rounded(lowest(highest(inverse * x[j] + offset, 0.0), top)) - base
        v = splat(x[j] - origin)
        wq, wv = q * w[j], v * w[j]
        weight += w[j]
        sum_q += wq
        sum_qq += wq * q
        sum_v += wv
        sum_qv += wq * v
    spread = sum_qq - sum_q * sum_q / weight
    slope = where_less(highest(sum_qq * 1e-6, 1e-30), spread, (sum_qv - sum_q * sum_v / weight) / spread, zero)
    minimum = in_half((sum_v - slope * sum_q) / weight + origin - slope * base, unit)
    # the scale again, for the minimum that can be stored
    rest = minimum - origin
    full_qq = sum_qq + base * (sum_q + sum_q + base * weight)
    full_q = sum_q + base * weight
    scale = where_less(splat(1e-30), full_qq, (sum_qv + base * sum_v - rest * full_q) / full_qq, zero)
    return in_half(scale, unit), minimum


@jit
def closer_line(
    x: F32Array,
    w: F32Array,
    at: int,
    top: float,
    lines: F32Array,
    scale: np.float32,
    minimum: np.float32,
    unit: np.float32,
) -> tuple[np.float32, np.float32]:
    """The best (scale, minimum) found, halves in units of `unit`; those given if none are better.

    Args:
        lines: f32[m, 2, 16]: candidates, as the steps that the block's span takes and the code of its lowest weight.
    """
    low, high, heavy, heaviest = x[at], x[at], x[at], w[at]
    for j in range(at, at + BLOCK_LEN):
        low, high = min(low, x[j]), max(high, x[j])
        if w[j] > heaviest:
            heavy, heaviest = x[j], w[j]
    best_loss = lane(_line_loss(x, w, at, splat(scale), splat(minimum), top), 0)
    for with_zero in range(2):
        # llama.cpp lets a line start at zero where all weights are above
        start = min(low, F(0.0)) if with_zero else low
        span = high - start
        if not span > 0.0 or (with_zero and start == low):
            continue
        for i in range(lines.shape[0]):
            inverse = load(lines[i, 0], 0) / span
            offset = load(lines[i, 1], 0) - start * inverse
            slopes, minima = _fit_line(x, w, at, heavy, inverse, offset, top, unit)
            loss = _line_loss(x, w, at, slopes, minima, top)
            k = first_equal(loss, smallest(loss))
            if lane(loss, k) < best_loss:
                scale, minimum, best_loss = lane(slopes, k), lane(minima, k), lane(loss, k)
    if low == high:  # what the minimum's rounding leaves is a scale for code 1
        minimum = lane(in_half(splat(low), unit), 0)
        return lane(in_half(splat(low - minimum), unit), 0), minimum
    slopes_near, minima_near = np.empty(16, np.float32), np.empty(16, np.float32)
    for _ in range(4):
        scale_bits, minimum_bits = np.int32(f16_bits(scale * unit)), np.int32(f16_bits(minimum * unit))
        for i in range(16):
            slopes_near[i] = _half_near(scale_bits, _SLOPE_STEP[i]) / unit
            minima_near[i] = _half_near(minimum_bits, _MINIMUM_STEP[i]) / unit
        loss = _line_loss(x, w, at, load(slopes_near, 0), load(minima_near, 0), top)
        k = first_equal(loss, smallest(loss))
        if not lane(loss, k) < best_loss:
            break
        scale, minimum, best_loss = slopes_near[k], minima_near[k], lane(loss, k)
    return scale, minimum


@jit
def energy(x: F32Array, w: F32Array, at: int, origin: np.float32) -> np.float32:
    """The error of a block of 32 equal numbers."""
    a, b = load(x, at) - origin, load(x, at + 16) - origin
    return total(a * a * load(w, at) + b * b * load(w, at + 16))


@jit
def is_sparse(x: F32Array, at: int) -> bool:
    """Whether most weights of a block are zero."""
    a, b = load(x, at), load(x, at + 16)
    ones, none = splat(1.0), splat(0.0)
    return total(where_less(none, a * a, ones, none) + where_less(none, b * b, ones, none)) < 7.0

"""Coordinate descent over codes, sub-block scales and super-block scales, with the exact loss.

The loss of a row's error d is d H d^T, and its gradient is 2 r with r = d H. A move of some columns' values by m
changes the loss by 2 r m + m H m^T. So the change is computed exactly before a move is made, and only moves that lower
the loss are made:

- `move_sub_block` moves the integer scale and offset of a sub-block to neighbouring integers, and chooses its codes
  again, one by one. Where sub-blocks have no integers, d and dmin move to neighbouring F16 numbers. Sixteen candidates
  compete, one in each lane; the first is the present scale and offset, so that codes can move without them.
- `move_super_block` moves d and dmin to the F16 numbers next to the least-squares solution.
- `move_codes` moves one code after the other to the level nearest to the minimum of the loss.

The columns are processed in windows. Within a window r is up to date after every move; the effect of these moves on
the r of other windows is added when those are reached. Sums are f32, so moves whose gain is below its precision are not
made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pocketquant.formats import F32Array
from pocketquant.formats.half import f16_bits, f16_value
from pocketquant.formats.lanes import (
    first_equal,
    highest,
    lane,
    load,
    lowest,
    rounded,
    smallest,
    splat,
    store,
    where_less,
)
from pocketquant.quant.rounding.kernel import jit
from pocketquant.quant.rounding.state import Grid, State, code_of_level, scale_and_offset

_F32 = np.float32
_TINY = _F32(1e-36)
_GAIN = _F32(-1e-5)  # a move must gain this share of the terms it sums, or rounding errors would count as gains
# The candidates, the present scale and offset first: steps of the integer scale, and steps of the integer offset from
# the one that keeps the middle of the sub-block where it is
_SCALE_STEPS = np.array([0, 0, 0, -1, -1, -1, 1, 1, 1, -2, 2, -2, 2, -3, 3, 0], np.float32)
_OFFSET_STEPS = np.array([0, -1, 1, -1, 0, 1, -1, 0, 1, 0, 0, 1, -1, 0, 0, 2], np.float32)
_SYMMETRIC_STEPS = np.array([0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -8, 8, 12], np.float32)
# The same for formats without integer scales: changes of d and of the offset, as shares of the scale
_AFFINE_SHARES = np.array([0, 0, 0, -1, 1, -3, 3, -6, 6, -2, 2, -10, 10, 0, 0, 0], np.float32) * _F32(0.01)
_OFFSET_SHARES = np.array([0, -8, 8, 0, 0, 0, 0, 0, 0, 8, -8, 0, 0, -20, 20, 3], np.float32) * _F32(0.01)
_SYMMETRIC_SHARES = np.array([0, -0.4, 0.4, -1, 1, -2, 2, -3, 3, -4, 4, -6, 6, -8, 8, 12], np.float32) * _F32(0.01)


class Workspace(NamedTuple):
    """Arrays in which moves are computed.

    Attributes:
        candidates: f32[4 * 16], the scales, the offsets, and their differences from the present scale and offset.
        integers: f32[2 * 16], the integer scales and offsets of the candidates.
        r, levels: f32[32 * 16], gradient and levels of the sub-block's weights, for each candidate.
        along, flat: f32[256], H times the levels, and H times ones.
        toward: f32[256], the direction of a block's move.
    """

    candidates: F32Array
    integers: F32Array
    r: F32Array
    levels: F32Array
    along: F32Array
    flat: F32Array
    toward: F32Array


@jit
def new_workspace() -> Workspace:
    """The arrays for one window."""
    candidates = np.zeros((2, 64), np.float32)
    sub_block = np.zeros((2, 512), np.float32)
    window = np.zeros((3, 256), np.float32)
    return Workspace(candidates[0], candidates[1], sub_block[0], sub_block[1], window[0], window[1], window[2])


@jit
def _add_row(r: F32Array, h: F32Array, at: int, factor: np.float32) -> None:
    for i in range(0, len(r), 16):
        store(r, i, load(r, i) + load(h, at + i) * factor)


@jit
def move_codes(g: Grid, s: State, row: int, start: int, r: F32Array, h: F32Array, per_h: F32Array) -> bool:
    """Goes over the codes of a window once; returns whether any moved."""
    length, moved = len(r), False
    values, codes = s.values[row], s.codes[row]
    for first in range(0, length, g.sub_block_len):
        scale, offset = scale_and_offset(g, s, row, (start + first) // g.sub_block_len)
        if not abs(scale) > _TINY:
            continue
        inverse = _F32(1.0) / scale
        for j in range(first, first + g.sub_block_len):
            old = values[start + j]
            best = old - r[j] * per_h[j]
            code = code_of_level(g, (best - offset) * inverse)
            if code != codes[start + j]:
                value = scale * g.levels[code] + offset
                if abs(value - best) < abs(old - best):
                    codes[start + j] = code
                    values[start + j] = value
                    _add_row(r, h, j * length, value - old)
                    moved = True
    return moved


@jit
def _set_candidates(g: Grid, s: State, row: int, sub_block: int, block: int, mean: np.float32, w: Workspace) -> None:
    """Fills `candidates` and `integers`."""
    shrink = s.shrink[row]
    d, dmin = f16_value(s.d[row, block]) * shrink, f16_value(s.dmin[row, block]) * shrink
    scale, offset = scale_and_offset(g, s, row, sub_block)
    has_offset = g.sign != 0.0 and (dmin != 0.0 or not g.has_sub_blocks)
    for k in range(16):
        first, second, new_scale, new_offset = _F32(0.0), _F32(0.0), scale, offset
        if g.has_sub_blocks:
            first = _F32(s.scale[row, sub_block]) + (_SCALE_STEPS[k] if has_offset else _SYMMETRIC_STEPS[k])
            first = min(max(first, _F32(g.scale_low)), _F32(g.scale_high))
            new_scale = d * first
            second = _F32(s.offset[row, sub_block])
            if has_offset and k > 0:
                wish = offset - (new_scale - scale) * mean
                second = min(max(np.rint(wish * g.sign / dmin) + _OFFSET_STEPS[k], _F32(0.0)), _F32(g.offset_high))
                new_offset = g.sign * (dmin * second)
        elif k > 0:
            step = _AFFINE_SHARES[k] if has_offset else _SYMMETRIC_SHARES[k]
            new_scale = f16_value(f16_bits(_F32(scale * (_F32(1.0) + step) / shrink))) * shrink
            if has_offset:
                wish = offset - (new_scale - scale) * mean + scale * _OFFSET_SHARES[k]
                new_offset = f16_value(f16_bits(_F32(wish / shrink))) * shrink
        w.candidates[k], w.candidates[16 + k] = new_scale, new_offset
        w.candidates[32 + k], w.candidates[48 + k] = new_scale - scale, new_offset - offset
        w.integers[k], w.integers[16 + k] = first, second


@jit
def move_sub_block(
    g: Grid, s: State, row: int, start: int, at: int, r: F32Array, h: F32Array, per_h: F32Array, w: Workspace
) -> bool:
    """Moves the scale, the offset and the codes of the sub-block `at` columns into the window, if the loss falls."""
    n, length, column = g.sub_block_len, len(r), start + at
    sub_block, block = column // g.sub_block_len, column // g.block_len
    codes = s.codes[row]
    if not abs(scale_and_offset(g, s, row, sub_block)[0]) > _TINY:
        return False
    for i in range(0, n, 16):
        along, flat = splat(0.0), splat(0.0)
        for j in range(n):
            line = load(h, (at + j) * length + at + i)
            along += line * g.levels[codes[column + j]]
            flat += line
        store(w.along, i, along)
        store(w.flat, i, flat)
    r_along, r_flat, aa, af, ff, mean = _F32(0.0), _F32(0.0), _F32(0.0), _F32(0.0), _F32(0.0), _F32(0.0)
    for i in range(n):
        level = g.levels[codes[column + i]]
        r_along += r[at + i] * level
        r_flat += r[at + i]
        aa += w.along[i] * level
        af += w.flat[i] * level
        ff += w.flat[i]
        mean += level
    _set_candidates(g, s, row, sub_block, block, mean / _F32(n), w)

    zero = splat(0.0)
    scale, offset = load(w.candidates, 0), load(w.candidates, 16)
    up, over = load(w.candidates, 32), load(w.candidates, 48)
    inverse = where_less(splat(_TINY), highest(scale, 0.0 - scale), 1.0 / scale, zero)
    change = 2.0 * (up * r_along + over * r_flat) + (up * up * aa + 2.0 * (up * over * af) + over * over * ff)
    size = highest(change, 0.0 - change)
    bottom, top = splat(g.levels[0]), splat(g.levels[len(g.levels) - 1])
    for i in range(n):
        store(w.r, 16 * i, up * w.along[i] + over * w.flat[i] + r[at + i])
    for i in range(n):
        gradient = load(w.r, 16 * i)
        value = scale * g.levels[codes[column + i]] + offset
        wish = lowest(highest((value - gradient * per_h[at + i] - offset) * inverse, bottom), top)
        level = _nearest_level(g, wish)
        store(w.levels, 16 * i, level)
        step = scale * level + offset - value
        at_i = (at + i) * length + at
        gain = step * (gradient + gradient + step * h[at_i + i])
        change += gain
        size += highest(gain, 0.0 - gain)
        for j in range(i + 1, n):
            store(w.r, 16 * j, load(w.r, 16 * j) + step * h[at_i + j])
    change = where_less(zero, highest(scale, 0.0 - scale), change, splat(_F32(1e30)))
    least = smallest(change)
    k = first_equal(change, least)
    if not least < _GAIN * lane(size, k):
        return False
    _take_candidate(g, s, row, column, at, r, h, w, k)
    return True


@jit
def _nearest_level(g: Grid, wish: Any) -> Any:
    """The level nearest to `wish`, in each lane."""
    if g.is_even:
        return rounded(wish)
    level = splat(g.levels[0])
    for t in range(len(g.levels) - 1):
        middle = (g.levels[t] + g.levels[t + 1]) * _F32(0.5)
        level += where_less(splat(middle), wish, splat(g.levels[t + 1] - g.levels[t]), splat(0.0))
    return level


@jit
def _take_candidate(
    g: Grid, s: State, row: int, column: int, at: int, r: F32Array, h: F32Array, w: Workspace, k: int
) -> None:
    """Gives the sub-block at a column the scale, the offset and the codes of candidate k."""
    sub_block, block, length = column // g.sub_block_len, column // g.block_len, len(r)
    codes, values = s.codes[row], s.values[row]
    best_scale, best_offset = w.candidates[k], w.candidates[16 + k]
    if g.has_sub_blocks:
        s.scale[row, sub_block] = np.int16(w.integers[k])
        s.offset[row, sub_block] = np.int16(w.integers[16 + k])
    elif k > 0:
        s.d[row, block] = f16_bits(_F32(best_scale / s.shrink[row]))
        if g.sign != 0.0:
            s.dmin[row, block] = f16_bits(_F32(best_offset / s.shrink[row]))
    for i in range(g.sub_block_len):
        level = w.levels[16 * i + k]
        code = int(level - g.levels[0]) if g.is_even else code_of_level(g, level)
        value = best_scale * g.levels[code] + best_offset
        step = value - values[column + i]
        codes[column + i] = code
        values[column + i] = value
        if step != 0.0:
            _add_row(r, h, (at + i) * length, step)


@jit
def _times_hessian(
    g: Grid, s: State, row: int, start: int, at: int, length: int, h: F32Array, toward: F32Array, out: F32Array
) -> None:
    """out f32[block_len] = H times the direction `toward`, within the block `at` columns into the window."""
    for i in range(0, g.block_len, 32):
        x, y = splat(0.0), splat(0.0)
        for j in range(g.block_len):
            first = (at + j) * length + at + i
            x += load(h, first) * toward[j]
            y += load(h, first + 16) * toward[j]
        store(out, i, x)
        store(out, i + 16, y)


@jit
def move_super_block(g: Grid, s: State, row: int, start: int, at: int, r: F32Array, h: F32Array, w: Workspace) -> bool:
    """Moves d and dmin of the block `at` columns into the window to the best F16 numbers, if the loss falls."""
    n, length, column = g.block_len, len(r), start + at
    block, shrink = column // n, s.shrink[row]
    codes, values = s.codes[row], s.values[row]
    d, dmin = f16_value(s.d[row, block]) * shrink, f16_value(s.dmin[row, block]) * shrink
    if d == 0.0:
        return False
    is_affine = g.sign != 0.0 and dmin != 0.0
    for i in range(n):
        w.toward[i] = _F32(s.scale[row, (column + i) // g.sub_block_len]) * g.levels[codes[column + i]]
    _times_hessian(g, s, row, start, at, length, h, w.toward, w.along)
    r_along, aa, af, ff, r_flat = _F32(0.0), _F32(0.0), _F32(0.0), _F32(0.0), _F32(0.0)
    for i in range(n):
        r_along += r[at + i] * w.toward[i]
        aa += w.along[i] * w.toward[i]
    if is_affine:
        for i in range(n):
            w.toward[i] = g.sign * _F32(s.offset[row, (column + i) // g.sub_block_len])
        _times_hessian(g, s, row, start, at, length, h, w.toward, w.flat)
        for i in range(n):
            r_flat += r[at + i] * w.toward[i]
            af += w.along[i] * w.toward[i]
            ff += w.flat[i] * w.toward[i]
    if not aa > 0.0:
        return False
    best_change, best_d, best_dmin = _F32(0.0), s.d[row, block], s.dmin[row, block]
    for k in range(3 if is_affine and ff > 0.0 else 1):  # d alone, dmin alone, both
        up, over = (-r_along / aa, _F32(0.0)) if k != 1 else (_F32(0.0), -r_flat / ff)
        if k == 2:
            determinant = aa * ff - af * af
            if not determinant > _F32(1e-4) * aa * ff:
                continue
            up = (af * r_flat - ff * r_along) / determinant
        d_bits, dmin_bits = s.d[row, block], s.dmin[row, block]
        if k != 1:
            d_bits = f16_bits(_F32((d + up) / shrink))
            up = f16_value(d_bits) * shrink - d
        if k == 2:  # the rounding of d is known: dmin can make up for it
            over = -(r_flat + af * up) / ff
        if k != 0:
            dmin_bits = f16_bits(_F32((dmin + over) / shrink))
            over = f16_value(dmin_bits) * shrink - dmin
        linear = r_along * up + r_flat * over
        square = aa * up * up + _F32(2.0) * af * up * over + ff * over * over
        change = linear + linear + square
        if d + up != 0.0 and change < best_change and change < _GAIN * (abs(linear) + abs(square)):
            best_change, best_d, best_dmin = change, d_bits, dmin_bits
    if best_change == 0.0:
        return False
    s.d[row, block], s.dmin[row, block] = best_d, best_dmin
    for i in range(n):
        scale, offset = scale_and_offset(g, s, row, (column + i) // g.sub_block_len)
        value = scale * g.levels[codes[column + i]] + offset
        step = value - values[column + i]
        values[column + i] = value
        if step != 0.0:
            _add_row(r, h, (at + i) * length, step)
    return True


@jit
def descend_row(
    g: Grid, s: State, row: int, start: int, r: F32Array, h: F32Array, per_h: F32Array, w: Workspace
) -> None:
    """Makes all moves in one window of one row; updates values, errors and r f32[length]."""
    length = len(r)
    for at in range(0, length, g.sub_block_len):
        move_sub_block(g, s, row, start, at, r, h, per_h, w)
    if g.has_sub_blocks or g.sign != 0.0:
        for at in range(0, length, g.block_len):
            move_super_block(g, s, row, start, at, r, h, w)
    move_codes(g, s, row, start, r, h, per_h)
    for j in range(start, start + length):
        s.errors[row, j] = s.values[row, j] - s.weights[row, j]


@jit
def inverse_diagonal(hessian: F32Array) -> F32Array:
    """The inverse of each element of the diagonal."""
    result = np.empty(len(hessian), np.float32)
    for j in range(len(result)):
        result[j] = _F32(1.0) / hessian[j, j]
    return result


@jit
def descend(g: Grid, s: State, start: int, gradient: F32Array, hessian: F32Array) -> None:
    """Calls `descend_row` for all rows of gradient f32[n, length], with hessian f32[length, length]."""
    workspace, h, per_h = new_workspace(), hessian.ravel(), inverse_diagonal(hessian)
    for row in range(gradient.shape[0]):
        descend_row(g, s, row, start, gradient[row], h, per_h, workspace)

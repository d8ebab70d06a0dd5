"""Coordinate descent on codes, scales and units, with the exact objective.

For a row's error d the objective is d H d^T and its gradient 2 r, r = d H. Moving the values of some columns by m
changes it by 2 r m + m H m^T, so every move is weighed exactly before it is made, and none is made that does not pay:

- `move_line`: a part's scale and offset to neighbouring integers (or, where it has none, its units to neighbouring F16
  numbers), with the part's codes chosen again one by one. Sixteen lines compete, one a lane; the first is the present
  one, so that codes move where the line stays.
- `move_units`: a block's units to the F16 numbers next to the least-squares solution.
- `move_codes`: one code after the other to the level nearest to where the objective is least.

A window of columns is worked on at a time, with r of these columns up to date; what the window's moves do to the
others' r is added when those are reached. Sums are f32: moves that gain less than its rounding are not made.
"""

from __future__ import annotations

from typing import NamedTuple

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
from pocketquant.quant.rounding.state import Grid, State, nearest_code, scale_and_offset

_F32 = np.float32
_TINY = _F32(1e-36)
_PAYS = _F32(-1e-5)  # a move must gain this share of what it adds up, or rounding errors would count as gains
# Lines that compete, the present one first: steps of the integer scale, and of the integer offset from the one that
# keeps the part's middle where it is
_SCALE_STEPS = np.array([0, 0, 0, -1, -1, -1, 1, 1, 1, -2, 2, -2, 2, -3, 3, 0], np.float32)
_OFFSET_STEPS = np.array([0, -1, 1, -1, 0, 1, -1, 0, 1, 0, 0, 1, -1, 0, 0, 2], np.float32)
_SYMMETRIC_STEPS = np.array([0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -8, 8, 12], np.float32)
# The same for formats whose parts are blocks: shares of the unit
_UNIT_SHARES = np.array([0, 0, 0, -1, 1, -3, 3, -6, 6, -2, 2, -10, 10, 0, 0, 0], np.float32) * _F32(0.01)
_MINIMUM_SHARES = np.array([0, -8, 8, 0, 0, 0, 0, 0, 0, 8, -8, 0, 0, -20, 20, 3], np.float32) * _F32(0.01)
_SYMMETRIC_SHARES = np.array([0, -0.4, 0.4, -1, 1, -2, 2, -3, 3, -4, 4, -6, 6, -8, 8, 12], np.float32) * _F32(0.01)


class Room(NamedTuple):
    """What moves are tried out in.

    Attributes:
        lines: f32[4 * 16], scales and offsets of the lines that compete, and their differences from the present one.
        integers: f32[2 * 16], what the file holds of them.
        r, levels: f32[32 * 16], gradient and levels of a part's weights, for each line.
        along, flat: f32[256], H times the levels, and times ones.
        toward: f32[256], a block's direction.
    """

    lines: F32Array
    integers: F32Array
    r: F32Array
    levels: F32Array
    along: F32Array
    flat: F32Array
    toward: F32Array


@jit
def new_room() -> Room:
    """Room for one window."""
    lines = np.zeros((2, 64), np.float32)
    part = np.zeros((2, 512), np.float32)
    window = np.zeros((3, 256), np.float32)
    return Room(lines[0], lines[1], part[0], part[1], window[0], window[1], window[2])


@jit
def _add_row(r: F32Array, h: F32Array, at: int, factor: np.float32) -> None:
    for i in range(0, len(r), 16):
        store(r, i, load(r, i) + load(h, at + i) * factor)


@jit
def move_codes(g: Grid, s: State, row: int, start: int, r: F32Array, h: F32Array, per_h: F32Array) -> bool:
    """One pass over a window's codes; whether any moved."""
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
            code = nearest_code(g, (best - offset) * inverse)
            if code != codes[start + j]:
                value = scale * g.levels[code] + offset
                if abs(value - best) < abs(old - best):
                    codes[start + j] = code
                    values[start + j] = value
                    _add_row(r, h, j * length, value - old)
                    moved = True
    return moved


@jit
def _set_lines(g: Grid, s: State, row: int, part: int, block: int, mean: np.float32, b: Room) -> None:
    """Fills `lines` and `integers` with the lines that compete."""
    shrink = s.shrink[row]
    d, dmin = f16_value(s.d[row, block]) * shrink, f16_value(s.dmin[row, block]) * shrink
    scale, offset = scale_and_offset(g, s, row, part)
    has_offset = g.sign != 0.0 and (dmin != 0.0 or not g.has_sub_blocks)
    for k in range(16):
        first, second, new_scale, new_offset = _F32(0.0), _F32(0.0), scale, offset
        if g.has_sub_blocks:
            first = _F32(s.scale[row, part]) + (_SCALE_STEPS[k] if has_offset else _SYMMETRIC_STEPS[k])
            first = min(max(first, _F32(g.scale_low)), _F32(g.scale_high))
            new_scale = d * first
            second = _F32(s.offset[row, part])
            if has_offset and k > 0:
                wish = offset - (new_scale - scale) * mean
                second = min(max(np.rint(wish * g.sign / dmin) + _OFFSET_STEPS[k], _F32(0.0)), _F32(g.offset_high))
                new_offset = g.sign * (dmin * second)
        elif k > 0:
            step = _UNIT_SHARES[k] if has_offset else _SYMMETRIC_SHARES[k]
            new_scale = f16_value(f16_bits(_F32(scale * (_F32(1.0) + step) / shrink))) * shrink
            if has_offset:
                wish = offset - (new_scale - scale) * mean + scale * _MINIMUM_SHARES[k]
                new_offset = f16_value(f16_bits(_F32(wish / shrink))) * shrink
        b.lines[k], b.lines[16 + k] = new_scale, new_offset
        b.lines[32 + k], b.lines[48 + k] = new_scale - scale, new_offset - offset
        b.integers[k], b.integers[16 + k] = first, second


@jit
def move_line(
    g: Grid, s: State, row: int, start: int, at: int, r: F32Array, h: F32Array, per_h: F32Array, b: Room
) -> bool:
    """Moves scale and offset of the part `at` columns into the window, and its codes, if that pays."""
    n, length, column = g.sub_block_len, len(r), start + at
    part, block = column // g.sub_block_len, column // g.block_len
    codes, values = s.codes[row], s.values[row]
    if not abs(scale_and_offset(g, s, row, part)[0]) > _TINY:
        return False
    for i in range(0, n, 16):
        along, flat = splat(0.0), splat(0.0)
        for j in range(n):
            line = load(h, (at + j) * length + at + i)
            along += line * g.levels[codes[column + j]]
            flat += line
        store(b.along, i, along)
        store(b.flat, i, flat)
    r_along, r_flat, aa, af, ff, mean = _F32(0.0), _F32(0.0), _F32(0.0), _F32(0.0), _F32(0.0), _F32(0.0)
    for i in range(n):
        level = g.levels[codes[column + i]]
        r_along += r[at + i] * level
        r_flat += r[at + i]
        aa += b.along[i] * level
        af += b.flat[i] * level
        ff += b.flat[i]
        mean += level
    _set_lines(g, s, row, part, block, mean / _F32(n), b)

    zero = splat(0.0)
    scale, offset, up, over = load(b.lines, 0), load(b.lines, 16), load(b.lines, 32), load(b.lines, 48)
    inverse = where_less(splat(_TINY), highest(scale, 0.0 - scale), 1.0 / scale, zero)
    change = 2.0 * (up * r_along + over * r_flat) + (up * up * aa + 2.0 * (up * over * af) + over * over * ff)
    size = highest(change, 0.0 - change)
    bottom, top = splat(g.levels[0]), splat(g.levels[len(g.levels) - 1])
    for i in range(n):
        store(b.r, 16 * i, up * b.along[i] + over * b.flat[i] + r[at + i])
    for i in range(n):
        gradient = load(b.r, 16 * i)
        value = scale * g.levels[codes[column + i]] + offset
        wish = lowest(highest((value - gradient * per_h[at + i] - offset) * inverse, bottom), top)
        if g.is_even:
            level = rounded(wish)
        else:
            level = bottom
            for t in range(len(g.levels) - 1):
                middle = (g.levels[t] + g.levels[t + 1]) * _F32(0.5)
                level += where_less(splat(middle), wish, splat(g.levels[t + 1] - g.levels[t]), zero)
        store(b.levels, 16 * i, level)
        step = scale * level + offset - value
        at_i = (at + i) * length + at
        gain = step * (gradient + gradient + step * h[at_i + i])
        change += gain
        size += highest(gain, 0.0 - gain)
        for j in range(i + 1, n):
            store(b.r, 16 * j, load(b.r, 16 * j) + step * h[at_i + j])
    change = where_less(zero, highest(scale, 0.0 - scale), change, splat(_F32(1e30)))
    least = smallest(change)
    k = first_equal(change, least)
    if not least < _PAYS * lane(size, k):
        return False
    best_scale, best_offset = b.lines[k], b.lines[16 + k]
    if g.has_sub_blocks:
        s.scale[row, part] = np.int16(b.integers[k])
        s.offset[row, part] = np.int16(b.integers[16 + k])
    elif k > 0:
        s.d[row, block] = f16_bits(_F32(best_scale / s.shrink[row]))
        if g.sign != 0.0:
            s.dmin[row, block] = f16_bits(_F32(best_offset / s.shrink[row]))
    for i in range(n):
        level = b.levels[16 * i + k]
        code = int(level - g.levels[0]) if g.is_even else nearest_code(g, level)
        value = best_scale * g.levels[code] + best_offset
        step = value - values[column + i]
        codes[column + i] = code
        values[column + i] = value
        if step != 0.0:
            _add_row(r, h, (at + i) * length, step)
    return True


@jit
def _along(
    g: Grid, s: State, row: int, start: int, at: int, length: int, h: F32Array, toward: F32Array, out: F32Array
) -> None:
    """out f32[block_len] = H times a direction, within the block `at` columns into the window."""
    for i in range(0, g.block_len, 32):
        x, y = splat(0.0), splat(0.0)
        for j in range(g.block_len):
            first = (at + j) * length + at + i
            x += load(h, first) * toward[j]
            y += load(h, first + 16) * toward[j]
        store(out, i, x)
        store(out, i + 16, y)


@jit
def move_units(g: Grid, s: State, row: int, start: int, at: int, r: F32Array, h: F32Array, b: Room) -> bool:
    """Solves for the units of the block `at` columns into the window under its codes and scales, if that pays."""
    n, length, column = g.block_len, len(r), start + at
    block, shrink = column // n, s.shrink[row]
    codes, values = s.codes[row], s.values[row]
    d, dmin = f16_value(s.d[row, block]) * shrink, f16_value(s.dmin[row, block]) * shrink
    is_affine = g.sign != 0.0 and dmin != 0.0
    if d == 0.0:
        return False
    for i in range(n):
        b.toward[i] = _F32(s.scale[row, (column + i) // g.sub_block_len]) * g.levels[codes[column + i]]
    _along(g, s, row, start, at, length, h, b.toward, b.along)
    r_along, aa, af, ff, r_flat = _F32(0.0), _F32(0.0), _F32(0.0), _F32(0.0), _F32(0.0)
    for i in range(n):
        r_along += r[at + i] * b.toward[i]
        aa += b.along[i] * b.toward[i]
    if is_affine:
        for i in range(n):
            b.toward[i] = g.sign * _F32(s.offset[row, (column + i) // g.sub_block_len])
        _along(g, s, row, start, at, length, h, b.toward, b.flat)
        for i in range(n):
            r_flat += r[at + i] * b.toward[i]
            af += b.along[i] * b.toward[i]
            ff += b.flat[i] * b.toward[i]
    if not aa > 0.0:
        return False
    best_change, best_d, best_dmin = _F32(0.0), s.d[row, block], s.dmin[row, block]
    for k in range(3 if is_affine and ff > 0.0 else 1):
        up, over = -r_along / aa, _F32(0.0)
        if k == 1:
            up, over = _F32(0.0), -r_flat / ff
        if k == 2:
            determinant = aa * ff - af * af
            if not determinant > _F32(1e-4) * aa * ff:
                continue
            up = (af * r_flat - ff * r_along) / determinant
        d_bits, dmin_bits = s.d[row, block], s.dmin[row, block]
        if k != 1:
            d_bits = f16_bits(_F32((d + up) / shrink))
            up = f16_value(d_bits) * shrink - d
        if k == 2:  # the first unit's rounding is known: the second can make up for it
            over = -(r_flat + af * up) / ff
        if k != 0:
            dmin_bits = f16_bits(_F32((dmin + over) / shrink))
            over = f16_value(dmin_bits) * shrink - dmin
        linear = r_along * up + r_flat * over
        square = aa * up * up + _F32(2.0) * af * up * over + ff * over * over
        change = linear + linear + square
        if d + up != 0.0 and change < best_change and change < _PAYS * (abs(linear) + abs(square)):
            best_change, best_d, best_dmin = change, d_bits, dmin_bits
    if best_change == 0.0:
        return False
    s.d[row, block], s.dmin[row, block] = best_d, best_dmin
    for i in range(n):
        if i % g.sub_block_len == 0:
            scale, offset = scale_and_offset(g, s, row, (column + i) // g.sub_block_len)
        value = scale * g.levels[codes[column + i]] + offset
        step = value - values[column + i]
        values[column + i] = value
        if step != 0.0:
            _add_row(r, h, (at + i) * length, step)
    return True


@jit
def descend_row(g: Grid, s: State, row: int, start: int, r: F32Array, h: F32Array, per_h: F32Array, b: Room) -> None:
    """All moves in one window of one row; brings values, errors and r f32[length] up to date."""
    length = len(r)
    for at in range(0, length, g.sub_block_len):
        move_line(g, s, row, start, at, r, h, per_h, b)
    if g.has_sub_blocks or g.sign != 0.0:
        for at in range(0, length, g.block_len):
            move_units(g, s, row, start, at, r, h, b)
    move_codes(g, s, row, start, r, h, per_h)
    for j in range(start, start + length):
        s.errors[row, j] = s.values[row, j] - s.weights[row, j]


@jit
def inverse_diagonal(hessian: F32Array) -> F32Array:
    """One over each element of the diagonal."""
    result = np.empty(len(hessian), np.float32)
    for j in range(len(result)):
        result[j] = _F32(1.0) / hessian[j, j]
    return result


@jit
def descend(g: Grid, s: State, start: int, gradient: F32Array, hessian: F32Array) -> None:
    """`descend_row` for all rows: gradient f32[n, length], hessian f32[length, length]."""
    room, h, per_h = new_room(), hessian.ravel(), inverse_diagonal(hessian)
    for row in range(gradient.shape[0]):
        descend_row(g, s, row, start, gradient[row], h, per_h, room)

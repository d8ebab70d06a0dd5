"""IQ4_NL and IQ4_XS: four bits on a fixed, uneven set of sixteen levels.

`encode_*` takes f32[n, k] (finite) and the importance of each column, f32[k] or None for equal ones, and returns
u8[n, bytes]; `decode_*` takes that and k and returns f32[n, k]. k is a multiple of 32 for IQ4_NL, of 256 for IQ4_XS.

IQ4_NL searches for its scale as the other formats of 32 weights do (`scale_search`). IQ4_XS stores the scales of its
eight blocks in six bits: a first round finds each block's scale, the shared scale is the candidate that rounds them
with the least loss, and then sixteen of the really storable scales of each block are measured. Both minimise the
importance-weighted squared error.

Source: block layouts and levels from llama.cpp b10359, ggml/src/ggml-common.h.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.closer_search import candidates, closer_scale, energy, halves_near, is_sparse, stored_loss
from pocketquant.formats.half import f16_bits, refuse_beyond
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
    where_less,
)
from pocketquant.formats.layout import Blocks, Layout, fill_four_bits, legacy_layout, stacked
from pocketquant.formats.legacy import empty_blocks, half_values, unpack_nibbles
from pocketquant.formats.scale_search import (
    BLOCK_LEN,
    COARSE_4,
    FINE_4,
    block_weights,
    in_half,
    pick_half,
    reach_of_signs,
    take_block,
)

SUPER_LEN = 256
# `d` is the bits of a half; weight = scale * LEVELS[code]; byte j of 16 in `qs` holds code j below, code j + 16 above.
# IQ4_XS: scale = d * (six bits - 32); block b has its low four bits in nibble b of `scales_l`, the high two in bits
# 2b and 2b + 1 of `scales_h`.
IQ4_NL = np.dtype([("d", "<u2"), ("qs", "u1", (16,))])
IQ4_XS = np.dtype([("d", "<u2"), ("scales_h", "<u2"), ("scales_l", "u1", (4,)), ("qs", "u1", (8, 16))])
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)

F = np.float32
_BETWEEN = (LEVELS[1:] + LEVELS[:-1]) / 2
_STEP = LEVELS[1:] - LEVELS[:-1]
_CLOSER = candidates(LEVELS)
# Blocks whose error is below this share of their energy are searched again. Of blocks of normally distributed weights
# under uneven importance, fewer than one in a hundred are.
_RARE_NL, _RARE_XS = F(4e-4), F(8e-4)
_EXTREME_MULTIPLES = np.arange(-32.0, -24.0, 0.5, dtype=F)
_PEAK_LEVELS = LEVELS[[0, 15, 1, 14]]
_AROUND = np.arange(-8.0, 8.0, dtype=F)


class Scratch(NamedTuple):
    """Room for one super-block, f32[8] each: what its blocks want, how much they mind, their multiples, the best."""

    scales: F32Array
    curvatures: F32Array
    multiples: F32Array
    best_multiples: F32Array


@jit
def level_sums(x: F32Array, w: F32Array, at: int, inverse: Any) -> Any:
    """Sums of w q x and w q q over 32 weights, for the levels q nearest at sixteen inverse scales."""
    sum_qx = splat(0.0)
    sum_qq = splat(0.0)
    zero = splat(0.0)
    for j in range(at, at + BLOCK_LEN):
        y = inverse * x[j]
        q = splat(LEVELS[0])
        for t in range(15):
            q += where_less(splat(_BETWEEN[t]), y, splat(_STEP[t]), zero)
        wq = q * w[j]
        sum_qx += wq * x[j]
        sum_qq += wq * q
    return sum_qx, sum_qq


@jit
def smooth_sums(x: F32Array, w: F32Array, at: int, inverse: Any) -> Any:
    """`level_sums` in two thirds of the time: polynomials give the codes (within 0.04) and the levels (within 0.5).

    They are least-squares fits to `_BETWEEN` and `LEVELS`, with codes counted from -7.5 to 7.5.
    """
    sum_qx = splat(0.0)
    sum_qq = splat(0.0)
    top = splat(113.0)
    bottom = splat(-127.0)
    for j in range(at, at + BLOCK_LEN):
        y = lowest(highest(inverse * x[j], bottom), top)
        squared = y * y
        even = (F(3.22745e-11) * squared - F(4.75784e-06)) * squared - F(0.11256)
        odd = ((F(8.46852e-11) * squared - F(2.75523e-06)) * squared + F(0.0852123)) * y
        code = rounded(odd + even) + F(0.5)
        q = (((F(0.00132472) * code + F(0.0809584)) * code - F(0.125712)) * code + F(11.4313)) * code - F(4.27474)
        wq = q * w[j]
        sum_qx += wq * x[j]
        sum_qq += wq * q
    return sum_qx, sum_qq


@jit
def coarse_scale(x: F32Array, w: F32Array, at: int) -> tuple[np.float32, np.float32]:
    """A scale near a block's best, of either sign, and its sum of w q q; zeros if none is better than no scale."""
    reach = reach_of_signs(x, at, 113.0, 127.0)
    if lane(reach, 0) == 0.0:
        return F(0.0), F(0.0)
    sum_qx, sum_qq = smooth_sums(x, w, at, load(COARSE_4, 0) / reach)
    scale = sum_qx / highest(sum_qq, 1e-30)
    gain = scale * sum_qx
    best = first_equal(gain, largest(gain))
    return lane(scale, best), lane(sum_qq, best)


@jit
def fine_scale(x: F32Array, w: F32Array, at: int, scale: np.float32, unit: np.float32) -> tuple[np.float32, np.float32]:
    """The best scale around `scale`, a half, in units of `unit`, and the squared error that it saves."""
    sum_qx, sum_qq = level_sums(x, w, at, load(FINE_4, 0) / scale)
    return pick_half(sum_qx, sum_qq, unit)


@jit
def nearest_code(y: np.float32) -> np.int32:
    """The code of the level nearest to y."""
    code = np.int32(0)
    for t in range(15):
        code += np.int32(_BETWEEN[t] < y)
    return code


@jit
def write_codes(row: F32Array, first: int, scale: np.float32, qs: U8Array) -> None:
    """The codes of 32 weights; level 1, the smallest, everywhere where the scale is 0."""
    inverse = F(1.0) / scale if scale != 0.0 else F(0.0)
    for j in range(16):
        low = nearest_code(row[first + j] * inverse)
        qs[j] = np.uint8(low | (nearest_code(row[first + j + 16] * inverse) << np.int32(4)))


@jit
def _fill_iq4_nl(rows: F32Array, w: F32Array, blocks: Any) -> None:
    x = np.zeros(rows.shape[1], np.float32)
    units = np.empty(blocks.shape[1], np.float32)
    is_odd = np.empty(blocks.shape[1], np.bool_)
    scales = np.empty(blocks.shape[1], np.float32)
    for i in range(blocks.shape[0]):
        row = rows[i]
        # Short loops over the whole row, so that the processor overlaps the blocks of each
        for b in range(blocks.shape[1]):
            units[b], is_odd[b] = take_block(row, b * BLOCK_LEN, BLOCK_LEN, x)
        for b in range(blocks.shape[1]):
            scales[b] = coarse_scale(x, w, b * BLOCK_LEN)[0] if units[b] > 0.0 else F(0.0)
        for b in range(blocks.shape[1]):
            if scales[b] != 0.0:
                scales[b], saved = fine_scale(x, w, b * BLOCK_LEN, scales[b], units[b])
                is_odd[b] = is_odd[b] or saved > (F(1.0) - _RARE_NL) * energy(x, w, b * BLOCK_LEN, F(0.0))
        for b in range(blocks.shape[1]):
            if is_odd[b]:
                scales[b] = closer_scale(x, w, b * BLOCK_LEN, LEVELS, 0.0, _CLOSER, scales[b], units[b])
            scales[b] *= units[b]
            blocks[i, b].d = f16_bits(scales[b])
            write_codes(row, b * BLOCK_LEN, scales[b], blocks[i, b].qs)


@jit
def shared_scale(scales: F32Array, curvatures: F32Array, unit: np.float32) -> np.float32:
    """The half, in units of `unit`, whose multiples by -32 to 31 come nearest to eight scales."""
    extreme = F(0.0)
    for b in range(8):
        extreme = scales[b] if abs(scales[b]) > abs(extreme) else extreme
    if extreme == 0.0:
        return F(0.0)
    shared = in_half(extreme / load(_EXTREME_MULTIPLES, 0), unit)
    inverse = where_less(splat(0.0), shared * shared, 1.0 / shared, splat(0.0))
    loss = splat(0.0)
    for b in range(8):
        rest = lowest(highest(rounded(inverse * scales[b]), -32.0), 31.0) * shared - scales[b]
        loss += rest * rest * curvatures[b]
    return lane(shared, first_equal(loss, smallest(loss)))


@jit
def best_multiple(
    x: F32Array, w: F32Array, at: int, shared: np.float32, scale: np.float32
) -> tuple[np.float32, np.float32, np.float32]:
    """The multiple of `shared` near `scale` that leaves the least error, and its sums of w q x and w q q."""
    near = np.rint(min(max(scale / shared, F(-32.0)), F(31.0)))
    multiple = lowest(highest(load(_AROUND, 0) + near, -32.0), 31.0)
    stored = multiple * shared
    inverse = where_less(splat(0.0), stored * stored, 1.0 / stored, splat(0.0))
    sum_qx, sum_qq = level_sums(x, w, at, inverse)
    loss = stored * (stored * sum_qq - sum_qx - sum_qx)
    best = first_equal(loss, smallest(loss))
    return lane(multiple, best), lane(sum_qx, best), lane(sum_qq, best)


@jit
def choose_multiples(
    x: F32Array, w: F32Array, at: int, unit: np.float32, shared: np.float32, scales: F32Array, multiples: F32Array
) -> tuple[np.float32, np.float32]:
    """Fills `multiples` under a given shared scale; returns the shared scale that fits them best, and what it saves."""
    sum_qx, sum_qq = F(0.0), F(0.0)
    for b in range(8):
        multiple, qx, qq = best_multiple(x, w, at + b * BLOCK_LEN, shared, scales[b])
        multiples[b] = multiple
        sum_qx += multiple * qx
        sum_qq += multiple * multiple * qq
    if sum_qq > 0.0:
        shared = lane(in_half(splat(sum_qx / sum_qq), unit), 0)
    return shared, shared * (sum_qx + sum_qx - shared * sum_qq)


@jit
def fit_super_block(x: F32Array, w: F32Array, at: int, unit: np.float32, s: Scratch) -> np.float32:
    """The shared scale of 256 weights, a half in units of `unit`; leaves its multiples in the scratch."""
    for b in range(8):
        s.scales[b], s.curvatures[b] = coarse_scale(x, w, at + b * BLOCK_LEN)
        s.multiples[b] = F(0.0)
    shared = shared_scale(s.scales, s.curvatures, unit)
    if shared == 0.0:
        return F(0.0)
    shared, saved = choose_multiples(x, w, at, unit, shared, s.scales, s.multiples)
    whole, sparse = F(0.0), 0
    for b in range(8):
        whole += energy(x, w, at + b * BLOCK_LEN, F(0.0))
        sparse += is_sparse(x, at + b * BLOCK_LEN)
    if saved > (F(1.0) - _RARE_XS) * whole or sparse > 4:
        shared = look_closer(x, w, at, unit, whole, sparse > 4, shared, s)
    return shared


@jit
def look_closer(
    x: F32Array, w: F32Array, at: int, unit: np.float32, whole: np.float32, is_odd: bool, shared: np.float32, s: Scratch
) -> np.float32:
    """`fit_super_block` in one that levels fit almost exactly: there all its blocks must suit one shared scale.

    In each round the largest weight of every block takes the same level; where only the rounding of the shared scale
    is left, or most weights are zero, others are tried, too.
    """
    best, best_loss = _best_neighbour(x, w, at, unit, shared, s.multiples)
    s.best_multiples[:] = s.multiples
    for level in _PEAK_LEVELS:
        for b in range(8):
            peak = F(0.0)
            for j in range(at + b * BLOCK_LEN, at + (b + 1) * BLOCK_LEN):
                peak = x[j] if abs(x[j]) > abs(peak) else peak
            s.scales[b] = peak / level
            s.curvatures[b] = F(1.0)
        first = shared_scale(s.scales, s.curvatures, unit)
        coarse = abs(best) * unit
        coarse = F(2.0**-25) / coarse if coarse < 2.0**-14 and coarse > 0.0 else F(2.0**-11)
        n_units = _EXTREME_MULTIPLES.size if is_odd or best_loss < coarse * coarse * whole else 1
        for k in range(n_units):
            shared = first
            if k > 0:
                shared = lane(in_half(splat(first * F(32.0) / _EXTREME_MULTIPLES[k]), unit), 0)
            if shared == 0.0:
                continue
            shared, _ = choose_multiples(x, w, at, unit, shared, s.scales, s.multiples)
            shared, loss = _best_neighbour(x, w, at, unit, shared, s.multiples)
            if loss < best_loss:
                best, best_loss = shared, loss
                s.best_multiples[:] = s.multiples
    s.multiples[:] = s.best_multiples
    return best


@jit
def _best_neighbour(
    x: F32Array, w: F32Array, at: int, unit: np.float32, shared: np.float32, multiples: F32Array
) -> tuple[np.float32, np.float32]:
    """The shared scale, of the sixteen halves around `shared`, that leaves the least error, and that error."""
    halves = halves_near(shared, unit)
    loss = splat(0.0)
    for b in range(8):
        loss += stored_loss(x, w, at + b * BLOCK_LEN, load(halves, 0) * multiples[b], LEVELS, 0.0)
    k = first_equal(loss, smallest(loss))
    return halves[k], lane(loss, k)


@jit
def _fill_iq4_xs(rows: F32Array, w: F32Array, blocks: Any) -> None:
    x = np.zeros(rows.shape[1], np.float32)
    s = Scratch(np.empty(8, np.float32), np.empty(8, np.float32), np.empty(8, np.float32), np.empty(8, np.float32))
    for i in range(blocks.shape[0]):
        row = rows[i]
        for k in range(blocks.shape[1]):
            unit = take_block(row, k * SUPER_LEN, SUPER_LEN, x)[0]
            s.multiples[:] = F(0.0)
            shared = F(0.0)
            if unit > 0.0:
                shared = fit_super_block(x, w, k * SUPER_LEN, unit, s) * unit
            blocks[i, k].d = f16_bits(shared)
            high = np.uint32(0)
            for b in range(8):
                six_bits = np.uint32(np.int32(s.multiples[b]) + np.int32(32))
                high |= np.uint32((six_bits >> np.uint32(4)) << np.uint32(2 * b))
                shift = np.uint32(4 * (b % 2))
                blocks[i, k].scales_l[b // 2] |= np.uint8((six_bits & np.uint32(15)) << shift)
                write_codes(row, k * SUPER_LEN + b * BLOCK_LEN, shared * s.multiples[b], blocks[i, k].qs[b])
            blocks[i, k].scales_h = np.uint16(high)


def encode_iq4_nl(rows: F32Array, importance: F32Array | None = None) -> U8Array:
    """f32[n, k] -> u8[n, k / 32 * 18]."""
    rows, data, blocks = empty_blocks(rows, IQ4_NL, BLOCK_LEN)
    _fill_iq4_nl(rows, block_weights(importance, rows.shape[1], BLOCK_LEN), blocks)
    refuse_beyond("IQ4_NL", 113, rows, blocks["d"])
    return data


def decode_iq4_nl(data: U8Array, n_cols: int) -> F32Array:
    """u8[n, k / 32 * 18] -> f32[n, k]."""
    blocks = np.ascontiguousarray(data).view(IQ4_NL)
    return (LEVELS[unpack_nibbles(blocks["qs"])] * half_values(blocks["d"])).reshape(-1, n_cols)


def encode_iq4_xs(rows: F32Array, importance: F32Array | None = None) -> U8Array:
    """f32[n, k] -> u8[n, k / 256 * 136]."""
    rows, data, supers = empty_blocks(rows, IQ4_XS, SUPER_LEN)
    weights = block_weights(importance, rows.shape[1], SUPER_LEN)
    # A block without importance beside others with: rounded well, but with no say in the shared scale
    blocks = weights.reshape(-1, BLOCK_LEN)
    blocks[~blocks.any(axis=1)] = 2.0**-30
    _fill_iq4_xs(rows, weights, supers)
    refuse_beyond("IQ4_XS", 3503, rows, supers["d"])
    return data


def decode_iq4_xs(data: U8Array, n_cols: int) -> F32Array:
    """u8[n, k / 256 * 136] -> f32[n, k]."""
    blocks = np.ascontiguousarray(data).view(IQ4_XS)
    b = np.arange(8)
    low = blocks["scales_l"][..., b // 2] >> (4 * (b % 2)).astype(np.uint8) & np.uint8(15)
    high = blocks["scales_h"][..., None] >> (2 * b).astype(np.uint16) & np.uint16(3)
    multiples = (low | high << np.uint16(4)).astype(np.float32) - F(32)
    scales = half_values(blocks["d"]) * multiples
    return (LEVELS[unpack_nibbles(blocks["qs"])] * scales[..., None]).reshape(-1, n_cols)


def _read_iq4_xs(blocks: Blocks) -> tuple[Any, Any]:
    b = np.arange(8)
    low = blocks["scales_l"][..., b // 2] >> (4 * (b % 2)).astype(np.uint8) & 15
    high = blocks["scales_h"][..., None] >> (2 * b).astype(np.uint16) & np.uint16(3)
    scale = (low | high << np.uint16(4)).astype(np.int16) - 32
    return scale, np.zeros_like(scale)


def _pack_iq4_xs(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    blocks["scales_l"] = (steps[..., 0::2] & 15) | ((steps[..., 1::2] & 15) << 4)
    high = np.zeros(blocks.shape, np.uint16)
    for b in range(8):
        high |= (steps[..., b] >> 4).astype(np.uint16) << np.uint16(2 * b)
    blocks["scales_h"] = high
    blocks["qs"] = stacked(codes, (8, 2, 16), 4).reshape(*blocks.shape, 8, 16)


LAYOUT_IQ4_XS = Layout(IQ4_XS, 32, LEVELS, _pack_iq4_xs, _read_iq4_xs, -32, 31, is_even=False)
LAYOUT_IQ4_NL = legacy_layout(IQ4_NL, LEVELS, fill_four_bits)

"""The search behind Q4_K, Q5_K and Q2_K: weight = d * scale code * code - dmin * offset code.

A block of 256 weights has two F16 numbers, `d` and `dmin`; each of its sub-blocks (32 weights, or 16 in Q2_K) has a
small integer scale and a small integer offset. The search minimises sum importance * (weight - decoded)**2 in four
steps:

1. `fit_sub_blocks`: every sub-block alone, unquantized. Sixteen scales compete, one a lane; the best line through the
   codes that each gives has a closed form, and a second round starts from those lines.
2. `best_super_scale`: the `d` and `dmin` whose multiples come nearest to what the sub-blocks want.
3. `choose_codes` and `refit`: sixteen pairs of integer scale and offset around each sub-block's wish compete with the
   codes they really lead to; then `d` and `dmin` are solved again for the codes chosen, as long as that helps.
4. `look_closer`, in rare blocks that are mostly zeros or that codes fit almost exactly: starts where the sub-blocks
   agree.

Sources: the layouts and the idea of sub-block fits are ggml's (ggml-quants.c of llama.cpp); weighted least squares
with alternating assignment is Lloyd, "Least squares quantization in PCM", 1982.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.half import f16_bits, f16_value
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
    total,
    where_less,
)

_F32 = np.float32
_REFITS = 3
_EVEN = _F32(1e-6)  # codes that vary less than this share of their squares are all the same: the rest is rounding
# How many numbers of steps are tried there, and in blocks that fit exactly.
_FEWER, _FEWEST = 3, 4
_EXACT = _F32(20.0)  # an error of so many squared steps of `d` comes from its rounding
_SPARSE = _F32(208.0)  # zeros in a block that are many
_TINY = _F32(1e-36)  # scales below have no finite inverse

# Candidates of `fit_sub_blocks`: which end of a sub-block is kept where its range and that of the codes differ (0: the
# low one, 1: the high one).
_ANCHOR = np.resize(np.array([0.0, 1.0, 0.5, 0.0, 1.0], np.float32), 16)
# Candidates of `best_super_scale`: how far below the highest integer the largest wish shall land.
_BELOW_TOP = np.arange(-1, 15, dtype=np.float32)
# Candidates of `choose_codes`: four scales, and four offsets for each.
_SCALE_STEP = np.repeat(np.arange(-1, 3), 4).astype(np.float32)
_OFFSET_STEP = np.tile(np.arange(-1, 3), 4).astype(np.float32)


class Scratch(NamedTuple):
    """Room for one block; arrays of 16 have one place for each sub-block.

    Attributes:
        x, w: f32[256], weights and importance.
        scale, offset: what each sub-block wants, unquantized.
        curvature, weight: how much it minds: second derivatives of its error by scale and by offset.
        center: weighted mean of its codes.
        scale_code, offset_code: its integers, as f32; `best_*` are those of the best error so far.
        codes: u8[256].
    """

    x: F32Array
    w: F32Array
    scale: F32Array
    offset: F32Array
    curvature: F32Array
    weight: F32Array
    center: F32Array
    scale_code: F32Array
    offset_code: F32Array
    best_scale_code: F32Array
    best_offset_code: F32Array
    codes: U8Array


@jit
def new_scratch() -> Scratch:
    """Room for one block, uninitialised."""
    place = np.zeros((9, 16), np.float32)
    return Scratch(
        np.empty(256, np.float32),
        np.empty(256, np.float32),
        place[0],
        place[1],
        place[2],
        place[3],
        place[4],
        place[5],
        place[6],
        place[7],
        place[8],
        np.empty(256, np.uint8),
    )


@jit
def fit_sub_blocks(s: Scratch, sub_block_len: int, code_max: np.float32, reach: F32Array) -> None:
    """Fits every sub-block on its own: fills scales, offsets, curvatures, weights and centers.

    Args:
        reach: f32[16], the candidates: how many times `code_max` the codes a sub-block's range shall span.
    """
    zero = splat(0.0)
    for j in range(256 // sub_block_len):
        start, stop = j * sub_block_len, (j + 1) * sub_block_len
        lows, highs, weights, sums = splat(0.0), splat(-1e30), splat(0.0), splat(0.0)
        for i in range(start, stop, 16):
            v, u = load(s.x, i), load(s.w, i)
            lows, highs = lowest(lows, v), highest(highs, v)
            weights += u
            sums += u * v
        weight = total(weights)
        mean = total(sums) / weight
        low, span = smallest(lows), largest(highs) - smallest(lows)
        s.weight[j] = weight
        if span <= 0.0:  # all weights equal, and none above zero
            s.scale[j] = s.curvature[j] = s.center[j] = _F32(0.0)
            s.offset[j] = max(_F32(0.0), -mean)
            continue

        inverse = load(reach, 0) * (code_max / span)
        offset_codes = load(_ANCHOR, 0) * (code_max - inverse * span) - inverse * low
        loss, scale, offset, spread, center = zero, zero, zero, zero, zero
        for _ in range(2):
            # counted from the middle: where one weight rules a sub-block, nothing but its small differences may remain
            middle = inverse * mean + offset_codes
            origin = lowest(highest(rounded(middle), zero), code_max)
            shift, bottom, top = middle - origin, 0.0 - origin, code_max - origin
            sum_q, sum_qq, sum_qx = zero, zero, zero
            for i in range(start, stop):
                v = s.x[i] - mean
                q = lowest(highest(rounded(inverse * v + shift), bottom), top)
                wq = q * s.w[i]
                sum_q += wq
                sum_qq += wq * q
                sum_qx += wq * v
            mean_q = sum_q / weight
            spread = sum_qq - sum_q * mean_q
            center = origin + mean_q
            scale = where_less(highest(_EVEN * sum_qq, 1e-30), spread, sum_qx / spread, zero)
            offset = scale * center - mean
            gain = scale * sum_qx
            # an offset below zero does not exist: those lanes take the best line through the origin
            sum_qq += origin * (sum_q + sum_q + origin * weight)
            sum_qx += (sum_q + origin * weight) * mean
            scale_0 = where_less(splat(1e-30), sum_qq, sum_qx / sum_qq, zero)
            gain = where_less(offset, zero, scale_0 * sum_qx - mean * mean * weight, gain)
            scale = where_less(offset, zero, scale_0, scale)
            offset = highest(offset, zero)
            loss = 0.0 - gain
            inverse = where_less(splat(_TINY), scale, 1.0 / scale, zero)
            offset_codes = offset * inverse
        k = first_equal(loss, smallest(loss))
        s.scale[j] = max(_F32(0.0), lane(scale, k))
        s.offset[j] = lane(offset, k)
        s.curvature[j] = lane(spread, k)
        s.center[j] = lane(center, k)


@jit
def best_super_scale(wishes: F32Array, weights: F32Array, n_sub_blocks: int, code_max: np.float32) -> np.float32:
    """The number whose multiples, 0 to `code_max` times, come nearest to the wishes f32[n_sub_blocks], all >= 0."""
    peak = _F32(0.0)
    for j in range(n_sub_blocks):
        peak = max(peak, wishes[j])
    if peak <= 0.0:
        return _F32(0.0)
    unit = peak / (code_max - load(_BELOW_TOP, 0))
    inverse = 1.0 / unit
    loss, uu, ux = splat(0.0), splat(0.0), splat(0.0)
    for j in range(n_sub_blocks):
        code = lowest(rounded(inverse * wishes[j]), code_max)
        miss = code * unit - wishes[j]
        loss += miss * miss * weights[j]
        uu += code * code * weights[j]
        ux += code * (wishes[j] * weights[j])
    k = first_equal(loss, smallest(loss))
    return lane(ux, k) / lane(uu, k) if lane(uu, k) > 0.0 else lane(unit, k)


@jit
def choose_codes(
    s: Scratch, sub_block_len: int, code_max: np.float32, scale_max: np.float32, d: np.float32, dmin: np.float32
) -> None:
    """Chooses every sub-block's integer scale and offset under a given `d` and `dmin`."""
    zero = splat(0.0)
    per_d = _F32(1.0) / d if d > 0.0 else _F32(0.0)
    per_dmin = _F32(1.0) / dmin if dmin > 0.0 else _F32(0.0)
    for j in range(256 // sub_block_len):
        scale_code = load(_SCALE_STEP, 0) + np.floor(s.scale[j] * per_d)
        scale_code = lowest(highest(scale_code, zero), scale_max)
        scale = scale_code * d
        # a line of another slope still runs through the middle of the sub-block
        offset = (scale - s.scale[j]) * s.center[j] + s.offset[j]
        offset_code = rounded(offset * per_dmin - 0.5) + load(_OFFSET_STEP, 0)
        offset_code = lowest(highest(offset_code, zero), scale_max)
        offset = offset_code * dmin
        inverse = where_less(splat(_TINY), scale, 1.0 / scale, zero)
        shift = offset * inverse
        loss = zero
        for i in range(j * sub_block_len, (j + 1) * sub_block_len):
            q = lowest(highest(rounded(inverse * s.x[i] + shift), zero), code_max)
            miss = (q * scale - offset) - s.x[i]
            loss += miss * miss * s.w[i]
        k = first_equal(loss, smallest(loss))
        s.scale_code[j] = lane(scale_code, k)
        s.offset_code[j] = lane(offset_code, k)


@jit
def refit(
    s: Scratch, sub_block_len: int, code_max: np.float32, d: np.float32, dmin: np.float32
) -> tuple[np.float32, np.float32, np.float32]:
    """The block's error under `d` and `dmin`, and the `d` and `dmin` that fit its codes best."""
    zero = splat(0.0)
    loss, uu, uv, vv, ux, vx = zero, zero, zero, zero, zero, zero
    for j in range(256 // sub_block_len):
        scale, offset = d * s.scale_code[j], dmin * s.offset_code[j]
        inverse = _F32(1.0) / scale if scale > _TINY else _F32(0.0)
        for i in range(j * sub_block_len, (j + 1) * sub_block_len, 16):
            v, weight = load(s.x, i), load(s.w, i)
            q = lowest(highest(rounded(v * inverse + offset * inverse), zero), code_max)
            miss = (q * scale - offset) - v
            loss += miss * miss * weight
            u = q * s.scale_code[j]
            wu, wv = weight * u, weight * s.offset_code[j]
            uu += wu * u
            uv += wu * s.offset_code[j]
            vv += wv * s.offset_code[j]
            ux += wu * v
            vx += wv * v
    a, b, c = np.float64(total(uu)), np.float64(total(uv)), np.float64(total(vv))
    f, g = np.float64(total(ux)), np.float64(total(vx))
    determinant = a * c - b * b
    # where offsets and codes say the same, only d is solved for
    if determinant > 1e-6 * a * c:
        new_d, new_dmin = (f * c - g * b) / determinant, (f * b - g * a) / determinant
    else:
        new_d, new_dmin = (f + dmin * b) / a if a > 0.0 else np.float64(d), np.float64(dmin)
    if new_dmin < 0.0:
        new_d, new_dmin = f / a if a > 0.0 else np.float64(d), np.float64(0.0)
    return total(loss), _F32(max(new_d, 0.0)), _F32(new_dmin)


@jit
def settle(
    s: Scratch,
    sub_block_len: int,
    code_max: np.float32,
    scale_max: np.float32,
    passes: int,
    grow: float,
    d_bits: np.uint16,
    dmin_bits: np.uint16,
    best: tuple[np.uint16, np.uint16, np.float32],
) -> tuple[np.uint16, np.uint16, np.float32]:
    """Chooses integers and refits from a start of `d` and `dmin`; keeps what is better than `best`.

    `best` and the result are the F16 bits of `d`, those of `dmin`, and the error they leave.
    """
    best_d_bits, best_dmin_bits, best_loss = best
    own_loss = _F32(np.inf)
    for _ in range(passes):
        d, dmin = _F32(f16_value(d_bits) / grow), _F32(f16_value(dmin_bits) / grow)
        choose_codes(s, sub_block_len, code_max, scale_max, d, dmin)
        for _ in range(_REFITS + 1):
            d, dmin = _F32(f16_value(d_bits) / grow), _F32(f16_value(dmin_bits) / grow)
            loss, new_d, new_dmin = refit(s, sub_block_len, code_max, d, dmin)
            if loss < best_loss:
                best_d_bits, best_dmin_bits, best_loss = d_bits, dmin_bits, loss
                s.best_scale_code[:] = s.scale_code
                s.best_offset_code[:] = s.offset_code
            elif not loss < own_loss:
                break
            own_loss = loss
            d_bits, dmin_bits = f16_bits(_F32(new_d * grow)), f16_bits(_F32(new_dmin * grow))
        d_bits, dmin_bits, own_loss = best_d_bits, best_dmin_bits, best_loss
    return best_d_bits, best_dmin_bits, best_loss


@jit
def fit_block(
    s: Scratch,
    sub_block_len: int,
    code_max: np.float32,
    scale_max: np.float32,
    reach: F32Array,
    passes: int,
    rare: np.float32,
    grow: float,
) -> tuple[np.uint16, np.uint16]:
    """Finds the block's F16 bits of `d` and `dmin`; leaves integer scales, offsets and codes in the scratch.

    Args:
        code_max, scale_max: the largest code of a weight, and of a sub-block's scale and offset.
        reach: see `fit_sub_blocks`.
        passes: how often the sub-blocks may choose again under a refitted `d` and `dmin`.
        rare: blocks that keep an error below this share of their energy are searched again.
        grow: the factor `take_block` returned.
    """
    n_sub_blocks = 256 // sub_block_len
    fit_sub_blocks(s, sub_block_len, code_max, reach)
    d_bits = f16_bits(_F32(best_super_scale(s.scale, s.curvature, n_sub_blocks, scale_max) * grow))
    dmin_bits = f16_bits(_F32(best_super_scale(s.offset, s.weight, n_sub_blocks, scale_max) * grow))
    best = d_bits, dmin_bits, _F32(np.inf)
    best = settle(s, sub_block_len, code_max, scale_max, passes, grow, d_bits, dmin_bits, best)
    whole, zeros = energy_and_zeros(s)
    if best[2] < rare * whole or zeros > _SPARSE:
        best = look_closer(s, sub_block_len, code_max, scale_max, passes, grow, whole, bool(zeros > _SPARSE), best)

    d, dmin = _F32(f16_value(best[0]) / grow), _F32(f16_value(best[1]) / grow)
    for j in range(n_sub_blocks):
        scale, offset = d * s.best_scale_code[j], dmin * s.best_offset_code[j]
        inverse = _F32(1.0) / scale if scale > _TINY else _F32(0.0)
        for i in range(j * sub_block_len, (j + 1) * sub_block_len):
            s.codes[i] = np.uint8(min(max(np.rint(s.x[i] * inverse + offset * inverse), _F32(0.0)), code_max))
    return best[0], best[1]


@jit
def energy_and_zeros(s: Scratch) -> tuple[np.float32, np.float32]:
    """The error of a block of zeros, and how many weights are zero."""
    squares, zeros = splat(0.0), splat(0.0)
    for i in range(0, 256, 16):
        v = load(s.x, i)
        squares += v * v * load(s.w, i)
        zeros += where_less(splat(0.0), v * v, splat(0.0), splat(1.0))
    return total(squares), total(zeros)


@jit
def look_closer(
    s: Scratch,
    sub_block_len: int,
    code_max: np.float32,
    scale_max: np.float32,
    passes: int,
    grow: float,
    whole: np.float32,
    is_sparse: bool,
    best: tuple[np.uint16, np.uint16, np.float32],
) -> tuple[np.uint16, np.uint16, np.float32]:
    """Searches again in a block that codes fit almost exactly, as weights of few values or under few columns are.

    There many lines suit a sub-block equally well, and what counts is that all sub-blocks can use the same `d`. So all
    of them take the same number of steps, and where only the rounding of `d` to F16 is left, fifteen larger ones are
    tried, too.
    """
    n_sub_blocks = 256 // sub_block_len
    steps = np.empty(16, np.float32)
    is_exact = False
    for fewer in range(_FEWEST):
        if fewer >= code_max or (fewer >= _FEWER and not is_exact):
            break
        steps[:] = (code_max - _F32(fewer)) / code_max
        fit_sub_blocks(s, sub_block_len, code_max, steps)
        d = best_super_scale(s.scale, s.curvature, n_sub_blocks, scale_max) * grow
        dmin = best_super_scale(s.offset, s.weight, n_sub_blocks, scale_max) * grow
        d_bits, dmin_bits = f16_bits(_F32(d)), f16_bits(_F32(dmin))
        best = settle(s, sub_block_len, code_max, scale_max, passes, grow, d_bits, dmin_bits, best)
        # relative to d, half a step of its F16
        coarse = _F32(1.0) / _F32(min(max(best[0], np.uint16(1)), np.uint16(1024)))
        is_exact = bool(best[2] < _EXACT * coarse * coarse * whole)
        if is_exact or is_sparse:
            for below in range(1, 16):
                larger = np.float64(scale_max / (scale_max - _F32(below)))
                best = settle(
                    s, sub_block_len, code_max, scale_max, passes, grow, f16_bits(_F32(d * larger)), dmin_bits, best
                )
                other = f16_bits(_F32(dmin * larger))
                best = settle(s, sub_block_len, code_max, scale_max, passes, grow, best[0], other, best)
    return best


@jit
def pack_six_bits(s: Scratch, packed: U8Array) -> None:
    """Packs 8 scales and 8 offsets of 6 bits into u8[12], as Q4_K and Q5_K store them.

    Bytes 0-3: scales 0-3, above them the top two bits of scales 4-7. Bytes 4-7: the same of the offsets.
    Bytes 8-11: low four bits of scales 4-7, above them those of offsets 4-7.
    """
    for j in range(4):
        scale, high_scale = np.uint8(s.best_scale_code[j]), np.uint8(s.best_scale_code[j + 4])
        offset, high_offset = np.uint8(s.best_offset_code[j]), np.uint8(s.best_offset_code[j + 4])
        packed[j] = scale | (high_scale >> 4 << 6)
        packed[j + 4] = offset | (high_offset >> 4 << 6)
        packed[j + 8] = (high_scale & 15) | ((high_offset & 15) << 4)


@jit
def unpack_six_bits(packed: U8Array, j: int) -> tuple[np.float32, np.float32]:
    """Scale and offset of sub-block `j`: what `pack_six_bits` packed."""
    if j < 4:
        return _F32(packed[j] & 63), _F32(packed[j + 4] & 63)
    scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4)
    return _F32(scale), _F32((packed[j + 4] >> 4) | (packed[j] >> 6 << 4))

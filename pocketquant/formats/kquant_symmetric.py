"""The search behind Q6_K and Q3_K: weight = d * scale code * code.

A block of 256 weights has one F16 number, `d`; each of its 16 sub-blocks of 16 weights has a small signed integer
scale. Codes run from -n to n - 1, so the sign of a scale decides which end of a sub-block gets the extra code. The
search minimises sum importance * (weight - decoded)**2:

1. `fit_sub_blocks`: every sub-block alone. Sixteen scales compete, one a lane; the best scale for the codes that each
   gives has a closed form.
2. `best_super_scale`: the `d` whose multiples come nearest to what the sub-blocks want.
3. `choose_codes` and `refit`: sixteen integer scales around each sub-block's wish compete with the codes they really
   lead to; then `d` is solved again for the codes chosen, as long as that helps.
4. `look_closer`, in rare blocks that are mostly zeros, of one sign, or that codes fit almost exactly: starts where the
   sub-blocks agree.

Sources: the layouts and the idea of sub-block fits are ggml's (ggml-quants.c of llama.cpp); weighted least squares
with alternating assignment is Lloyd, "Least squares quantization in PCM", 1982.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array
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
_REFITS = 2
_EXACT = _F32(3.0)  # an error of so many squared steps of `d` comes from its rounding
_SPARSE = _F32(208.0)  # zeros in a block that are many
_TINY = _F32(1e-36)  # scales below have no finite inverse
# Candidates of `best_super_scale`: how far below the highest integer the largest wish shall land.
_BELOW_TOP = (np.arange(16) / 2.0).astype(np.float32)
# Candidates of `choose_codes`: steps from the wished scale, the shortest first: among equals the first lane wins.
_STEP = np.array([0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -7, 7, -8], np.float32)


class Scratch(NamedTuple):
    """Room for one block; arrays of 16 have one place for each sub-block.

    Attributes:
        x, w: f32[256], weights and importance.
        scale: what each sub-block wants, unquantized.
        curvature: how much it minds: the second derivative of its error by scale.
        scale_code: its integer, as f32; `best_scale_code` belongs to the best error so far.
        codes: i32[256], from -n to n - 1.
    """

    x: F32Array
    w: F32Array
    scale: F32Array
    curvature: F32Array
    scale_code: F32Array
    best_scale_code: F32Array
    codes: npt.NDArray[np.int32]


@jit
def new_scratch() -> Scratch:
    """Room for one block, uninitialised."""
    place = np.zeros((4, 16), np.float32)
    block = np.empty((2, 256), np.float32)
    return Scratch(block[0], block[1], place[0], place[1], place[2], place[3], np.empty(256, np.int32))


@jit
def fit_sub_blocks(s: Scratch, n: np.float32, reach: F32Array) -> None:
    """Fits every sub-block on its own: fills scales and curvatures.

    Args:
        reach: f32[16], the candidates: the code of the sub-block's largest weight, as a multiple of -n.
    """
    zero = splat(0.0)
    for j in range(16):
        v = load(s.x, 16 * j)
        high, low = largest(v), smallest(v)
        peak = high if high > -low else low
        inverse = load(reach, 0) * (-n / peak if peak != 0.0 else _F32(0.0))
        sum_qq, sum_qx = zero, zero
        for i in range(16 * j, 16 * j + 16):
            q = lowest(highest(rounded(inverse * s.x[i]), 0.0 - n), n - 1.0)
            wq = q * s.w[i]
            sum_qq += wq * q
            sum_qx += wq * s.x[i]
        scale = where_less(splat(1e-30), sum_qq, sum_qx / sum_qq, zero)
        gain = scale * sum_qx
        k = first_equal(gain, largest(gain))
        s.scale[j] = lane(scale, k)
        s.curvature[j] = lane(sum_qq, k)


@jit
def best_super_scale(s: Scratch, scale_n: np.float32) -> np.float32:
    """The number whose multiples, -scale_n to scale_n - 1 times, come nearest to the wished scales."""
    peak = _F32(0.0)
    for j in range(16):
        if abs(s.scale[j]) > abs(peak):
            peak = s.scale[j]
    if peak == 0.0:
        return _F32(0.0)
    unit = peak / (load(_BELOW_TOP, 0) - scale_n)
    inverse = 1.0 / unit
    loss, uu, ux = splat(0.0), splat(0.0), splat(0.0)
    for j in range(16):
        code = lowest(highest(rounded(inverse * s.scale[j]), 0.0 - scale_n), scale_n - 1.0)
        miss = code * unit - s.scale[j]
        loss += miss * miss * s.curvature[j]
        uu += code * code * s.curvature[j]
        ux += code * (s.scale[j] * s.curvature[j])
    k = first_equal(loss, smallest(loss))
    return lane(ux, k) / lane(uu, k) if lane(uu, k) > 0.0 else lane(unit, k)


@jit
def choose_codes(s: Scratch, n: np.float32, scale_n: np.float32, d: np.float32) -> None:
    """Chooses every sub-block's integer scale under a given `d`."""
    per_d = _F32(1.0) / d if d != 0.0 else _F32(0.0)
    for j in range(16):
        scale_code = load(_STEP, 0) + np.rint(s.scale[j] * per_d)
        scale_code = lowest(highest(scale_code, 0.0 - scale_n), scale_n - 1.0)
        scale = scale_code * d
        inverse = where_less(splat(_TINY), highest(scale, 0.0 - scale), 1.0 / scale, splat(0.0))
        loss = splat(0.0)
        for i in range(16 * j, 16 * j + 16):
            q = lowest(highest(rounded(inverse * s.x[i]), 0.0 - n), n - 1.0)
            miss = q * scale - s.x[i]
            loss += miss * miss * s.w[i]
        s.scale_code[j] = lane(scale_code, first_equal(loss, smallest(loss)))


@jit
def refit(s: Scratch, n: np.float32, d: np.float32) -> tuple[np.float32, np.float32]:
    """The block's error under `d`, and the `d` that fits its codes best."""
    loss, uu, ux = splat(0.0), splat(0.0), splat(0.0)
    for j in range(16):
        v, weight = load(s.x, 16 * j), load(s.w, 16 * j)
        scale = d * s.scale_code[j]
        inverse = _F32(1.0) / scale if abs(scale) > _TINY else _F32(0.0)
        q = lowest(highest(rounded(v * inverse), 0.0 - n), n - 1.0)
        miss = q * scale - v
        loss += miss * miss * weight
        u = q * s.scale_code[j]
        uu += weight * u * u
        ux += weight * u * v
    below = total(uu)
    return total(loss), total(ux) / below if below > 0.0 else d


@jit
def settle(
    s: Scratch,
    n: np.float32,
    scale_n: np.float32,
    passes: int,
    grow: float,
    d_bits: np.uint16,
    best: tuple[np.uint16, np.float32],
) -> tuple[np.uint16, np.float32]:
    """Chooses integers and refits from a start of `d`; keeps what is better than `best`.

    `best` and the result are the F16 bits of `d` and the error they leave.
    """
    best_bits, best_loss = best
    own_loss = _F32(np.inf)
    for _ in range(passes):
        choose_codes(s, n, scale_n, _F32(f16_value(d_bits) / grow))
        for _ in range(_REFITS + 1):
            loss, new_d = refit(s, n, _F32(f16_value(d_bits) / grow))
            if loss < best_loss:
                best_bits, best_loss = d_bits, loss
                s.best_scale_code[:] = s.scale_code
            elif not loss < own_loss:
                break
            own_loss = loss
            d_bits = f16_bits(_F32(new_d * grow))
        d_bits, own_loss = best_bits, best_loss
    return best_bits, best_loss


@jit
def fit_block(
    s: Scratch,
    n: np.float32,
    scale_n: np.float32,
    reach: F32Array,
    closer: F32Array,
    passes: int,
    rare: np.float32,
    grow: float,
) -> np.uint16:
    """Finds the block's F16 bits of `d`; leaves integer scales and codes in the scratch.

    Args:
        n, scale_n: codes run from -n to n - 1, integer scales from -scale_n to scale_n - 1.
        reach: see `fit_sub_blocks`.
        closer: f32[m, 16], what `reach` becomes one after the other in blocks that are searched again.
        passes: how often the sub-blocks may choose again under a refitted `d`.
        rare: blocks that keep an error below this share of their energy are searched again.
        grow: the factor `take_block` returned.
    """
    fit_sub_blocks(s, n, reach)
    d_bits = f16_bits(_F32(best_super_scale(s, scale_n) * grow))
    best = settle(s, n, scale_n, passes, grow, d_bits, (d_bits, _F32(np.inf)))
    whole, is_sparse, is_one_sided = energy_and_oddness(s)
    if best[1] < rare * whole or is_sparse or is_one_sided:
        best = look_closer(s, n, scale_n, closer, passes, grow, whole, is_sparse, best)

    d = _F32(f16_value(best[0]) / grow)
    for j in range(16):
        scale = d * s.best_scale_code[j]
        inverse = _F32(1.0) / scale if abs(scale) > _TINY else _F32(0.0)
        for i in range(16 * j, 16 * j + 16):
            s.codes[i] = np.int32(min(max(np.rint(s.x[i] * inverse), -n), n - _F32(1.0)))
    return best[0]


@jit
def energy_and_oddness(s: Scratch) -> tuple[np.float32, bool, bool]:
    """The error of a block of zeros; whether most weights are zero; whether all have one sign."""
    squares, zeros, lows, highs = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for i in range(0, 256, 16):
        v = load(s.x, i)
        squares += v * v * load(s.w, i)
        zeros += where_less(splat(0.0), v * v, splat(0.0), splat(1.0))
        lows, highs = lowest(lows, v), highest(highs, v)
    return total(squares), total(zeros) > _SPARSE, smallest(lows) == 0.0 or largest(highs) == 0.0


@jit
def look_closer(
    s: Scratch,
    n: np.float32,
    scale_n: np.float32,
    closer: F32Array,
    passes: int,
    grow: float,
    whole: np.float32,
    is_sparse: bool,
    best: tuple[np.uint16, np.float32],
) -> tuple[np.uint16, np.float32]:
    """Searches again in a block that codes fit almost exactly, as weights of few values or under few columns are.

    There many scales suit a sub-block equally well, and what counts is that all sub-blocks can use the same `d`. So all
    of them take the same number of steps, and where only the rounding of `d` to F16 is left, others are tried, too.
    """
    for v in range(closer.shape[0]):
        fit_sub_blocks(s, n, closer[v])
        d = best_super_scale(s, scale_n) * grow
        best = settle(s, n, scale_n, passes, grow, f16_bits(_F32(d)), best)
        # relative to d, half a step of its F16
        coarse = _F32(1.0) / _F32(min(max(best[0] & np.uint16(0x7FFF), np.uint16(1)), np.uint16(1024)))
        if best[1] < _EXACT * coarse * coarse * whole or is_sparse:
            for below in range(1, 16, 2):
                other = f16_bits(_F32(d * np.float64(scale_n / (scale_n - _F32(below)))))
                best = settle(s, n, scale_n, passes, grow, other, best)
    return best

"""The search behind Q6_K and Q3_K: weight = d * scale code * code.

A block of 256 weights has one F16 number, `d`; each of its 16 parts of 16 weights has a small signed integer scale.
Codes run from -n to n - 1, so the sign of a scale decides which end of a part gets the extra code. The search
minimises sum importance * (weight - decoded)**2:

1. `fit_parts`: every part alone. Sixteen scales compete, one a lane; the best scale for the codes that each gives has
   a closed form.
2. `best_unit`: the `d` whose multiples come nearest to what the parts want.
3. `choose_codes` and `refit`: sixteen integer scales around each part's wish compete with the codes they really lead
   to; then `d` is solved again for the codes chosen, as long as that helps.

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
_TINY = _F32(1e-36)  # scales below have no finite inverse
# Candidates of `best_unit`: how far below the highest integer the largest wish shall land.
_BELOW_TOP = (np.arange(16) / 2.0).astype(np.float32)
# Candidates of `choose_codes`: steps from the wished scale, the shortest first: among equals the first lane wins.
_STEP = np.array([0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -7, 7, -8], np.float32)


class Scratch(NamedTuple):
    """Room for one block; arrays of 16 have one place a part.

    Attributes:
        x, w: f32[256], weights and importance.
        scale: what each part wants, unquantized.
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
    part = np.zeros((4, 16), np.float32)
    block = np.empty((2, 256), np.float32)
    return Scratch(block[0], block[1], part[0], part[1], part[2], part[3], np.empty(256, np.int32))


@jit
def fit_parts(s: Scratch, n: np.float32, reach: F32Array) -> None:
    """Fits every part on its own: fills scales and curvatures.

    Args:
        reach: f32[16], the candidates: the code of the part's largest weight, as a multiple of -n.
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
def best_unit(s: Scratch, scale_n: np.float32) -> np.float32:
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
    """Chooses every part's integer scale under a given `d`."""
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
def fit_block(s: Scratch, n: np.float32, scale_n: np.float32, reach: F32Array, passes: int, grow: float) -> np.uint16:
    """Finds the block's F16 bits of `d`; leaves integer scales and codes in the scratch.

    Args:
        n, scale_n: codes run from -n to n - 1, integer scales from -scale_n to scale_n - 1.
        reach: see `fit_parts`.
        passes: how often the parts may choose again under a refitted `d`.
        grow: the factor `take_block` returned.
    """
    fit_parts(s, n, reach)
    d_bits = f16_bits(_F32(best_unit(s, scale_n) * grow))
    best_bits, best_loss = d_bits, _F32(np.inf)
    for _ in range(passes):
        choose_codes(s, n, scale_n, _F32(f16_value(d_bits) / grow))
        for _ in range(_REFITS + 1):
            loss, new_d = refit(s, n, _F32(f16_value(d_bits) / grow))
            if not loss < best_loss:
                break
            best_bits, best_loss = d_bits, loss
            s.best_scale_code[:] = s.scale_code
            d_bits = f16_bits(_F32(new_d * grow))
        d_bits = best_bits

    d = _F32(f16_value(best_bits) / grow)
    for j in range(16):
        scale = d * s.best_scale_code[j]
        inverse = _F32(1.0) / scale if abs(scale) > _TINY else _F32(0.0)
        for i in range(16 * j, 16 * j + 16):
            s.codes[i] = np.int32(min(max(np.rint(s.x[i] * inverse), -n), n - _F32(1.0)))
    return best_bits

"""F16 inside numba kernels: bits and values of one half-precision number, in 32-bit integer and float arithmetic only.

numba has no half-precision type on CPUs, and LLVM's own conversion needs a library call where the CPU lacks F16C;
these few operations give the same bits on every machine and vectorize. They equal `numpy.float16` except that
a magnitude beyond the range becomes the largest finite number, because a scale in a file must never be infinite.

Source: IEEE 754-2019, binary16 and roundTiesToEven.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array
from pocketquant.formats.kernel import jit

F16_MAX = np.float32(65504.0)
_MAX_BITS = np.uint32(0x477FE000)  # 65504 as f32
_SUSPICIOUS = 0x7000  # bits of 8192
_MIN_NORMAL_BITS = np.uint32(0x38800000)  # 2^-14 as f32


@jit
def f16_bits(x: np.float32) -> np.uint16:
    """Bits of the half nearest to a finite f32, ties to even; clamps to +-65504."""
    bits = np.float32(x).view(np.uint32)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = np.uint32(min(np.uint32(bits & np.uint32(0x7FFFFFFF)), _MAX_BITS))
    even = (magnitude >> np.uint32(13)) & np.uint32(1)
    normal = np.uint32(np.uint32(magnitude + np.uint32(0xFFF) + even) - np.uint32(112 << 23)) >> np.uint32(13)
    # 0.5 has the ulp of half's subnormals, so the addition itself rounds
    shifted = np.float32(np.uint32(magnitude).view(np.float32) + np.float32(0.5))
    subnormal = np.uint32(shifted.view(np.uint32) - np.uint32(0x3F000000))
    return np.uint16(sign | (normal if magnitude >= _MIN_NORMAL_BITS else subnormal))


@jit
def f16_value(bits: np.uint16) -> np.float32:
    """The f32 that a half's bits mean, exactly; infinities and NaNs stay so."""
    word = np.uint32(bits)
    magnitude = np.uint32(word & np.uint32(0x7FFF))
    sign = np.uint32((word & np.uint32(0x8000)) << np.uint32(16))
    rebias = np.uint32((255 - 31) << 23) if magnitude >= np.uint32(0x7C00) else np.uint32(112 << 23)
    normal = np.uint32(np.uint32(magnitude << np.uint32(13)) + rebias)
    subnormal = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24)).view(np.uint32)
    return np.uint32(sign | (normal if magnitude >= np.uint32(0x400) else subnormal)).view(np.float32)


@jit
def f16_round(x: np.float32) -> np.float32:
    """The half nearest to a finite f32, as f32: `f16_value(f16_bits(x))`."""
    return f16_value(f16_bits(x))


def refuse_beyond(name: str, steps: int, rows: F32Array, *scales: npt.NDArray[np.uint16]) -> None:
    """Checks that the weights were within what a block can hold, at the cost of a look at its scales.

    Args:
        name: the format's.
        steps: the largest multiple of a scale that every block can hold with either sign.
        rows: f32[n, k], the weights.
        scales: bits of the halves that encoding them led to; without any, every weight is looked at.

    Raises:
        OverflowError: a weight is beyond that.
    """
    # a search may end with a scale somewhat below what the block's extreme asks for
    if not rows.size or (scales and max(int((bits & np.uint16(0x7FFF)).max()) for bits in scales) < _SUSPICIOUS):
        return
    largest, worst = steps * float(F16_MAX), max(float(rows.max()), -float(rows.min()))
    if worst > largest:
        raise OverflowError(
            f"weight of magnitude {worst:g} is beyond the range of {name} ({largest:g}); use bf16 or f32"
        )

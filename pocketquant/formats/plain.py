"""F32, F16 and BF16: no blocks, only a cast, and the checks that a cast needs.

BF16 rounds to nearest, ties to even, as llama.cpp and torch do. F16 raises on a weight beyond its range rather than
write an infinity.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array, U8Array

F16_MAX = 65504.0
_EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}


def encode_f32(rows: F32Array, importance: F32Array | None = None) -> U8Array:
    """f32[n, k] -> u8[n, 4k]."""
    return np.ascontiguousarray(rows, dtype="<f4").view(np.uint8)


def decode_f32(data: U8Array, n_cols: int) -> F32Array:
    """u8[n, 4k] -> f32[n, k]."""
    return np.ascontiguousarray(data).view("<f4")


def encode_f16(rows: F32Array, importance: F32Array | None = None) -> U8Array:
    """f32[n, k] -> u8[n, 2k].

    Raises:
        OverflowError: a weight is beyond the range of F16.
    """
    with np.errstate(over="ignore"):
        halves = rows.astype("<f2")
    if np.isinf(halves).any():
        worst = float(np.abs(rows).max())
        raise OverflowError(f"weight of magnitude {worst:g} is beyond the range of F16 ({F16_MAX:g}); use bf16 or f32")
    return halves.view(np.uint8)


def decode_f16(data: U8Array, n_cols: int) -> F32Array:
    """u8[n, 2k] -> f32[n, k]."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def encode_bf16(rows: F32Array, importance: F32Array | None = None) -> U8Array:
    """f32[n, k] -> u8[n, 2k], rounding to nearest, ties to even."""
    bits = np.ascontiguousarray(rows, dtype="<f4").view("<u4")
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return rounded.astype("<u2").view(np.uint8)


def decode_bf16(data: U8Array, n_cols: int) -> F32Array:
    """u8[n, 2k] -> f32[n, k]."""
    return (np.ascontiguousarray(data).view("<u2").astype("<u4") << np.uint32(16)).view("<f4")


def is_finite(data: npt.NDArray[np.generic], dtype: str) -> bool:
    """Whether stored words (`F32` as u4 or f4, `F16` and `BF16` as u2) hold no infinity and no NaN."""
    width = 4 if dtype == "F32" else 2
    positive, negative = data.view(f"<i{width}"), data.view(f"<u{width}")
    if not data.size:
        return True
    # all exponent bits set is more than any finite number: as signed words among those without a sign, as unsigned
    # words among those with one
    exponent = _EXPONENT[dtype]
    return bool(positive.max() < exponent and negative.max() < exponent | 1 << (8 * width - 1))

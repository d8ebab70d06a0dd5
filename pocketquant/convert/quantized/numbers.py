"""Small number formats -> f32, bit fields out of 32-bit words, and f32 -> the words of a plain format.

Sources: OCP 8-bit Floating Point Specification 1.0 (E4M3 without infinities, E5M2), OCP Microscaling Formats 1.0
(E8M0, E2M1).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.plain import decode_bf16, encode_bf16

U32Array = npt.NDArray[np.uint32]


def _e4m3() -> F32Array:
    code = np.arange(256)
    sign, exponent, mantissa = np.where(code < 128, 1.0, -1.0), code >> 3 & 15, code & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    return np.where(code & 127 == 127, np.nan, sign * values).astype(np.float32)


def _e5m2() -> F32Array:
    return (np.arange(256, dtype="<u2") << 8).view("<f2").astype(np.float32)  # the upper half of an F16


def _e8m0() -> F32Array:
    return np.where(np.arange(256) == 255, np.nan, 2.0 ** (np.arange(256) - 127.0)).astype(np.float32)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
"""Values of the 16 codes of FP4."""

_BYTE_VALUES = {"F8_E4M3": _e4m3(), "F8_E5M2": _e5m2(), "F8_E8M0": _e8m0()}
_PLAIN = {"F32": "<f4", "F16": "<f2", "I8": "<i1", "U8": "<u1", "I32": "<i4", "I64": "<i8"}

FLOATS = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0")


def floats(words: npt.NDArray[np.generic], dtype: str) -> F32Array:
    """Stored words of any shape -> f32, exactly (I32 and I64 above 2^24 excepted)."""
    if dtype in _BYTE_VALUES:
        return _BYTE_VALUES[dtype][words]
    words = np.ascontiguousarray(words)
    if dtype == "BF16":
        return decode_bf16(words.view(np.uint8), 0)
    return words.view(_PLAIN[dtype]).astype(np.float32)


def rounded_words(values: F32Array, dtype: str) -> npt.NDArray[np.generic]:
    """f32[n, k] -> the words of F32 (`<u4`), BF16 or F16 (`<u2`), to nearest, ties to even; NaN and infinity stay."""
    if dtype == "F32":
        return np.ascontiguousarray(values, dtype="<f4").view("<u4")
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype("<f2").view("<u2")
    words = encode_bf16(values).view("<u2")
    is_nan = np.isnan(values)  # rounding the bits of a NaN could carry it into a number
    return np.where(is_nan, np.uint16(0x7FC0), words) if is_nan.any() else words


def bit_fields(words: U32Array, bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The first `count` fields of `bits` (1 to 8) along the last axis, lowest bits first; a field may cross words.

    Args:
        words: u32[..., w] with w * 32 >= count * bits.

    Returns:
        u8[..., count].
    """
    mask = np.uint32((1 << bits) - 1)
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        fields = (words[..., None] >> shifts & mask).astype(np.uint8)
        return fields.reshape(*words.shape[:-1], -1)[..., :count]
    first = np.arange(count) * bits
    word, shift = first // 32, (first % 32).astype(np.uint32)
    fields = words[..., word] >> shift
    crosses = shift + bits > 32
    fields[..., crosses] |= words[..., word[crosses] + 1] << (np.uint32(32) - shift[crosses])
    return (fields & mask).astype(np.uint8)


def nibbles(packed: U8Array, *, high_first: bool = False) -> U8Array:
    """u8[..., n] -> u8[..., 2n], two codes a byte, the low half first unless `high_first`."""
    halves = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return np.stack(halves, axis=-1).reshape(*packed.shape[:-1], -1)

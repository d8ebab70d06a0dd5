"""MXFP4 and NVFP4, read only: four-bit floats with eight-bit floats as scales, 4.25 and 4.5 bits a weight.

Source for the layouts: block_mxfp4 and block_nvfp4 in ggml-common.h, the scales' formats in ggml-impl.h of llama.cpp
b10359; OCP Microscaling Formats (MX) Specification 1.0 for E2M1 and E8M0.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.kernel import jit
from pocketquant.formats.kquant_block import decode_rows

# Byte j of each `qs` holds the code of weight j below, of weight j + (half of the weights) above.
MXFP4 = np.dtype([("e", "u1"), ("qs", "u1", (1, 16))])  # e: exponent of the scale of 32 weights
NVFP4 = np.dtype([("d", "u1", 4), ("qs", "u1", (4, 8))])  # d: scales of sixteen weights each

# Twice the values of E2M1, so that they are whole; the scales below are halved. ggml has no negative zero.
_LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _e8m0_halves() -> F32Array:
    """Half the scale that each byte of MXFP4 means: powers of two; byte 255 is one more here, no NaN."""
    return np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)


def _e4m3_halves() -> F32Array:
    """Half the scale that each byte of NVFP4 means: four bits exponent, three mantissa.

    The topmost bit says nothing, and 127, a NaN in the standard, is no scale at all; 255 is a number like any other.
    """
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    value = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(1 + mantissa / 8, exponent - 7))
    value[127] = 0
    return (value / 2).astype(np.float32)


_E8M0, _E4M3 = _e8m0_halves(), _e4m3_halves()


def decode_mxfp4(data: U8Array, n_cols: int) -> F32Array:
    """Decodes u8[n, n_cols / 32 * 17] to f32[n, n_cols], with the bits of ggml's own."""
    return decode_rows(partial(_decode_mxfp4, _E8M0), MXFP4, data, n_cols)


def decode_nvfp4(data: U8Array, n_cols: int) -> F32Array:
    """Decodes u8[n, n_cols / 64 * 36] to f32[n, n_cols], with the bits of ggml's own."""
    return decode_rows(partial(_decode_nvfp4, _E4M3), NVFP4, data, n_cols)


@jit
def _write_codes(row: F32Array, first: int, scale: np.float32, qs: U8Array) -> None:
    for j in range(qs.shape[0]):
        row[first + j] = _LEVELS[qs[j] & 15] * scale
        row[first + j + qs.shape[0]] = _LEVELS[qs[j] >> 4] * scale


@jit
def _decode_mxfp4(scales: F32Array, blocks: npt.NDArray[Any], rows: F32Array) -> None:
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            _write_codes(rows[r], 32 * b, scales[blocks[r, b].e], blocks[r, b].qs[0])


@jit
def _decode_nvfp4(scales: F32Array, blocks: npt.NDArray[Any], rows: F32Array) -> None:
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            d, qs = blocks[r, b].d, blocks[r, b].qs
            for part in range(4):
                _write_codes(rows[r], 64 * b + 16 * part, scales[d[part]], qs[part])

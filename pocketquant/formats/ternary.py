"""TQ1_0, TQ2_0 and Q1_0, read only: weights of three levels (-1, 0, 1), or two (-1, 1), times a block's scale.

Source for the layouts: block_tq1_0, block_tq2_0 and block_q1_0 in ggml-common.h, dequantize_row_* of the same names in
ggml-quants.c of llama.cpp b10359.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.half import f16_value
from pocketquant.formats.kernel import jit
from pocketquant.formats.kquant_block import decode_rows

# A byte of TQ1_0 is a fraction of 256: its first digits in base three, rounded up, are the levels.
TQ1_0 = np.dtype(
    [
        (
            "qs",
            "u1",
            48,
        ),  # five digits a byte: digit n of byte m is weight 32 n + m, of the last 16 bytes 160 + 16 n + m
        ("qh", "u1", 4),  # four digits a byte: digit n of byte m is weight 240 + 4 n + m
        ("d", "<u2"),  # F16 bits of the scale
    ]
)
TQ2_0 = np.dtype(
    [
        ("qs", "u1", 64),  # byte 32 h + i: from bit 2 q on, the level of weight 128 h + 32 q + i
        ("d", "<u2"),
    ]
)
Q1_0 = np.dtype([("d", "<u2"), ("qs", "u1", 16)])  # a bit for each of 128 weights, 0 for -1


def decode_tq1_0(data: U8Array, n_cols: int) -> F32Array:
    """Decodes u8[n, n_cols / 256 * 54] to f32[n, n_cols], with the bits of ggml's own."""
    return decode_rows(_decode_tq1_0, TQ1_0, data, n_cols)


def decode_tq2_0(data: U8Array, n_cols: int) -> F32Array:
    """Decodes u8[n, n_cols / 256 * 66] to f32[n, n_cols], with the bits of ggml's own."""
    return decode_rows(_decode_tq2_0, TQ2_0, data, n_cols)


def decode_q1_0(data: U8Array, n_cols: int) -> F32Array:
    """Decodes u8[n, n_cols / 128 * 18] to f32[n, n_cols], with the bits of ggml's own."""
    return decode_rows(_decode_q1_0, Q1_0, data, n_cols)


@jit
def _write_digits(row: F32Array, first: int, d: np.float32, data: U8Array, start: int, stop: int, n_digit: int) -> None:
    for m in range(start, stop):
        rest = np.int64(data[m])
        for n in range(n_digit):
            row[first + (stop - start) * n + m - start] = np.float32(rest * 3 // 256 - 1) * d
            rest = rest * 3 & 255


@jit
def _decode_tq1_0(blocks: npt.NDArray[Any], rows: F32Array) -> None:
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block = blocks[r, b]
            d, qs, qh = f16_value(block.d), block.qs, block.qh
            _write_digits(rows[r], 256 * b, d, qs, 0, 32, 5)
            _write_digits(rows[r], 256 * b + 160, d, qs, 32, 48, 5)
            _write_digits(rows[r], 256 * b + 240, d, qh, 0, 4, 4)


@jit
def _decode_tq2_0(blocks: npt.NDArray[Any], rows: F32Array) -> None:
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block = blocks[r, b]
            d, qs = f16_value(block.d), block.qs
            for i in range(256):
                code = (np.int64(qs[i // 128 * 32 + i % 32]) >> (i % 128 // 32 * 2)) & 3
                rows[r, 256 * b + i] = np.float32(code - 1) * d


@jit
def _decode_q1_0(blocks: npt.NDArray[Any], rows: F32Array) -> None:
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block = blocks[r, b]
            d, qs = f16_value(block.d), block.qs
            for i in range(128):
                rows[r, 128 * b + i] = d if (qs[i // 8] >> (i % 8)) & 1 else -d

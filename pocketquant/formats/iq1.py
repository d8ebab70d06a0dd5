"""IQ1_S and IQ1_M, read only: 1.56 and 1.75 bits a weight; groups of eight weights are points of one codebook.

A point's coordinates are -1, 0 and 1; a group shifts all of them up or down by an eighth before its scale.

Source for the layouts: block_iq1_s and block_iq1_m in ggml-common.h, dequantize_row_iq1_* in ggml-quants.c of
llama.cpp b10359.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.grids import codebook
from pocketquant.formats.half import f16_value
from pocketquant.formats.kernel import jit
from pocketquant.formats.kquant_block import decode_rows

IQ1_S = np.dtype(
    [
        ("d", "<u2"),  # F16 bits: super-block scale
        ("qs", "u1", 32),  # low eight bits of each group's point
        # for 32 weights: three high bits for each of four groups, the scale's three bits, the shift's sign on top
        ("qh", "<u2", 8),
    ]
)
IQ1_M = np.dtype(
    [
        ("qs", "u1", 32),  # low eight bits of each group's point
        ("qh", "u1", 16),  # a nibble for each group: three high bits, above them the shift's sign
        # each word: four scales of three bits, for sixteen weights each; on top a quarter of the bits of d, in F16
        ("scales", "<u2", 4),
    ]
)

_SHIFT = np.float32(0.125)


def decode_iq1_s(data: U8Array, n_cols: int) -> F32Array:
    """Decodes u8[n, n_cols / 256 * 50] to f32[n, n_cols], with the bits of ggml's own."""
    return decode_rows(partial(_decode_s, codebook("IQ1_S")), IQ1_S, data, n_cols)


def decode_iq1_m(data: U8Array, n_cols: int) -> F32Array:
    """Decodes u8[n, n_cols / 256 * 56] to f32[n, n_cols], with the bits of ggml's own."""
    return decode_rows(partial(_decode_m, codebook("IQ1_S")), IQ1_M, data, n_cols)


@jit
def _decode_s(points: F32Array, blocks: npt.NDArray[Any], rows: F32Array) -> None:
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block = blocks[r, b]
            d, qs, qh = f16_value(block.d), block.qs, block.qh
            for group in range(32):
                high = np.int32(qh[group // 4])
                scale = d * np.float32(2 * ((high >> 12) & 7) + 1)
                shift = -_SHIFT if high & 0x8000 else _SHIFT
                point = points[np.int32(qs[group]) | (((high >> (3 * (group % 4))) & 7) << 8)]
                for i in range(8):
                    rows[r, 256 * b + 8 * group + i] = scale * (point[i] + shift)


@jit
def _decode_m(points: F32Array, blocks: npt.NDArray[Any], rows: F32Array) -> None:
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block = blocks[r, b]
            qs, qh, scales = block.qs, block.qh, block.scales
            bits = np.uint32(0)
            for quarter in range(4):
                bits |= (np.uint32(scales[quarter]) >> np.uint32(12)) << np.uint32(4 * quarter)
            d = f16_value(np.uint16(bits))
            for group in range(32):
                code = (np.int32(scales[group // 8]) >> (3 * (group // 2 % 4))) & 7
                scale = d * np.float32(2 * code + 1)
                high = np.int32(qh[group // 2]) >> (4 * (group % 2))
                shift = -_SHIFT if high & 8 else _SHIFT
                point = points[np.int32(qs[group]) | ((high & 7) << 8)]
                for i in range(8):
                    rows[r, 256 * b + 8 * group + i] = scale * (point[i] + shift)

"""IQ3_XXS and IQ3_S, read only: 3.06 and 3.44 bits a weight; groups of four weights are points of a codebook.

Signs are stored apart, as in `iq2`.

Source for the layouts: block_iq3_* in ggml-common.h, dequantize_row_iq3_* in ggml-quants.c of llama.cpp b10359.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.grids import codebook
from pocketquant.formats.half import f16_value
from pocketquant.formats.iq2 import signs_of_seven, write_group
from pocketquant.formats.kernel import jit
from pocketquant.formats.kquant_block import decode_rows

IQ3_XXS = np.dtype(
    [
        ("d", "<u2"),  # F16 bits: super-block scale
        ("qs", "u1", 64),  # each group's point
        ("signs", "<u4", 8),  # for 32 weights: four times seven signs, one for two groups; above them the scale
    ]
)
IQ3_S = np.dtype(
    [
        ("d", "<u2"),
        ("qs", "u1", 64),  # low eight bits of each group's point
        ("qh", "u1", 8),  # bit i: the ninth bit of group i of eight
        ("signs", "u1", 32),  # for two groups each
        ("scales", "u1", 4),  # a nibble for every 32 weights
    ]
)


def decode_iq3_xxs(data: U8Array, n_cols: int) -> F32Array:
    """Decodes u8[n, n_cols / 256 * 98] to f32[n, n_cols], with the bits of ggml's own."""
    return decode_rows(partial(_decode_xxs, codebook("IQ3_XXS")), IQ3_XXS, data, n_cols)


def decode_iq3_s(data: U8Array, n_cols: int) -> F32Array:
    """Decodes u8[n, n_cols / 256 * 110] to f32[n, n_cols], with the bits of ggml's own."""
    return decode_rows(partial(_decode_s, codebook("IQ3_S")), IQ3_S, data, n_cols)


@jit
def _decode_xxs(points: F32Array, blocks: npt.NDArray[Any], rows: F32Array) -> None:
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block = blocks[r, b]
            d, qs, packed = f16_value(block.d), block.qs, block.signs
            for group in range(64):
                rest = np.int64(packed[group // 8])
                scale = (d * (np.float32(0.5) + np.float32(rest >> 28))) * np.float32(0.5)
                signs = signs_of_seven((rest >> (7 * (group // 2 % 4))) & 127) >> (group % 2 * 4)
                write_group(rows[r], 256 * b + 4 * group, scale, points[qs[group]], signs)


@jit
def _decode_s(points: F32Array, blocks: npt.NDArray[Any], rows: F32Array) -> None:
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block = blocks[r, b]
            d, qs, qh, packed, scales = f16_value(block.d), block.qs, block.qh, block.signs, block.scales
            for group in range(64):
                index = np.int64(qs[group]) | (((np.int64(qh[group // 8]) >> (group % 8)) & 1) << 8)
                code = (np.int64(scales[group // 16]) >> (group // 8 % 2 * 4)) & 15
                signs = np.int64(packed[group // 2]) >> (group % 2 * 4)
                write_group(rows[r], 256 * b + 4 * group, d * np.float32(1 + 2 * code), points[index], signs)

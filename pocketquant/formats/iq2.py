"""IQ2_XXS, IQ2_XS and IQ2_S, read only: 2.06 to 2.56 bits a weight; groups of eight weights are points of a codebook.

Points are positive; signs are stored apart, seven of a group's eight in the two smaller formats: their encoder leaves
an even number of weights negative, which gives the eighth. IQ3_XXS does the same.

Source for the layouts: block_iq2_* in ggml-common.h, dequantize_row_iq2_* in ggml-quants.c of llama.cpp b10359.
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

IQ2_XXS = np.dtype(
    [
        ("d", "<u2"),  # F16 bits: super-block scale
        # for 32 weights: four points of eight bits in the first word; in the second four times seven signs, the scale
        ("qs", "<u4", (8, 2)),
    ]
)
IQ2_XS = np.dtype(
    [
        ("d", "<u2"),
        ("qs", "<u2", 32),  # for each group: nine bits of the point, above them seven signs
        ("scales", "u1", 8),  # a nibble for every sixteen weights
    ]
)
IQ2_S = np.dtype(
    [
        ("d", "<u2"),
        ("qs", "u1", 32),  # low eight bits of each group's point
        ("signs", "u1", 32),
        ("qh", "u1", 8),  # for 32 weights: two high bits for each of four groups
        ("scales", "u1", 8),  # a nibble for every sixteen weights
    ]
)


def decode_iq2_xxs(data: U8Array, n_cols: int) -> F32Array:
    """Decodes u8[n, n_cols / 256 * 66] to f32[n, n_cols], with the bits of ggml's own."""
    return decode_rows(partial(_decode_xxs, codebook("IQ2_XXS")), IQ2_XXS, data, n_cols)


def decode_iq2_xs(data: U8Array, n_cols: int) -> F32Array:
    """Decodes u8[n, n_cols / 256 * 74] to f32[n, n_cols], with the bits of ggml's own."""
    return decode_rows(partial(_decode_xs, codebook("IQ2_XS")), IQ2_XS, data, n_cols)


def decode_iq2_s(data: U8Array, n_cols: int) -> F32Array:
    """Decodes u8[n, n_cols / 256 * 82] to f32[n, n_cols], with the bits of ggml's own."""
    return decode_rows(partial(_decode_s, codebook("IQ2_S")), IQ2_S, data, n_cols)


@jit
def signs_of_seven(bits: Any) -> Any:
    """Seven sign bits and, as the eighth, the one that makes the number of ones even."""
    parity = bits ^ (bits >> 4)
    parity ^= parity >> 2
    parity ^= parity >> 1
    return bits | ((parity & 1) << 7)


@jit
def write_group(row: F32Array, first: int, scale: np.float32, point: F32Array, signs: Any) -> None:
    """The weights of one group; bit i of `signs` makes weight i negative."""
    for i in range(point.shape[0]):
        value = scale * point[i]
        row[first + i] = -value if (signs >> i) & 1 else value


@jit
def _scale(d: np.float32, code: Any) -> Any:
    return (d * (np.float32(0.5) + np.float32(code))) * np.float32(0.25)


@jit
def _decode_xxs(points: F32Array, blocks: npt.NDArray[Any], rows: F32Array) -> None:
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block = blocks[r, b]
            d, qs = f16_value(block.d), block.qs
            for group in range(32):
                indices, rest = np.int64(qs[group // 4, 0]), np.int64(qs[group // 4, 1])
                point = points[(indices >> (8 * (group % 4))) & 255]
                signs = signs_of_seven((rest >> (7 * (group % 4))) & 127)
                write_group(rows[r], 256 * b + 8 * group, _scale(d, rest >> 28), point, signs)


@jit
def _decode_xs(points: F32Array, blocks: npt.NDArray[Any], rows: F32Array) -> None:
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block = blocks[r, b]
            d, qs, scales = f16_value(block.d), block.qs, block.scales
            for group in range(32):
                both = np.int64(qs[group])
                scale = _scale(d, (np.int64(scales[group // 4]) >> (group // 2 % 2 * 4)) & 15)
                write_group(rows[r], 256 * b + 8 * group, scale, points[both & 511], signs_of_seven(both >> 9))


@jit
def _decode_s(points: F32Array, blocks: npt.NDArray[Any], rows: F32Array) -> None:
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block = blocks[r, b]
            d, qs, signs, qh, scales = f16_value(block.d), block.qs, block.signs, block.qh, block.scales
            for group in range(32):
                index = np.int64(qs[group]) | (((np.int64(qh[group // 4]) >> (2 * (group % 4))) & 3) << 8)
                scale = _scale(d, (np.int64(scales[group // 4]) >> (group // 2 % 2 * 4)) & 15)
                write_group(rows[r], 256 * b + 8 * group, scale, points[index], np.int64(signs[group]))

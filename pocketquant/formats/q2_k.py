"""Q2_K: 2.625 bits a weight; 16 sub-blocks of 16 weights with 4-bit scales and offsets (`kquant_affine`).

Source for the layout: block_q2_K in ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.half import f16_value
from pocketquant.formats.kernel import jit
from pocketquant.formats.kquant_affine import fit_block, new_scratch
from pocketquant.formats.kquant_block import decode_rows, encode_rows, take_block
from pocketquant.formats.layout import Blocks, affine_layout, stacked

BLOCK = np.dtype(
    [
        ("scales", "u1", 16),  # byte j: scale of sub-block j, above it its offset
        ("qs", "u1", 64),  # byte 32 h + i: from bit 2 q on, the code of weight 128 h + 32 q + i
        ("d", "<u2"),  # F16 bits: super-block scale of the scales
        ("dmin", "<u2"),  # F16 bits: super-block scale of the offsets
    ]
)

_CODE_MAX, _SCALE_MAX = np.float32(3), np.float32(15)
_REACH = np.linspace(0.8, 1.8, 16).astype(np.float32)
_PASSES = 2
_RARE = np.float32(0.008)  # blocks that keep less of their energy as error are searched again


def encode_q2_k(rows: F32Array, importance: F32Array | None = None) -> U8Array:
    """Encodes f32[n, k] to u8[n, k / 256 * 84], minimising sum importance * (x - decoded)**2."""
    return encode_rows("Q2_K", 15, _encode, BLOCK, rows, importance)


def decode_q2_k(data: U8Array, n_cols: int) -> F32Array:
    """Decodes u8[n, n_cols / 256 * 84] to f32[n, n_cols], with the bits of ggml's own."""
    return decode_rows(_decode, BLOCK, data, n_cols)


@jit
def _encode(rows: F32Array, importance: F32Array, blocks: npt.NDArray[Any]) -> None:
    s = new_scratch()
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            grow = take_block(rows[r], importance, 256 * b, s.x, s.w)
            block = blocks[r, b]
            block.d, block.dmin = fit_block(s, 16, _CODE_MAX, _SCALE_MAX, _REACH, _PASSES, _RARE, grow)
            scales, qs = block.scales, block.qs
            for j in range(16):
                scales[j] = np.uint8(s.best_scale_code[j]) | (np.uint8(s.best_offset_code[j]) << 4)
            for h in range(2):
                for i in range(32):
                    at = 128 * h + i
                    qs[32 * h + i] = (
                        s.codes[at] | (s.codes[at + 32] << 2) | (s.codes[at + 64] << 4) | (s.codes[at + 96] << 6)
                    )


@jit
def _decode(blocks: npt.NDArray[Any], rows: F32Array) -> None:
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block = blocks[r, b]
            d, dmin, scales, qs = f16_value(block.d), f16_value(block.dmin), block.scales, block.qs
            for j in range(16):
                scale, offset = d * np.float32(scales[j] & 15), dmin * np.float32(scales[j] >> 4)
                for i in range(16):
                    code = (qs[j // 8 * 32 + j % 2 * 16 + i] >> (j % 8 // 2 * 2)) & 3
                    rows[r, 256 * b + 16 * j + i] = scale * np.float32(code) - offset


def _read_q2_k(blocks: Blocks) -> tuple[Any, Any]:
    return blocks["scales"] & 15, blocks["scales"] >> 4


def _fill_q2_k(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    blocks["scales"] = steps | (offsets << 4)
    blocks["qs"] = stacked(codes, (2, 4, 32), 2)


LAYOUT_Q2_K = affine_layout(BLOCK, 16, 4, 15, _read_q2_k, _fill_q2_k)

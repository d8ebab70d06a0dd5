"""Q4_K: 4.5 bits a weight; 8 sub-blocks of 32 weights with 6-bit scales and offsets (`kquant_affine`).

Source for the layout: block_q4_K in ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.half import f16_value
from pocketquant.formats.kernel import jit
from pocketquant.formats.kquant_affine import fit_block, new_scratch, pack_six_bits, unpack_six_bits
from pocketquant.formats.kquant_block import decode_rows, encode_rows, take_block
from pocketquant.formats.layout import Blocks, affine_layout, fill_six_bits, read_six_bits, stacked

BLOCK = np.dtype(
    [
        ("d", "<u2"),  # F16 bits: super-block scale of the scales
        ("dmin", "<u2"),  # F16 bits: super-block scale of the offsets
        ("scales", "u1", 12),  # see pack_six_bits
        ("qs", "u1", 128),  # byte 32 j + i: code i of sub-block 2 j, above it code i of sub-block 2 j + 1
    ]
)

_CODE_MAX, _SCALE_MAX = np.float32(15), np.float32(63)
_REACH = np.linspace(0.85, 1.2, 16).astype(np.float32)
_PASSES = 1
_RARE = np.float32(0.001)  # blocks that keep less of their energy as error are searched again


def encode_q4_k(rows: F32Array, importance: F32Array | None = None) -> U8Array:
    """Encodes f32[n, k] to u8[n, k / 256 * 144], minimising sum importance * (x - decoded)**2."""
    return encode_rows("Q4_K", 63, _encode, BLOCK, rows, importance)


def decode_q4_k(data: U8Array, n_cols: int) -> F32Array:
    """Decodes u8[n, n_cols / 256 * 144] to f32[n, n_cols], with the bits of ggml's own."""
    return decode_rows(_decode, BLOCK, data, n_cols)


@jit
def _encode(rows: F32Array, importance: F32Array, blocks: npt.NDArray[Any]) -> None:
    s = new_scratch()
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            grow = take_block(rows[r], importance, 256 * b, s.x, s.w)
            block = blocks[r, b]
            block.d, block.dmin = fit_block(s, 32, _CODE_MAX, _SCALE_MAX, _REACH, _PASSES, _RARE, grow)
            pack_six_bits(s, block.scales)
            qs = block.qs
            for j in range(4):
                for i in range(32):
                    qs[32 * j + i] = s.codes[64 * j + i] | (s.codes[64 * j + 32 + i] << 4)


@jit
def _decode(blocks: npt.NDArray[Any], rows: F32Array) -> None:
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block = blocks[r, b]
            d, dmin, qs = f16_value(block.d), f16_value(block.dmin), block.qs
            for j in range(8):
                scale_code, offset_code = unpack_six_bits(block.scales, j)
                scale, offset = d * scale_code, dmin * offset_code
                for i in range(32):
                    code = (qs[j // 2 * 32 + i] >> (j % 2 * 4)) & 15
                    rows[r, 256 * b + 32 * j + i] = scale * np.float32(code) - offset


def _fill_q4_k(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    fill_six_bits(blocks, steps, offsets)
    blocks["qs"] = stacked(codes, (4, 2, 32), 4)


LAYOUT_Q4_K = affine_layout(BLOCK, 32, 16, 63, read_six_bits, _fill_q4_k)

"""Q3_K: 3.4375 bits a weight; 16 sub-blocks of 16 weights with 6-bit scales. See `kquant_symmetric` for the search.

Source for the layout: block_q3_K in ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.half import f16_value
from pocketquant.formats.kernel import jit
from pocketquant.formats.kquant_block import decode_rows, encode_rows, take_block
from pocketquant.formats.kquant_symmetric import fit_block, new_scratch
from pocketquant.formats.layout import Blocks, Layout, even, stacked

BLOCK = np.dtype(
    [
        ("hmask", "u1", 32),  # bit p of byte i: the third bit of code 32 p + i
        ("qs", "u1", 64),  # byte 32 h + i: from bit 2 q on, the low two bits of code 128 h + 32 q + i
        ("scales", "u1", 12),  # byte j: low four bits of scale j, above them those of scale j + 8;
        # byte 8 + j % 4: from bit 2 (j / 4) on, the top two bits of scale j
        ("d", "<u2"),  # F16 bits: super-block scale of the scales
    ]
)
"""Codes are stored plus 4, scales plus 32."""

_N, _SCALE_N = np.float32(4), np.float32(32)
_REACH = np.outer([1.0, -1.0], [0.85, 0.95, 1.05, 1.2, 1.4, 1.7, 2.2, 3.0]).ravel().astype(np.float32)
_CLOSER = np.append(
    np.repeat([1.0, 0.75, -0.75, 0.5], 16).reshape(4, 16),
    [np.linspace(0.75, 1.3, 16), np.linspace(0.775, 1.4, 16)],
    axis=0,
).astype(np.float32)
_PASSES = 2
_RARE = np.float32(4e-3)  # blocks that keep less of their energy as error are searched again


def encode_q3_k(rows: F32Array, importance: F32Array | None = None) -> U8Array:
    """Encodes f32[n, k] to u8[n, k / 256 * 110], minimising sum importance * (x - decoded)**2."""
    return encode_rows("Q3_K", 93, _encode, BLOCK, rows, importance)


def decode_q3_k(data: U8Array, n_cols: int) -> F32Array:
    """Decodes u8[n, n_cols / 256 * 110] to f32[n, n_cols], with the bits of ggml's own."""
    return decode_rows(_decode, BLOCK, data, n_cols)


@jit
def _encode(rows: F32Array, importance: F32Array, blocks: npt.NDArray[Any]) -> None:
    s = new_scratch()
    codes = np.empty(256, np.uint8)
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            grow = take_block(rows[r], importance, 256 * b, s.x, s.w)
            block = blocks[r, b]
            block.d = fit_block(s, _N, _SCALE_N, _REACH, _CLOSER, _PASSES, _RARE, grow)
            scales, qs, hmask = block.scales, block.qs, block.hmask
            for j in range(16):
                scale = np.uint8(s.best_scale_code[j] + np.float32(32.0))
                scales[j % 8] |= (scale & 15) << (j // 8 * 4)
                scales[8 + j % 4] |= scale >> 4 << (j // 4 * 2)
            for i in range(256):
                codes[i] = np.uint8(s.codes[i] + 4)
            for p in range(8):
                for i in range(32):
                    code = codes[32 * p + i]
                    hmask[i] |= code >> 2 << p
                    qs[p // 4 * 32 + i] |= (code & 3) << (p % 4 * 2)


@jit
def _decode(blocks: npt.NDArray[Any], rows: F32Array) -> None:
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block = blocks[r, b]
            d, scales, qs, hmask = f16_value(block.d), block.scales, block.qs, block.hmask
            for j in range(16):
                low = (scales[j % 8] >> (j // 8 * 4)) & 15
                high = (scales[8 + j % 4] >> (j // 4 * 2)) & 3
                scale = d * np.float32(np.int32(low | (high << 4)) - 32)
                p, half = j // 2, j % 2 * 16
                for i in range(16):
                    two = (qs[p // 4 * 32 + half + i] >> (p % 4 * 2)) & 3
                    third = (hmask[half + i] >> p) & 1
                    code = np.int32(two | (third << 2)) - 4
                    rows[r, 256 * b + 16 * j + i] = scale * np.float32(code)


def _read_q3_k(blocks: Blocks) -> tuple[Any, Any]:
    j, packed = np.arange(16), blocks["scales"]
    low = packed[..., j % 8] >> (j // 8 * 4).astype(np.uint8) & 15
    high = packed[..., 8 + j % 4] >> (j // 4 * 2).astype(np.uint8) & 3
    scale = (low | (high << 4)).astype(np.int16) - 32
    return scale, np.zeros_like(scale)


def _fill_q3_k(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    blocks["scales"][..., :8] = (steps[..., :8] & 15) | ((steps[..., 8:] & 15) << 4)
    blocks["scales"][..., 8:] = stacked(steps >> 4, (4, 4), 2)
    blocks["qs"] = stacked(codes & 3, (2, 4, 32), 2)
    blocks["hmask"] = stacked(codes >> 2, (8, 32), 1)


LAYOUT_Q3_K = Layout(BLOCK, 16, even(-4, 8), _fill_q3_k, _read_q3_k, -32, 31)

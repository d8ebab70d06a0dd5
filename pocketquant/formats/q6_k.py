"""Q6_K: 6.5625 bits a weight; 16 sub-blocks of 16 weights with 8-bit scales. See `kquant_symmetric` for the search.

Source for the layout: block_q6_K in ggml-common.h of llama.cpp.
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
        ("ql", "u1", 128),  # byte 64 h + i: low four bits of code 128 h + i, above them those of code 128 h + 64 + i
        ("qh", "u1", 64),  # byte 32 h + i: from bit 2 q on, the top two bits of code 128 h + 32 q + i
        ("scales", "i1", 16),
        ("d", "<u2"),  # F16 bits: super-block scale of the scales
    ]
)
"""Codes are stored plus 32."""

_N, _SCALE_N = np.float32(32), np.float32(128)
_REACH = np.append(np.linspace(0.85, 1.15, 12), [1.3, 1.6, 2.0, 3.0]).astype(np.float32)
_CLOSER = np.repeat(np.array([1.0, 31 / 32, -31 / 32, 30 / 32], np.float32), 16).reshape(4, 16)
_PASSES = 1
_RARE = np.float32(6e-5)  # blocks that keep less of their energy as error are searched again


def encode_q6_k(rows: F32Array, importance: F32Array | None = None) -> U8Array:
    """Encodes f32[n, k] to u8[n, k / 256 * 210], minimising sum importance * (x - decoded)**2."""
    return encode_rows("Q6_K", 3937, _encode, BLOCK, rows, importance)


def decode_q6_k(data: U8Array, n_cols: int) -> F32Array:
    """Decodes u8[n, n_cols / 256 * 210] to f32[n, n_cols], with the bits of ggml's own."""
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
            scales, ql, qh = block.scales, block.ql, block.qh
            for j in range(16):
                scales[j] = np.int8(s.best_scale_code[j])
            for i in range(256):
                codes[i] = np.uint8(s.codes[i] + 32)
            for h in range(2):
                for i in range(64):
                    ql[64 * h + i] = (codes[128 * h + i] & 15) | (codes[128 * h + 64 + i] << 4)
                for i in range(32):
                    at = 128 * h + i
                    qh[32 * h + i] = (
                        (codes[at] >> 4)
                        | (codes[at + 32] >> 4 << 2)
                        | (codes[at + 64] >> 4 << 4)
                        | (codes[at + 96] >> 4 << 6)
                    )


@jit
def _decode(blocks: npt.NDArray[Any], rows: F32Array) -> None:
    for r in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block = blocks[r, b]
            d, scales, ql, qh = f16_value(block.d), block.scales, block.ql, block.qh
            for j in range(16):
                h, quarter, half = j // 8, j % 8 // 2, j % 2 * 16
                scale = d * np.float32(scales[j])
                for i in range(16):
                    low = (ql[64 * h + quarter % 2 * 32 + half + i] >> (quarter // 2 * 4)) & 15
                    high = (qh[32 * h + half + i] >> (2 * quarter)) & 3
                    code = np.int32(low | (high << 4)) - 32
                    rows[r, 256 * b + 16 * j + i] = scale * np.float32(code)


def _read_q6_k(blocks: Blocks) -> tuple[Any, Any]:
    return blocks["scales"], np.zeros_like(blocks["scales"])


def _fill_q6_k(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    blocks["scales"] = (steps ^ np.uint8(128)).view(np.int8)
    blocks["ql"] = stacked(codes & 15, (2, 2, 64), 4)
    blocks["qh"] = stacked(codes >> 4, (2, 4, 32), 2)


LAYOUT_Q6_K = Layout(BLOCK, 16, even(-32, 64), _fill_q6_k, _read_q6_k, -128, 127)

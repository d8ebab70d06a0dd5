"""GGML's formats of 32 weights to a block: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

`encode_*` takes f32[n, k] (finite, k a multiple of 32) and the importance of each column, f32[k] or None for equal
ones, and returns u8[n, bytes]; `decode_*` takes that and k and returns f32[n, k].

Q8_0, and Q4_0 without importance, are rounded from the block's extreme and equal llama.cpp's bytes. The others search
for the scale that leaves the smallest importance-weighted squared error (`scale_search`).

Source: block layouts and the rounding of Q8_0 and Q4_0 from llama.cpp b10359, ggml/src/ggml-common.h and
ggml-quants.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.closer_search import (
    candidates,
    closer_line,
    closer_scale,
    energy,
    is_sparse,
    line_candidates,
)
from pocketquant.formats.half import F16_MAX, f16_bits, refuse_beyond
from pocketquant.formats.kernel import jit
from pocketquant.formats.layout import even, fill_four_bits, legacy_layout
from pocketquant.formats.scale_search import (
    BLOCK_LEN,
    COARSE_4,
    COARSE_5,
    FINE_4,
    FINE_5,
    block_weights,
    coarse_symmetric,
    fine_symmetric,
    fit_affine,
    take_block,
)

# `d` and `m` are the bits of a half: weight = d * code + m. Byte j of `qs` holds code j below and code j + 16 above;
# bit j of `qh` is the fifth bit of code j.
Q4_0 = np.dtype([("d", "<u2"), ("qs", "u1", (16,))])
Q4_1 = np.dtype([("d", "<u2"), ("m", "<u2"), ("qs", "u1", (16,))])
Q5_0 = np.dtype([("d", "<u2"), ("qh", "<u4"), ("qs", "u1", (16,))])
Q5_1 = np.dtype([("d", "<u2"), ("m", "<u2"), ("qh", "<u4"), ("qs", "u1", (16,))])
Q8_0 = np.dtype([("d", "<u2"), ("qs", "i1", (32,))])

F = np.float32
_LEVELS_4 = np.arange(-8, 8).astype(np.float32)
_LEVELS_5 = np.arange(-16, 16).astype(np.float32)
_CLOSER_4, _CLOSER_5 = candidates(_LEVELS_4), candidates(_LEVELS_5)
_LINES_4, _LINES_5 = line_candidates(15), line_candidates(31)
# Blocks whose error is below this share of their energy are searched again. Of blocks of normally distributed weights
# under uneven importance, fewer than one in a hundred are.
_RARE_Q4_0, _RARE_Q4_1, _RARE_Q5_0, _RARE_Q5_1 = F(5e-4), F(3e-4), F(1.2e-4), F(6e-5)
ROUNDER = 12582912.0  # 1.5 * 2^23: a sum with it keeps no fraction
Blocks = npt.NDArray[np.void]


@jit
def code_of(x: np.float32, minimum: np.float32, inverse: np.float32, shift: np.float32, top: np.float32) -> np.int32:
    """clamp(round((x - minimum) * inverse) + shift, 0, top)."""
    code = ((x - minimum) * inverse + F(ROUNDER)) - F(ROUNDER) + shift
    return np.int32(min(max(code, F(0.0)), top))


@jit
def write_codes(
    row: F32Array, first: int, scale: np.float32, minimum: np.float32, shift: np.float32, top: np.float32, qs: U8Array
) -> None:
    """The low four bits of a block's codes; `shift` everywhere where the scale is 0."""
    inverse = F(1.0) / scale if scale != 0.0 else F(0.0)
    for j in range(16):
        low = code_of(row[first + j], minimum, inverse, shift, top) & np.int32(15)
        qs[j] = np.uint8(low | (code_of(row[first + j + 16], minimum, inverse, shift, top) << np.int32(4)))


@jit
def fifth_bits(
    row: F32Array, first: int, n: int, scale: np.float32, minimum: np.float32, shift: np.float32, top: np.float32
) -> np.uint32:
    """The fifth bits of a block's `n` codes, code j to bit j."""
    inverse = F(1.0) / scale if scale != 0.0 else F(0.0)
    bits = np.uint32(0)
    for j in range(n):
        code = code_of(row[first + j], minimum, inverse, shift, top)
        bits |= np.uint32(np.uint32(code >> np.int32(4)) << np.uint32(j))
    return bits


@jit
def _fill_symmetric(
    rows: F32Array,
    w: F32Array,
    block_len: int,
    half: float,
    coarse: F32Array,
    fine: F32Array,
    levels: F32Array,
    table: F32Array,
    rare: np.float32,
    blocks: Any,
    qh: Any,
) -> None:
    x = np.zeros(rows.shape[1], np.float32)
    units = np.empty(blocks.shape[1], np.float32)
    scales = np.empty(blocks.shape[1], np.float32)
    is_odd = np.empty(blocks.shape[1], np.bool_)
    for i in range(blocks.shape[0]):
        row = rows[i]
        # Short loops over the whole row, so that the processor overlaps the blocks of each
        for b in range(blocks.shape[1]):
            units[b], is_odd[b] = take_block(row, b * BLOCK_LEN, BLOCK_LEN, x)
        for b in range(blocks.shape[1]):
            scales[b] = coarse_symmetric(x, w, b * BLOCK_LEN, half, coarse) if units[b] > 0.0 else F(0.0)
        for b in range(blocks.shape[1]):
            if scales[b] != 0.0:
                scales[b], saved = fine_symmetric(x, w, b * BLOCK_LEN, half, fine, scales[b], units[b])
                is_odd[b] = is_odd[b] or saved > (F(1.0) - rare) * energy(x, w, b * BLOCK_LEN, F(0.0))
        for b in range(blocks.shape[1]):
            if is_odd[b]:
                scales[b] = closer_scale(x, w, b * BLOCK_LEN, levels, half, table, scales[b], units[b])
            scales[b] *= units[b]
            blocks[i, b].d = f16_bits(scales[b])
            write_codes(row, b * BLOCK_LEN, scales[b], F(0.0), F(half), F(2.0 * half - 1.0), blocks[i, b].qs)
            if qh is not None:
                bits = fifth_bits(row, b * BLOCK_LEN, block_len, scales[b], F(0.0), F(half), F(2.0 * half - 1.0))
                qh[i, b] = bits


@jit
def _fill_affine(
    rows: F32Array, w: F32Array, block_len: int, top: float, lines: F32Array, rare: np.float32, blocks: Any, qh: Any
) -> None:
    x = np.zeros(rows.shape[1], np.float32)
    scales = np.empty(blocks.shape[1], np.float32)
    minima = np.empty(blocks.shape[1], np.float32)
    for i in range(blocks.shape[0]):
        row = rows[i]
        for b in range(blocks.shape[1]):
            scales[b] = minima[b] = F(0.0)
            unit = take_block(row, b * BLOCK_LEN, BLOCK_LEN, x)[0]
            if unit > 0.0:
                scale, minimum, saved, mean = fit_affine(x, w, b * BLOCK_LEN, top, unit)
                left = energy(x, w, b * BLOCK_LEN, mean) - saved
                if left < rare * energy(x, w, b * BLOCK_LEN, F(0.0)) or is_sparse(x, b * BLOCK_LEN):
                    scale, minimum = closer_line(x, w, b * BLOCK_LEN, top, lines, scale, minimum, unit)
                scales[b], minima[b] = scale * unit, minimum * unit
        for b in range(blocks.shape[1]):
            blocks[i, b].d = f16_bits(scales[b])
            blocks[i, b].m = f16_bits(minima[b])
            write_codes(row, b * BLOCK_LEN, scales[b], minima[b], F(0.0), F(top), blocks[i, b].qs)
            if qh is not None:
                qh[i, b] = fifth_bits(row, b * BLOCK_LEN, block_len, scales[b], minima[b], F(0.0), F(top))


@jit
def _fill_q4_0_plain(rows: F32Array, bits: Any, block_len: int, d: Any, qs: Any) -> np.float32:
    """The extreme of largest magnitude, the first of equals, becomes code 0; returns the largest scale wished for."""
    widest = F(0.0)
    for i in range(d.shape[0]):
        for b in range(d.shape[1]):
            x = rows[i, b * BLOCK_LEN : (b + 1) * BLOCK_LEN]
            words = bits[i, b * BLOCK_LEN : (b + 1) * BLOCK_LEN]
            # As integers, a float's bits order by magnitude; a run-time length lets LLVM vectorize the loop
            positive = np.int32(0)
            negative = np.uint32(0)
            for j in range(block_len):
                signed = words[j]
                positive = signed if signed > positive else positive
                unsigned = np.uint32(signed)
                negative = unsigned if unsigned > negative else negative
            peak = np.uint32(positive).view(np.float32)
            trough = np.uint32(negative).view(np.float32) if negative > np.uint32(0x7FFFFFFF) else F(0.0)
            extreme = peak if peak >= -trough else trough
            if peak == -trough and peak > 0.0:
                for j in range(BLOCK_LEN):
                    if abs(x[j]) == peak:
                        extreme = x[j]
                        break
            scale = extreme / F(-8.0)
            widest = max(widest, abs(scale))
            if abs(scale) > F16_MAX:
                scale = F16_MAX if scale > 0.0 else -F16_MAX
            d[i, b] = f16_bits(scale)
            inverse = F(1.0) / scale if abs(scale) > F(2.0**-126) else F(0.0)
            for j in range(16):
                low = np.int32(min(max(x[j] * inverse + F(8.5), F(0.0)), F(15.0)))
                high = np.int32(min(max(x[j + 16] * inverse + F(8.5), F(0.0)), F(15.0)))
                qs[i, b, j] = np.uint8(low | (high << np.int32(4)))
    return widest


@jit
def _fill_q8_0(rows: F32Array, bits: Any, block_len: int, d: Any, qs: Any) -> np.float32:
    """Returns the largest scale wished for."""
    widest = F(0.0)
    for i in range(d.shape[0]):
        for b in range(d.shape[1]):
            x = rows[i, b * BLOCK_LEN : (b + 1) * BLOCK_LEN]
            words = bits[i, b * BLOCK_LEN : (b + 1) * BLOCK_LEN]
            peak = np.int32(0)
            for j in range(block_len):
                magnitude = words[j] & np.int32(0x7FFFFFFF)
                peak = magnitude if magnitude > peak else peak
            scale = np.int32(peak).view(np.float32) / F(127.0)
            widest = max(widest, scale)
            scale = min(scale, F16_MAX)
            d[i, b] = f16_bits(scale)
            inverse = F(1.0) / scale if scale > F(2.0**-126) else F(0.0)
            for j in range(BLOCK_LEN):
                value = min(max(x[j] * inverse, F(-127.0)), F(127.0))
                whole = np.int32(value)
                rest = value - F(whole)
                # C's roundf: halves away from zero
                qs[i, b, j] = np.int8(whole + np.int32(rest >= F(0.5)) - np.int32(rest <= F(-0.5)))
    return widest


def empty_blocks(rows: F32Array, layout: np.dtype[np.void], block_len: int) -> tuple[F32Array, U8Array, Blocks]:
    """The rows, contiguous; zeroed bytes u8[n, bytes] for them; and the same bytes as blocks[n, k / block_len].

    Raises:
        ValueError: the rows are no whole number of blocks.
    """
    n_rows, n_cols = rows.shape
    if n_cols % block_len:
        raise ValueError(f"{n_cols} columns are no multiple of {block_len}")
    data = np.zeros((n_rows, n_cols // block_len * layout.itemsize), dtype=np.uint8)
    return np.ascontiguousarray(rows, dtype=np.float32), data, data.view(layout)


def encode_q4_0(rows: F32Array, importance: F32Array | None = None) -> U8Array:
    """f32[n, k] -> u8[n, k / 32 * 18]; without importance llama.cpp's own bytes."""
    rows, data, blocks = empty_blocks(rows, Q4_0, BLOCK_LEN)
    if importance is None:
        if _fill_q4_0_plain(rows, rows.view(np.int32), BLOCK_LEN, blocks["d"], blocks["qs"]) > F16_MAX:
            refuse_beyond("Q4_0", 8, rows)
    else:
        weights = block_weights(importance, rows.shape[1], BLOCK_LEN)
        _fill_symmetric(rows, weights, BLOCK_LEN, 8.0, COARSE_4, FINE_4, _LEVELS_4, _CLOSER_4, _RARE_Q4_0, blocks, None)
        refuse_beyond("Q4_0", 7, rows, blocks["d"])
    return data


def encode_q4_1(rows: F32Array, importance: F32Array | None = None) -> U8Array:
    """f32[n, k] -> u8[n, k / 32 * 20]."""
    rows, data, blocks = empty_blocks(rows, Q4_1, BLOCK_LEN)
    weights = block_weights(importance, rows.shape[1], BLOCK_LEN)
    _fill_affine(rows, weights, BLOCK_LEN, 15.0, _LINES_4, _RARE_Q4_1, blocks, None)
    refuse_beyond("Q4_1", 1, rows)
    return data


def encode_q5_0(rows: F32Array, importance: F32Array | None = None) -> U8Array:
    """f32[n, k] -> u8[n, k / 32 * 22]."""
    rows, data, blocks = empty_blocks(rows, Q5_0, BLOCK_LEN)
    weights = block_weights(importance, rows.shape[1], BLOCK_LEN)
    _fill_symmetric(
        rows, weights, BLOCK_LEN, 16.0, COARSE_5, FINE_5, _LEVELS_5, _CLOSER_5, _RARE_Q5_0, blocks, blocks["qh"]
    )
    refuse_beyond("Q5_0", 15, rows, blocks["d"])
    return data


def encode_q5_1(rows: F32Array, importance: F32Array | None = None) -> U8Array:
    """f32[n, k] -> u8[n, k / 32 * 24]."""
    rows, data, blocks = empty_blocks(rows, Q5_1, BLOCK_LEN)
    weights = block_weights(importance, rows.shape[1], BLOCK_LEN)
    _fill_affine(rows, weights, BLOCK_LEN, 31.0, _LINES_5, _RARE_Q5_1, blocks, blocks["qh"])
    refuse_beyond("Q5_1", 1, rows)
    return data


def encode_q8_0(rows: F32Array, importance: F32Array | None = None) -> U8Array:
    """f32[n, k] -> u8[n, k / 32 * 34], llama.cpp's own bytes; importance changes nothing."""
    rows, data, blocks = empty_blocks(rows, Q8_0, BLOCK_LEN)
    if _fill_q8_0(rows, rows.view(np.int32), BLOCK_LEN, blocks["d"], blocks["qs"]) > F16_MAX:
        refuse_beyond("Q8_0", 127, rows)
    return data


def half_values(bits: npt.NDArray[np.uint16]) -> F32Array:
    """Bits of halves as f32, with a last axis of one to multiply blocks by."""
    return np.ascontiguousarray(bits).view("<f2").astype(np.float32)[..., None]


def unpack_nibbles(qs: U8Array) -> npt.NDArray[np.uint8]:
    """u8[..., 16] -> u8[..., 32]: the low halves of the bytes, then the high ones."""
    return np.concatenate([qs & np.uint8(15), qs >> np.uint8(4)], axis=-1)


def _five_bits(blocks: Blocks) -> npt.NDArray[np.uint8]:
    fifth = (blocks["qh"][..., None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    return unpack_nibbles(blocks["qs"]) | (fifth.astype(np.uint8) << np.uint8(4))


def decode_q4_0(data: U8Array, n_cols: int) -> F32Array:
    """u8[n, k / 32 * 18] -> f32[n, k]."""
    blocks = np.ascontiguousarray(data).view(Q4_0)
    codes = unpack_nibbles(blocks["qs"]).astype(np.float32) - F(8)
    return (codes * half_values(blocks["d"])).reshape(-1, n_cols)


def decode_q4_1(data: U8Array, n_cols: int) -> F32Array:
    """u8[n, k / 32 * 20] -> f32[n, k]."""
    blocks = np.ascontiguousarray(data).view(Q4_1)
    codes = unpack_nibbles(blocks["qs"]).astype(np.float32)
    return (codes * half_values(blocks["d"]) + half_values(blocks["m"])).reshape(-1, n_cols)


def decode_q5_0(data: U8Array, n_cols: int) -> F32Array:
    """u8[n, k / 32 * 22] -> f32[n, k]."""
    blocks = np.ascontiguousarray(data).view(Q5_0)
    codes = _five_bits(blocks).astype(np.float32) - F(16)
    return (codes * half_values(blocks["d"])).reshape(-1, n_cols)


def decode_q5_1(data: U8Array, n_cols: int) -> F32Array:
    """u8[n, k / 32 * 24] -> f32[n, k]."""
    blocks = np.ascontiguousarray(data).view(Q5_1)
    codes = _five_bits(blocks).astype(np.float32)
    return (codes * half_values(blocks["d"]) + half_values(blocks["m"])).reshape(-1, n_cols)


def decode_q8_0(data: U8Array, n_cols: int) -> F32Array:
    """u8[n, k / 32 * 34] -> f32[n, k]."""
    blocks = np.ascontiguousarray(data).view(Q8_0)
    return (blocks["qs"].astype(np.float32) * half_values(blocks["d"])).reshape(-1, n_cols)


def _fill_five_bits(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    fill_four_bits(blocks, codes, steps, offsets)
    fifth = (codes >> 4).astype(np.uint32) << np.arange(32, dtype=np.uint32)
    blocks["qh"] = np.bitwise_or.reduce(fifth, axis=-1)


def _fill_eight_bits(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    blocks["qs"] = (codes.astype(np.int16) - 127).astype(np.int8)


LAYOUT_Q4_0 = legacy_layout(Q4_0, even(-8, 16), fill_four_bits)
LAYOUT_Q4_1 = legacy_layout(Q4_1, even(0, 16), fill_four_bits)
LAYOUT_Q5_0 = legacy_layout(Q5_0, even(-16, 32), _fill_five_bits)
LAYOUT_Q5_1 = legacy_layout(Q5_1, even(0, 32), _fill_five_bits)
LAYOUT_Q8_0 = legacy_layout(Q8_0, even(-127, 255), _fill_eight_bits)

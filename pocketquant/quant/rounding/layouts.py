"""One description of every block format, so that the same rounding code serves them all.

A row is cut into blocks (super-blocks, in the K-quants), and a block into sub-blocks. Every weight has a code, every
sub-block a small integer scale and offset, and every block the F16 numbers d and dmin, which multiply those integers:

    weight = (d * scale) * level[code] + sign * (dmin * offset)

A format that lacks one of these has a constant in its place: in the legacy formats the block is its own only sub-block,
with a scale of one. `Layout.scales` reads the scales out of encoded blocks, and `Layout.pack` builds blocks from scales
and codes. The formats' own decoders compute exactly the value above, in f32 and in that order of operations.

Source for the layouts: the structured dtypes of `pocketquant.formats`, which name theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array, QuantFormat, U8Array, iq4, legacy, q2_k, q3_k, q4_k, q5_k, q6_k

I16Array = npt.NDArray[np.int16]
U16Array = npt.NDArray[np.uint16]
Blocks = npt.NDArray[Any]


class Scales(NamedTuple):
    """The scales of encoded rows.

    Attributes:
        scale, offset: i16[n, k / sub_block_len], the integers of each sub-block.
        d, dmin: u16[n, k / block_len], the bits of the F16 numbers of each block.
    """

    scale: I16Array
    offset: I16Array
    d: U16Array
    dmin: U16Array


_Read = Callable[[Blocks], tuple[Any, Any]]
_Fill = Callable[[Blocks, U8Array, U8Array, U8Array], None]


@dataclass(frozen=True)
class Layout:
    """How one format stores its numbers.

    Attributes:
        dtype: the structured dtype of a block.
        sub_block_len: number of weights that share an integer scale and offset.
        levels: f32[n_code], ascending.
        is_even: whether neighbouring levels are one apart.
        scale_low, scale_high: range of a sub-block's integer scale; equal where the format has no such scale.
        offset_high: the largest integer offset of a sub-block; 0 where the format has no such offset.
        offset_sign: sign of the offset; 0.0 where there is none.
        dmin_field: name of the block's field that multiplies the offsets; "" where there is none.
        read: blocks -> integer scales and offsets [..., n_sub_blocks]; None where they are constant.
        fill: writes codes u8[..., block_len] and scales and offsets u8[..., n_sub_blocks] into blocks; the scales are
            counted from `scale_low`.
    """

    dtype: np.dtype[Any]
    sub_block_len: int
    levels: F32Array
    fill: _Fill
    read: _Read | None = None
    scale_low: int = 1
    scale_high: int = 1
    offset_high: int = 0
    offset_sign: float = 0.0
    dmin_field: str = ""
    is_even: bool = True
    block_len: int = field(default=256)

    @property
    def has_sub_blocks(self) -> bool:
        """Whether sub-blocks have integer scales of their own."""
        return self.scale_high > self.scale_low

    def scales(self, data: U8Array) -> Scales:
        """The scales of encoded rows u8[n, bytes]."""
        blocks = np.ascontiguousarray(data).view(self.dtype)
        n_rows, n_blocks = blocks.shape
        n_sub_blocks = self.block_len // self.sub_block_len
        if self.read is None:
            scale = np.ones((n_rows, n_blocks * n_sub_blocks), np.int16)
            offset = np.full_like(scale, 1 if self.dmin_field else 0)
        else:
            scale, offset = (each.astype(np.int16).reshape(n_rows, -1) for each in self.read(blocks))
        dmin = blocks[self.dmin_field] if self.dmin_field else np.zeros_like(blocks["d"])
        return Scales(scale, offset, np.ascontiguousarray(blocks["d"]), np.ascontiguousarray(dmin))

    def pack(self, codes: U8Array, scales: Scales) -> U8Array:
        """Encoded rows u8[n, bytes], from codes u8[n, k] and scales."""
        n_rows, n_cols = codes.shape
        n_blocks, n_sub_blocks = n_cols // self.block_len, self.block_len // self.sub_block_len
        blocks: Blocks = np.zeros((n_rows, n_blocks), self.dtype)
        blocks["d"] = scales.d
        if self.dmin_field:
            blocks[self.dmin_field] = scales.dmin
        shape = (n_rows, n_blocks, n_sub_blocks)
        steps = (scales.scale - np.int16(self.scale_low)).astype(np.uint8).reshape(shape)
        offsets = scales.offset.astype(np.uint8).reshape(shape)
        self.fill(blocks, codes.reshape(n_rows, n_blocks, self.block_len), steps, offsets)
        return blocks.view(np.uint8).reshape(n_rows, -1)


def layout_of(quant_format: QuantFormat) -> Layout | None:
    """The layout of a format; None for a format without blocks, and for one that is only read."""
    return _LAYOUTS.get(quant_format.name)


def _stacked(values: npt.NDArray[Any], shape: tuple[int, ...], shift: int) -> U8Array:
    """Packs u8[..., n], cut into `shape` = (.., pieces, bytes): value i of piece p goes to byte i, bit `shift` * p."""
    pieces = values.reshape(*values.shape[:-1], *shape)
    result = np.zeros((*pieces.shape[:-2], pieces.shape[-1]), np.uint8)
    for p in range(pieces.shape[-2]):
        result |= pieces[..., p, :] << np.uint8(shift * p)
    return result.reshape(*values.shape[:-1], -1)


def _read_six_bits(blocks: Blocks) -> tuple[Any, Any]:
    packed = blocks["scales"]
    low, high, mixed = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scale = np.concatenate([low & 63, (mixed & 15) | (low >> 6 << 4)], axis=-1)
    return scale, np.concatenate([high & 63, (mixed >> 4) | (high >> 6 << 4)], axis=-1)


def _fill_six_bits(blocks: Blocks, steps: U8Array, offsets: U8Array) -> None:
    packed = blocks["scales"]
    packed[..., 0:4] = steps[..., :4] | (steps[..., 4:] >> 4 << 6)
    packed[..., 4:8] = offsets[..., :4] | (offsets[..., 4:] >> 4 << 6)
    packed[..., 8:12] = (steps[..., 4:] & 15) | ((offsets[..., 4:] & 15) << 4)


def _fill_q4_k(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    _fill_six_bits(blocks, steps, offsets)
    blocks["qs"] = _stacked(codes, (4, 2, 32), 4)


def _fill_q5_k(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    _fill_six_bits(blocks, steps, offsets)
    blocks["qs"] = _stacked(codes & 15, (4, 2, 32), 4)
    blocks["qh"] = _stacked(codes >> 4, (8, 32), 1)


def _read_q2_k(blocks: Blocks) -> tuple[Any, Any]:
    return blocks["scales"] & 15, blocks["scales"] >> 4


def _fill_q2_k(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    blocks["scales"] = steps | (offsets << 4)
    blocks["qs"] = _stacked(codes, (2, 4, 32), 2)


def _read_q3_k(blocks: Blocks) -> tuple[Any, Any]:
    j, packed = np.arange(16), blocks["scales"]
    low = packed[..., j % 8] >> (j // 8 * 4).astype(np.uint8) & 15
    high = packed[..., 8 + j % 4] >> (j // 4 * 2).astype(np.uint8) & 3
    scale = (low | (high << 4)).astype(np.int16) - 32
    return scale, np.zeros_like(scale)


def _fill_q3_k(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    blocks["scales"][..., :8] = (steps[..., :8] & 15) | ((steps[..., 8:] & 15) << 4)
    blocks["scales"][..., 8:] = _stacked(steps >> 4, (4, 4), 2)
    blocks["qs"] = _stacked(codes & 3, (2, 4, 32), 2)
    blocks["hmask"] = _stacked(codes >> 2, (8, 32), 1)


def _read_q6_k(blocks: Blocks) -> tuple[Any, Any]:
    return blocks["scales"], np.zeros_like(blocks["scales"])


def _fill_q6_k(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    blocks["scales"] = (steps ^ np.uint8(128)).view(np.int8)
    blocks["ql"] = _stacked(codes & 15, (2, 2, 64), 4)
    blocks["qh"] = _stacked(codes >> 4, (2, 4, 32), 2)


def _read_iq4_xs(blocks: Blocks) -> tuple[Any, Any]:
    b = np.arange(8)
    low = blocks["scales_l"][..., b // 2] >> (4 * (b % 2)).astype(np.uint8) & 15
    high = blocks["scales_h"][..., None] >> (2 * b).astype(np.uint16) & np.uint16(3)
    scale = (low | high << np.uint16(4)).astype(np.int16) - 32
    return scale, np.zeros_like(scale)


def _fill_iq4_xs(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    blocks["scales_l"] = (steps[..., 0::2] & 15) | ((steps[..., 1::2] & 15) << 4)
    high = np.zeros(blocks.shape, np.uint16)
    for b in range(8):
        high |= (steps[..., b] >> 4).astype(np.uint16) << np.uint16(2 * b)
    blocks["scales_h"] = high
    blocks["qs"] = _stacked(codes, (8, 2, 16), 4).reshape(*blocks.shape, 8, 16)


def _fill_four_bits(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    blocks["qs"] = _stacked(codes & 15, (2, 16), 4)


def _fill_five_bits(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    _fill_four_bits(blocks, codes, steps, offsets)
    fifth = (codes >> 4).astype(np.uint32) << np.arange(32, dtype=np.uint32)
    blocks["qh"] = np.bitwise_or.reduce(fifth, axis=-1)


def _fill_eight_bits(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    blocks["qs"] = (codes.astype(np.int16) - 127).astype(np.int8)


def _even(first: int, n_code: int) -> F32Array:
    return np.arange(first, first + n_code, dtype=np.float32)


def _affine(dtype: np.dtype[Any], sub_block_len: int, n_code: int, high: int, read: _Read, fill: _Fill) -> Layout:
    levels = _even(0, n_code)
    return Layout(dtype, sub_block_len, levels, fill, read, 0, high, high, -1.0, "dmin")


def _legacy(dtype: np.dtype[Any], levels: F32Array, fill: _Fill) -> Layout:
    is_even = bool((np.diff(levels) == 1).all())
    if dtype.names and "m" in dtype.names:
        return Layout(dtype, 32, levels, fill, offset_sign=1.0, dmin_field="m", block_len=32)
    return Layout(dtype, 32, levels, fill, is_even=is_even, block_len=32)


_LAYOUTS = {
    "Q2_K": _affine(q2_k.BLOCK, 16, 4, 15, _read_q2_k, _fill_q2_k),
    "Q3_K": Layout(q3_k.BLOCK, 16, _even(-4, 8), _fill_q3_k, _read_q3_k, -32, 31),
    "Q4_K": _affine(q4_k.BLOCK, 32, 16, 63, _read_six_bits, _fill_q4_k),
    "Q5_K": _affine(q5_k.BLOCK, 32, 32, 63, _read_six_bits, _fill_q5_k),
    "Q6_K": Layout(q6_k.BLOCK, 16, _even(-32, 64), _fill_q6_k, _read_q6_k, -128, 127),
    "IQ4_XS": Layout(iq4.IQ4_XS, 32, iq4.LEVELS, _fill_iq4_xs, _read_iq4_xs, -32, 31, is_even=False),
    "IQ4_NL": _legacy(iq4.IQ4_NL, iq4.LEVELS, _fill_four_bits),
    "Q4_0": _legacy(legacy.Q4_0, _even(-8, 16), _fill_four_bits),
    "Q4_1": _legacy(legacy.Q4_1, _even(0, 16), _fill_four_bits),
    "Q5_0": _legacy(legacy.Q5_0, _even(-16, 32), _fill_five_bits),
    "Q5_1": _legacy(legacy.Q5_1, _even(0, 32), _fill_five_bits),
    "Q8_0": _legacy(legacy.Q8_0, _even(-127, 255), _fill_eight_bits),
}

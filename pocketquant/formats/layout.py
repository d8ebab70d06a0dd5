"""Where a block keeps its codes and scales: one description for all formats, so that one rounding code serves them.

A row is cut into blocks (super-blocks, in the K-quants), and a block into sub-blocks. Every weight has a code, every
sub-block a small integer scale and offset, and every block the F16 numbers d and dmin, which multiply those integers:

    weight = (d * scale) * level[code] + sign * (dmin * offset)

A format that lacks one of these has a constant in its place: in the legacy formats the block is its own only sub-block,
with a scale of one. `Layout.scales` reads the scales out of encoded blocks, and `Layout.pack` builds blocks from scales
and codes. The formats' own decoders compute exactly the value above, in f32 and in that order of operations.

A format's layout stands with its kernels (`LAYOUT_Q4_K` in q4_k.py, under the block's structured dtype), and
`QuantFormat.layout` finds it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array, U8Array

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


def stacked(values: npt.NDArray[Any], shape: tuple[int, ...], shift: int) -> U8Array:
    """Packs u8[..., n], cut into `shape` = (.., pieces, bytes): value i of piece p goes to byte i, bit `shift` * p."""
    pieces = values.reshape(*values.shape[:-1], *shape)
    result = np.zeros((*pieces.shape[:-2], pieces.shape[-1]), np.uint8)
    for p in range(pieces.shape[-2]):
        result |= pieces[..., p, :] << np.uint8(shift * p)
    return result.reshape(*values.shape[:-1], -1)


def even(first: int, n_code: int) -> F32Array:
    """Levels one apart, f32[n_code], from `first` on."""
    return np.arange(first, first + n_code, dtype=np.float32)


def affine_layout(dtype: np.dtype[Any], sub_block_len: int, n_code: int, high: int, read: _Read, fill: _Fill) -> Layout:
    """The layout of a K-quant with scales and offsets from 0 to `high`, and codes from 0 on."""
    levels = even(0, n_code)
    return Layout(dtype, sub_block_len, levels, fill, read, 0, high, high, -1.0, "dmin")


def legacy_layout(dtype: np.dtype[Any], levels: F32Array, fill: _Fill) -> Layout:
    """The layout of a format of 32 weights to a block, which is its own only sub-block."""
    is_even = bool((np.diff(levels) == 1).all())
    if dtype.names and "m" in dtype.names:
        return Layout(dtype, 32, levels, fill, offset_sign=1.0, dmin_field="m", block_len=32)
    return Layout(dtype, 32, levels, fill, is_even=is_even, block_len=32)


def fill_four_bits(blocks: Blocks, codes: U8Array, steps: U8Array, offsets: U8Array) -> None:
    """Stores the low four bits of 32 codes in sixteen bytes: code i below and code i + 16 above."""
    blocks["qs"] = stacked(codes & 15, (2, 16), 4)


def read_six_bits(blocks: Blocks) -> tuple[Any, Any]:
    """Scales and offsets of eight sub-blocks, six bits each, as Q4_K and Q5_K store them in twelve bytes."""
    packed = blocks["scales"]
    low, high, mixed = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scale = np.concatenate([low & 63, (mixed & 15) | (low >> 6 << 4)], axis=-1)
    return scale, np.concatenate([high & 63, (mixed >> 4) | (high >> 6 << 4)], axis=-1)


def fill_six_bits(blocks: Blocks, steps: U8Array, offsets: U8Array) -> None:
    """Stores what `read_six_bits` reads."""
    packed = blocks["scales"]
    packed[..., 0:4] = steps[..., :4] | (steps[..., 4:] >> 4 << 6)
    packed[..., 4:8] = offsets[..., :4] | (offsets[..., 4:] >> 4 << 6)
    packed[..., 8:12] = (steps[..., 4:] & 15) | ((offsets[..., 4:] & 15) << 4)

"""The rows that are being rounded: their codes and scales, and the values that these decode to."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.half import f16_value
from pocketquant.formats.layout import I16Array, Layout, Scales, U16Array
from pocketquant.quant.rounding.kernel import jit

_F32 = np.float32


class Grid(NamedTuple):
    """The numbers of a `Layout` that the kernels read; the fields are described there."""

    levels: F32Array
    is_even: bool
    sub_block_len: int
    block_len: int
    has_sub_blocks: bool
    scale_low: int
    scale_high: int
    offset_high: int
    sign: np.float32


class State(NamedTuple):
    """Rows of n x k weights; each row is divided by a power of two, so that sums of squares stay in range.

    Attributes:
        weights: f32[n, k], the original weights.
        values: f32[n, k], the values that the codes decode to.
        errors: f32[n, k], values - weights.
        codes: u8[n, k].
        scale, offset, d, dmin: as in `Scales`.
        shrink: f32[n], the power of two that turns a row of the file into a row here.
    """

    weights: F32Array
    values: F32Array
    errors: F32Array
    codes: U8Array
    scale: I16Array
    offset: I16Array
    d: U16Array
    dmin: U16Array
    shrink: F32Array


def grid_of(layout: Layout) -> Grid:
    """The numbers of a layout that the kernels read."""
    return Grid(
        layout.levels,
        layout.is_even,
        layout.sub_block_len,
        layout.block_len,
        layout.has_sub_blocks,
        layout.scale_low,
        layout.scale_high,
        layout.offset_high,
        _F32(layout.offset_sign),
    )


def new_state(weights: F32Array, layout: Layout, together: bool = False) -> State:
    """The state of rows f32[n, k] before any choice: all codes and scales are zero.

    With `together`, all rows are divided by the same power of two.
    """
    n_rows, n_cols = weights.shape
    peak = np.abs(weights).max(axis=1, initial=0.0)
    if together:
        peak[:] = peak.max(initial=0.0)
    exponent = np.clip(np.frexp(peak)[1], -120, 120)
    shrink = np.where(peak > 0, np.ldexp(np.float32(1), -exponent), np.float32(1)).astype(np.float32)
    sub_block = np.zeros((2, n_rows, n_cols // layout.sub_block_len), np.int16)
    block = np.zeros((2, n_rows, n_cols // layout.block_len), np.uint16)
    scaled = weights * shrink[:, None]
    codes = np.zeros((n_rows, n_cols), np.uint8)
    return State(scaled, np.zeros_like(scaled), -scaled, codes, sub_block[0], sub_block[1], block[0], block[1], shrink)


def rows_of(state: State, rows: npt.NDArray[np.intp]) -> State:
    """A copy of the state of some rows."""
    return State._make(array[rows] for array in state)


def set_scales(state: State, layout: Layout, start: int, scales: Scales, rows: slice = slice(None)) -> None:
    """Sets the scales of the columns from `start` on."""
    for name, given in scales._asdict().items():
        at = start // (layout.sub_block_len if name in ("scale", "offset") else layout.block_len)
        getattr(state, name)[rows, at : at + given.shape[1]] = given


def pack_rows(state: State, layout: Layout) -> U8Array:
    """The encoded rows."""
    return layout.pack(state.codes, Scales(state.scale, state.offset, state.d, state.dmin))


@jit
def scale_and_offset(g: Grid, s: State, row: int, sub_block: int) -> tuple[np.float32, np.float32]:
    """The scale and the offset of a sub-block, which turn a level into a value, as the decoder computes them."""
    block = sub_block * g.sub_block_len // g.block_len
    scale = _F32(f16_value(s.d[row, block]) * s.shrink[row]) * _F32(s.scale[row, sub_block])
    offset = _F32(f16_value(s.dmin[row, block]) * s.shrink[row]) * _F32(s.offset[row, sub_block])
    return scale, offset if g.sign > 0 else -offset


@jit
def code_of_level(g: Grid, y: np.float32) -> int:
    """The code of the level nearest to y."""
    top = len(g.levels) - 1
    if g.is_even:
        return int(min(max(np.rint(y - g.levels[0]), _F32(0.0)), _F32(top)))
    code = 0
    for i in range(top):
        code += int((g.levels[i] + g.levels[i + 1]) * _F32(0.5) < y)
    return code

"""Rows while they are being rounded: codes, scales, and the values that they stand for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.half import f16_value
from pocketquant.quant.rounding.kernel import jit
from pocketquant.quant.rounding.layouts import I16Array, Layout, Scales, U16Array

_F32 = np.float32


class Grid(NamedTuple):
    """A `Layout` as kernels read it; see there."""

    levels: F32Array
    is_even: bool
    part_len: int
    block_len: int
    has_parts: bool
    scale_low: int
    scale_high: int
    offset_high: int
    sign: np.float32


class State(NamedTuple):
    """Rows of n x k weights, divided by a power of two each, so that sums of squares stay in range.

    Attributes:
        weights: f32[n, k], the originals.
        values: f32[n, k], what the codes stand for.
        errors: f32[n, k], values - weights.
        codes: u8[n, k].
        scale, offset, d, dmin: as in `Scales`.
        shrink: f32[n], the factor between a row here and in the file, a power of two.
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
    """The numbers of a layout that kernels need."""
    return Grid(
        layout.levels,
        layout.is_even,
        layout.part_len,
        layout.block_len,
        layout.has_parts,
        layout.scale_low,
        layout.scale_high,
        layout.offset_high,
        _F32(layout.offset_sign),
    )


def new_state(weights: F32Array, layout: Layout, together: bool = False) -> State:
    """Rows f32[n, k] with nothing decided: all codes and scales zero; `together` divides all by the same."""
    n_rows, n_cols = weights.shape
    peak = np.abs(weights).max(axis=1, initial=0.0)
    if together:
        peak[:] = peak.max(initial=0.0)
    exponent = np.clip(np.frexp(peak)[1], -120, 120)
    shrink = np.where(peak > 0, np.ldexp(np.float32(1), -exponent), np.float32(1)).astype(np.float32)
    part = np.zeros((2, n_rows, n_cols // layout.part_len), np.int16)
    block = np.zeros((2, n_rows, n_cols // layout.block_len), np.uint16)
    scaled = weights * shrink[:, None]
    codes = np.zeros((n_rows, n_cols), np.uint8)
    return State(scaled, np.zeros_like(scaled), -scaled, codes, part[0], part[1], block[0], block[1], shrink)


def rows_of(state: State, rows: npt.NDArray[np.intp]) -> State:
    """A copy of some rows."""
    return State._make(array[rows] for array in state)


def set_scales(state: State, layout: Layout, start: int, scales: Scales, rows: slice = slice(None)) -> None:
    """Writes the scales of the columns from `start` on."""
    for name, unit_len in (("scale", "part_len"), ("offset", "part_len"), ("d", "block_len"), ("dmin", "block_len")):
        given, at = getattr(scales, name), start // getattr(layout, unit_len)
        getattr(state, name)[rows, at : at + given.shape[1]] = given


def pack(state: State, layout: Layout) -> U8Array:
    """The encoded rows."""
    return layout.pack(state.codes, Scales(state.scale, state.offset, state.d, state.dmin))


@jit
def line_of(g: Grid, s: State, row: int, part: int) -> tuple[np.float32, np.float32]:
    """(scale, offset) of a part: what turns a level into a value, as the decoder computes it."""
    block = part * g.part_len // g.block_len
    scale = _F32(f16_value(s.d[row, block]) * s.shrink[row]) * _F32(s.scale[row, part])
    offset = _F32(f16_value(s.dmin[row, block]) * s.shrink[row]) * _F32(s.offset[row, part])
    return scale, offset if g.sign > 0 else -offset


@jit
def nearest_code(g: Grid, y: np.float32) -> int:
    """The code of the level nearest to y."""
    top = len(g.levels) - 1
    if g.is_even:
        return int(min(max(np.rint(y - g.levels[0]), _F32(0.0)), _F32(top)))
    code = 0
    for i in range(top):
        code += int((g.levels[i] + g.levels[i + 1]) * _F32(0.5) < y)
    return code

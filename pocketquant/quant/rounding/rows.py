"""Rounding by what goes into a layer: for every row on its own, the least d H d^T of its error d, H = E[x x^T]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pocketquant.formats import F32Array, QuantFormat, U8Array
from pocketquant.formats.layout import Layout
from pocketquant.quant.rounding.descent import descend
from pocketquant.quant.rounding.feedback import feed_back
from pocketquant.quant.rounding.matmul import subtract_product
from pocketquant.quant.rounding.prepared import DAMPING, WINDOW, F64Array, Prepared, losses
from pocketquant.quant.rounding.state import Grid, State, grid_of, new_state, pack, rows_of, set_scales


@dataclass(frozen=True)
class Rounding:
    """Which steps are taken.

    Attributes:
        feedback: error feedback over columns (and over rows, where outputs count).
        sweeps: of coordinate descent after it; 0 for none.
        two_sided: whether the outputs' curvature counts where it is known.
        damping: of H and G.
    """

    feedback: bool = True
    sweeps: int = 2
    two_sided: bool = True
    damping: float = DAMPING


DEFAULT = Rounding()


def round_rows(
    weights: F32Array, quant_format: QuantFormat, prepared: Prepared, options: Rounding = DEFAULT
) -> U8Array:
    """Encodes rows f32[n, k] for a small d H d^T; the bytes of a row do not depend on the rows that come with it.

    No row is worse than the format's own encoder leaves it with the diagonal of H as importance.

    Args:
        weights: finite.
        quant_format: of blocks; others have nothing to choose.
        prepared: H.

    Returns:
        u8[n, row_bytes].
    """
    weights = np.ascontiguousarray(weights, np.float32)
    importance = np.ascontiguousarray(prepared.hessian.diagonal())
    plain = quant_format.encode(weights, importance)
    layout = quant_format.layout
    if layout is None or not (options.feedback or options.sweeps):
        return plain
    grid, state = grid_of(layout), new_state(weights, layout)
    if options.feedback:
        loss = _choose_in_order(layout, grid, state, quant_format, prepared)
        worse = np.flatnonzero(loss > losses(decoded_errors(plain, quant_format, state), prepared))
        if len(worse):
            keep_plain(layout, grid, state, plain, worse)
    else:
        keep_plain(layout, grid, state, plain, np.arange(len(weights)))
    for _ in range(options.sweeps):
        _sweep(grid, state, prepared)
    return pack(state, layout)


def _choose_in_order(
    layout: Layout, grid: Grid, state: State, quant_format: QuantFormat, prepared: Prepared
) -> F64Array:
    """Scales and codes, block after block from the left; the rows' losses."""
    step, loss = layout.block_len, np.zeros(len(state.weights))
    for start in range(0, state.weights.shape[1], step):
        columns = slice(start, start + step)
        wanted = state.weights[:, columns].copy()
        subtract_product(state.errors[:, :start], prepared.factor[:start, columns], wanted)
        # the scales that suit the weights as they are asked for now, by what an error still costs here
        found = quant_format.encode(wanted / state.shrink[:, None], prepared.spread[columns])
        set_scales(state, layout, start, layout.scales(found))
        factor = np.ascontiguousarray(prepared.factor[columns, columns])
        feed_back(grid, state, wanted, factor, prepared.spread[columns], start, loss)
    return loss


def decoded_errors(data: U8Array, quant_format: QuantFormat, state: State) -> F32Array:
    """Errors f32[n, k] of encoded rows, divided as the state's."""
    values = quant_format.decode(data, state.weights.shape[1])
    return values * state.shrink[:, None] - state.weights


def keep_plain(
    layout: Layout, grid: Grid, state: State, plain: U8Array, rows: np.ndarray[tuple[int], np.dtype[np.intp]]
) -> None:
    """Gives rows the scales of encoded ones, and the codes nearest to the weights."""
    part = rows_of(state, rows)
    set_scales(part, layout, 0, layout.scales(plain[rows]))
    step = layout.block_len
    none, ones = np.zeros((step, step), np.float32), np.ones(step, np.float32)
    for start in range(0, part.weights.shape[1], step):
        wanted = part.weights[:, start : start + step].copy()
        feed_back(grid, part, wanted, none, ones, start, np.zeros(len(rows)))
    for name in State._fields:
        getattr(state, name)[rows] = getattr(part, name)


def _sweep(grid: Grid, state: State, prepared: Prepared) -> None:
    """Coordinate descent once over all columns."""
    n_rows, n_cols = state.weights.shape
    for start in range(0, n_cols, WINDOW):
        columns = slice(start, min(start + WINDOW, n_cols))
        gradient = np.zeros((n_rows, columns.stop - start), np.float32)
        subtract_product(state.errors, prepared.hessian[:, columns], gradient)
        np.negative(gradient, out=gradient)
        descend(grid, state, start, gradient, np.ascontiguousarray(prepared.hessian[columns, columns]))

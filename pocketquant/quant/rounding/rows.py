"""Rounding with the Hessian H = E[x x^T] of a layer's inputs: the loss of each row's error d is d H d^T."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pocketquant.formats import F32Array, QuantFormat, U8Array
from pocketquant.formats.layout import Layout
from pocketquant.quant.rounding.descent import descend
from pocketquant.quant.rounding.factored import DAMPING, WINDOW, F64Array, FactoredHessian, losses
from pocketquant.quant.rounding.feedback import feed_back
from pocketquant.quant.rounding.matmul import subtract_matmul
from pocketquant.quant.rounding.state import Grid, State, grid_of, new_state, pack_rows, rows_of, set_scales


@dataclass(frozen=True)
class Rounding:
    """Which steps are taken.

    Attributes:
        feedback: whether error feedback is used, over columns and, with a Fisher matrix, over rows.
        sweeps: number of sweeps of coordinate descent that follow; 0 for none.
        two_sided: whether the Fisher matrix of the outputs is used where the statistics have it.
        damping: of H and G, see `DAMPING`.
    """

    feedback: bool = True
    sweeps: int = 2
    two_sided: bool = True
    damping: float = DAMPING


DEFAULT = Rounding()


def round_rows(
    weights: F32Array, quant_format: QuantFormat, hessian: FactoredHessian, options: Rounding = DEFAULT
) -> U8Array:
    """Encodes rows f32[n, k] for a small loss d H d^T; the bytes of a row do not depend on the other rows.

    No row loses more than the format's own encoder makes it lose with the diagonal of H as importance.

    Args:
        weights: finite numbers.
        quant_format: a format of blocks; any other is left to its own encoder.
        hessian: H.
        options: which steps are taken.

    Returns:
        u8[n, row_bytes].
    """
    weights = np.ascontiguousarray(weights, np.float32)
    importance = np.ascontiguousarray(hessian.matrix.diagonal())
    plain = quant_format.encode(weights, importance)
    layout = quant_format.layout
    if layout is None or not (options.feedback or options.sweeps):
        return plain
    grid, state = grid_of(layout), new_state(weights, layout)
    if options.feedback:
        loss = _choose_in_order(layout, grid, state, quant_format, hessian)
        worse = np.flatnonzero(loss > losses(decoded_errors(plain, quant_format, state), hessian))
        if len(worse):
            keep_plain(layout, grid, state, plain, worse)
    else:
        keep_plain(layout, grid, state, plain, np.arange(len(weights)))
    for _ in range(options.sweeps):
        _sweep(grid, state, hessian)
    return pack_rows(state, layout)


def _choose_in_order(
    layout: Layout, grid: Grid, state: State, quant_format: QuantFormat, hessian: FactoredHessian
) -> F64Array:
    """Chooses scales and codes, block after block from the left; returns the loss of each row, f64[n]."""
    step, loss = layout.block_len, np.zeros(len(state.weights))
    for start in range(0, state.weights.shape[1], step):
        columns = slice(start, start + step)
        wanted = state.weights[:, columns].copy()
        subtract_matmul(state.errors[:, :start], hessian.factor[:start, columns], wanted)
        # the scales are chosen for the weights with feedback, each weighted by what its error costs
        found = quant_format.encode(wanted / state.shrink[:, None], hessian.pivots[columns])
        set_scales(state, layout, start, layout.scales(found))
        factor = np.ascontiguousarray(hessian.factor[columns, columns])
        feed_back(grid, state, wanted, factor, hessian.pivots[columns], start, loss)
    return loss


def decoded_errors(data: U8Array, quant_format: QuantFormat, state: State) -> F32Array:
    """Errors f32[n, k] of encoded rows, on the scale of the state."""
    values = quant_format.decode(data, state.weights.shape[1])
    return values * state.shrink[:, None] - state.weights


def keep_plain(
    layout: Layout, grid: Grid, state: State, plain: U8Array, rows: np.ndarray[tuple[int], np.dtype[np.intp]]
) -> None:
    """Gives rows the scales of the format's own encoder, and the codes nearest to the weights."""
    part = rows_of(state, rows)
    set_scales(part, layout, 0, layout.scales(plain[rows]))
    step = layout.block_len
    none, ones = np.zeros((step, step), np.float32), np.ones(step, np.float32)
    for start in range(0, part.weights.shape[1], step):
        wanted = part.weights[:, start : start + step].copy()
        feed_back(grid, part, wanted, none, ones, start, np.zeros(len(rows)))
    for name in State._fields:
        getattr(state, name)[rows] = getattr(part, name)


def _sweep(grid: Grid, state: State, hessian: FactoredHessian) -> None:
    """One sweep of coordinate descent over all columns."""
    n_rows, n_cols = state.weights.shape
    for start in range(0, n_cols, WINDOW):
        columns = slice(start, min(start + WINDOW, n_cols))
        gradient = np.zeros((n_rows, columns.stop - start), np.float32)
        subtract_matmul(state.errors, hessian.matrix[:, columns], gradient)
        np.negative(gradient, out=gradient)
        descend(grid, state, start, gradient, np.ascontiguousarray(hessian.matrix[columns, columns]))

"""Rounding by both sides of a layer: the least tr(G D H D^T) of a matrix's error D, G = E[g g^T] over output gradients.

The rows are no longer independent: what one row loses in a direction of the outputs, others can make up for. With
G = S S^T, S upper triangular like H's R, the objective is the squared length of S^T D R, whose element (a, c) knows
rows up to a and columns up to c: error feedback runs over rows and columns at once. Coordinate descent then takes row
after row: row a's share of the objective is G_aa times the one-sided one with (G D H)_a / G_aa for its gradient.
"""

from __future__ import annotations

from math import fsum

import numpy as np

from pocketquant.formats import F32Array, QuantFormat, U8Array
from pocketquant.formats.layout import Layout
from pocketquant.quant.rounding.descent import descend_row, inverse_diagonal, new_room
from pocketquant.quant.rounding.feedback import feed_back_row
from pocketquant.quant.rounding.kernel import jit
from pocketquant.quant.rounding.matmul import add_squares, subtract_product
from pocketquant.quant.rounding.prepared import WINDOW, Prepared
from pocketquant.quant.rounding.rows import DEFAULT, Rounding, decoded_errors, keep_plain
from pocketquant.quant.rounding.state import Grid, State, grid_of, new_state, pack, set_scales

_ROWS = 32
"""Rows whose gradients are kept up to date one by one; the others' come from products."""


def round_matrix(
    weights: F32Array, quant_format: QuantFormat, inputs: Prepared, outputs: Prepared, options: Rounding = DEFAULT
) -> U8Array:
    """Encodes a matrix f32[m, k] for a small tr(G D H D^T); never worse than the format's own encoder.

    Args:
        weights: finite.
        quant_format: of blocks; others have nothing to choose.
        inputs: H, k x k.
        outputs: G, m x m.

    Returns:
        u8[m, row_bytes].
    """
    weights = np.ascontiguousarray(weights, np.float32)
    plain = quant_format.encode(weights, np.ascontiguousarray(inputs.hessian.diagonal()))
    layout = quant_format.layout
    if layout is None or not (options.feedback or options.sweeps):
        return plain
    # one power of two for all rows, because they are weighed against each other
    grid, state = grid_of(layout), new_state(weights, layout, together=True)
    everything = np.arange(len(weights))
    if options.feedback:
        _choose_in_order(layout, grid, state, quant_format, inputs, outputs)
        bound = two_sided_loss(decoded_errors(plain, quant_format, state), inputs, outputs)
        if two_sided_loss(state.errors, inputs, outputs) > bound:
            keep_plain(layout, grid, state, plain, everything)
    else:
        keep_plain(layout, grid, state, plain, everything)
    for _ in range(options.sweeps):
        _sweep(grid, state, inputs, outputs)
    return pack(state, layout)


def two_sided_loss(errors: F32Array, inputs: Prepared, outputs: Prepared) -> float:
    """tr(G D H D^T) of errors f32[m, k]."""
    sums = np.zeros(len(errors))
    for start in range(0, errors.shape[1], WINDOW):
        columns = slice(start, start + WINDOW)
        right = -errors[:, columns]
        subtract_product(errors[:, : start + WINDOW], inputs.factor[: start + WINDOW, columns], right)
        both = right.copy()
        np.negative(both, out=both)
        subtract_product(np.ascontiguousarray(outputs.factor.T), right, both)
        add_squares(both, inputs.spread[columns], sums)
    return fsum(sums * outputs.spread)


def _choose_in_order(
    layout: Layout, grid: Grid, state: State, quant_format: QuantFormat, inputs: Prepared, outputs: Prepared
) -> None:
    """Scales and codes, blocks from the left, rows from the top."""
    n_rows, n_cols = state.weights.shape
    above = np.ascontiguousarray(outputs.factor.T)
    for start in range(0, n_cols, layout.block_len):
        columns = slice(start, start + layout.block_len)
        wanted = state.weights[:, columns].copy()
        subtract_product(state.errors[:, :start], inputs.factor[:start, columns], wanted)
        right = np.zeros_like(wanted)  # D R of these columns, over R's diagonal
        factor = np.ascontiguousarray(inputs.factor[columns, columns])
        for first in range(0, n_rows, _ROWS):
            rows = slice(first, min(first + _ROWS, n_rows))
            feedback = np.zeros_like(wanted[rows])
            subtract_product(above[rows, :first], right[:first], feedback)
            found = quant_format.encode((wanted[rows] + feedback) / state.shrink[rows, None], inputs.spread[columns])
            scales = layout.scales(found)
            set_scales(state, layout, start, scales, rows)
            _feed_back_rows(grid, state, wanted, feedback, right, factor, outputs.factor, start, first, rows.stop)


@jit
def _feed_back_rows(
    g: Grid,
    s: State,
    wanted: F32Array,
    feedback: F32Array,
    right: F32Array,
    factor: F32Array,
    above: F32Array,
    start: int,
    first: int,
    last: int,
) -> None:
    length = wanted.shape[1]
    for row in range(first, last):
        shift = feedback[row - first]
        for i in range(first, row):
            for c in range(length):
                shift[c] -= above[i, row] * right[i, c]
        want = wanted[row]
        for c in range(length):
            want[c] += shift[c]
        feed_back_row(g, s, want, factor, start, row)
        for c in range(length):
            right[row, c] = s.values[row, start + c] - (want[c] - shift[c])


def _sweep(grid: Grid, state: State, inputs: Prepared, outputs: Prepared) -> None:
    """Coordinate descent once over all columns and rows."""
    n_rows, n_cols = state.weights.shape
    for start in range(0, n_cols, WINDOW):
        columns = slice(start, min(start + WINDOW, n_cols))
        minus_right = np.zeros((n_rows, columns.stop - start), np.float32)  # -D H of these columns
        subtract_product(state.errors, inputs.hessian[:, columns], minus_right)
        hessian = np.ascontiguousarray(inputs.hessian[columns, columns])
        for first in range(0, n_rows, _ROWS):
            rows = slice(first, min(first + _ROWS, n_rows))
            gradient = np.zeros_like(minus_right[rows])
            subtract_product(outputs.hessian[rows], minus_right, gradient)
            _descend_rows(grid, state, start, first, gradient, minus_right, hessian, outputs.hessian)


@jit
def _descend_rows(
    g: Grid,
    s: State,
    start: int,
    first: int,
    gradient: F32Array,
    minus_right: F32Array,
    hessian: F32Array,
    outer: F32Array,
) -> None:
    n_rows, length = gradient.shape
    room, h, per_h = new_room(), hessian.ravel(), inverse_diagonal(hessian)
    r, moved = np.empty(length, np.float32), np.empty(length, np.float32)
    for i in range(n_rows):
        row = first + i
        weight = outer[row, row]
        for c in range(length):
            r[c] = gradient[i, c] / weight
            moved[c] = r[c]
        descend_row(g, s, row, start, r, h, per_h, room)
        for c in range(length):
            moved[c] = r[c] - moved[c]
            minus_right[row, c] -= moved[c]
        for j in range(i + 1, n_rows):
            share = outer[first + j, row]
            for c in range(length):
                gradient[j, c] += share * moved[c]

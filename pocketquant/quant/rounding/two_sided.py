"""Rounding with the Hessian H of a layer's inputs and the Fisher matrix G = E[g g^T] of its output gradients.

The loss of a matrix's error D is tr(G D H D^T). The rows are not independent: other rows can make up for what one row
loses in a direction of the outputs. With G = S S^T and S upper triangular, as R is for H, the loss is the squared
length of S^T D R, whose element (a, c) depends on the rows up to a and the columns up to c. So error feedback runs over
rows and columns at once. Coordinate descent takes one row after the other: the share of row a in the loss is G_aa times
the one-sided loss, with (G D H)_a / G_aa as its gradient.
"""

from __future__ import annotations

from math import fsum

import numpy as np

from pocketquant.formats import F32Array, QuantFormat, U8Array
from pocketquant.formats.layout import Layout
from pocketquant.quant.rounding.descent import descend_row, inverse_diagonal, new_workspace
from pocketquant.quant.rounding.factored import WINDOW, FactoredHessian
from pocketquant.quant.rounding.feedback import feed_back_row
from pocketquant.quant.rounding.kernel import jit
from pocketquant.quant.rounding.matmul import add_squares, subtract_matmul
from pocketquant.quant.rounding.rows import DEFAULT, Rounding, decoded_errors, keep_plain
from pocketquant.quant.rounding.state import Grid, State, grid_of, new_state, pack_rows, set_scales

_ROWS = 32
"""Number of rows whose gradients are updated after each row; the gradients of later rows come from matrix products."""


def round_matrix(
    weights: F32Array,
    quant_format: QuantFormat,
    hessian: FactoredHessian,
    fisher: FactoredHessian,
    options: Rounding = DEFAULT,
) -> U8Array:
    """Encodes a matrix f32[m, k] for a small loss tr(G D H D^T), never larger than that of the format's own encoder.

    Args:
        weights: finite numbers.
        quant_format: a format of blocks; any other is left to its own encoder.
        hessian: H, k x k.
        fisher: G, m x m.
        options: which steps are taken.

    Returns:
        u8[m, row_bytes].
    """
    weights = np.ascontiguousarray(weights, np.float32)
    plain = quant_format.encode(weights, np.ascontiguousarray(hessian.matrix.diagonal()))
    layout = quant_format.layout
    if layout is None or not (options.feedback or options.sweeps):
        return plain
    # one power of two for all rows, because their errors are compared with each other
    grid, state = grid_of(layout), new_state(weights, layout, together=True)
    everything = np.arange(len(weights))
    if options.feedback:
        _choose_in_order(layout, grid, state, quant_format, hessian, fisher)
        bound = two_sided_loss(decoded_errors(plain, quant_format, state), hessian, fisher)
        if two_sided_loss(state.errors, hessian, fisher) > bound:
            keep_plain(layout, grid, state, plain, everything)
    else:
        keep_plain(layout, grid, state, plain, everything)
    for _ in range(options.sweeps):
        _sweep(grid, state, hessian, fisher)
    return pack_rows(state, layout)


def two_sided_loss(errors: F32Array, hessian: FactoredHessian, fisher: FactoredHessian) -> float:
    """The loss tr(G D H D^T) of errors D f32[m, k]."""
    sums = np.zeros(len(errors))
    for start in range(0, errors.shape[1], WINDOW):
        columns = slice(start, start + WINDOW)
        right = -errors[:, columns]
        subtract_matmul(errors[:, : start + WINDOW], hessian.factor[: start + WINDOW, columns], right)
        both = right.copy()
        np.negative(both, out=both)
        subtract_matmul(np.ascontiguousarray(fisher.factor.T), right, both)
        add_squares(both, hessian.pivots[columns], sums)
    return fsum(sums * fisher.pivots)


def _choose_in_order(
    layout: Layout,
    grid: Grid,
    state: State,
    quant_format: QuantFormat,
    hessian: FactoredHessian,
    fisher: FactoredHessian,
) -> None:
    """Chooses scales and codes, blocks from the left and rows from the top."""
    n_rows, n_cols = state.weights.shape
    above = np.ascontiguousarray(fisher.factor.T)
    for start in range(0, n_cols, layout.block_len):
        columns = slice(start, start + layout.block_len)
        wanted = state.weights[:, columns].copy()
        subtract_matmul(state.errors[:, :start], hessian.factor[:start, columns], wanted)
        right = np.zeros_like(wanted)  # D R of these columns, divided by R's diagonal
        factor = np.ascontiguousarray(hessian.factor[columns, columns])
        for first in range(0, n_rows, _ROWS):
            rows = slice(first, min(first + _ROWS, n_rows))
            feedback = np.zeros_like(wanted[rows])
            subtract_matmul(above[rows, :first], right[:first], feedback)
            found = quant_format.encode((wanted[rows] + feedback) / state.shrink[rows, None], hessian.pivots[columns])
            scales = layout.scales(found)
            set_scales(state, layout, start, scales, rows)
            _feed_back_rows(grid, state, wanted, feedback, right, factor, fisher.factor, start, first, rows.stop)


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


def _sweep(grid: Grid, state: State, hessian: FactoredHessian, fisher: FactoredHessian) -> None:
    """One sweep of coordinate descent over all columns and rows."""
    n_rows, n_cols = state.weights.shape
    for start in range(0, n_cols, WINDOW):
        columns = slice(start, min(start + WINDOW, n_cols))
        minus_right = np.zeros((n_rows, columns.stop - start), np.float32)  # -D H of these columns
        subtract_matmul(state.errors, hessian.matrix[:, columns], minus_right)
        square = np.ascontiguousarray(hessian.matrix[columns, columns])
        for first in range(0, n_rows, _ROWS):
            rows = slice(first, min(first + _ROWS, n_rows))
            gradient = np.zeros_like(minus_right[rows])
            subtract_matmul(fisher.matrix[rows], minus_right, gradient)
            _descend_rows(grid, state, start, first, gradient, minus_right, square, fisher.matrix)


@jit
def _descend_rows(
    g: Grid,
    s: State,
    start: int,
    first: int,
    gradient: F32Array,
    minus_right: F32Array,
    hessian: F32Array,
    fisher: F32Array,
) -> None:
    n_rows, length = gradient.shape
    workspace, h, per_h = new_workspace(), hessian.ravel(), inverse_diagonal(hessian)
    r, moved = np.empty(length, np.float32), np.empty(length, np.float32)
    for i in range(n_rows):
        row = first + i
        weight = fisher[row, row]
        for c in range(length):
            r[c] = gradient[i, c] / weight
            moved[c] = r[c]
        descend_row(g, s, row, start, r, h, per_h, workspace)
        for c in range(length):
            moved[c] = r[c] - moved[c]
            minus_right[row, c] -= moved[c]
        for j in range(i + 1, n_rows):
            share = fisher[first + j, row]
            for c in range(length):
                gradient[j, c] += share * moved[c]

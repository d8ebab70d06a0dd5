"""The triangular root of a matrix, each element summed in one order, whatever the machine and the threads.

A LAPACK may be faster for wide layers, but its sums depend on its build, the processor and the number of threads, and
so would a weight that lies between two levels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array
from pocketquant.quant.rounding.kernel import jit

F64Array = npt.NDArray[np.float64]
_BLOCK = 128
"""Columns that are worked on at a time."""
_ROWS = 16
"""Rows that go through a block together: with eight columns of the root they stay in the first cache."""


@jit
def take_root(matrix: F64Array) -> bool:
    """Puts R, upper triangular, into the upper triangle of f64[k, k], R R^T being the matrix; whether there is one.

    What is below the diagonal is neither read nor changed. Blocks of columns from the right: all columns behind a block
    are taken from it, then it is factored column by column.
    """
    n = len(matrix)
    stop, has_root = n, True
    while stop > 0:
        start = max(0, stop - _BLOCK)
        below = matrix[start:stop, start:stop].copy()  # taking whole rectangles is faster than sparing this
        if stop < n:
            _subtract_behind(matrix, start, stop)
        for j in range(stop - 1, start - 1, -1):
            pivot = matrix[j, j]
            if not pivot > 0.0:
                has_root = False
                break
            root = np.sqrt(pivot)
            column = matrix[start : j + 1, j] / root
            column[j - start] = root
            for i in range(j):
                x = matrix[i, j] / root
                matrix[i, j] = x
                line = matrix[i, start:j]
                for c in range(j - start):
                    line[c] -= x * column[c]
            matrix[j, j] = root
        for i in range(stop - start):
            matrix[start + i, start : start + i] = below[i, :i]
        if not has_root:
            return False
        stop = start
    return True


@jit
def _subtract_behind(matrix: F64Array, start: int, stop: int) -> None:
    """Takes from the columns [start, stop) what the columns from `stop` on make of them."""
    n, width = len(matrix), stop - start
    across = np.empty((_BLOCK, width))
    for first in range(stop, n, _BLOCK):
        depth = min(_BLOCK, n - first)
        for c in range(width):
            for i in range(depth):
                across[i, c] = matrix[start + c, first + i]
        whole = depth // 8 * 8
        for top in range(0, stop, _ROWS):
            bottom = min(top + _ROWS, stop)
            for i in range(0, whole, 8):
                for r in range(top, bottom):
                    _subtract_eight(matrix[r, first + i : first + i + 8], across[i : i + 8], matrix[r, start:stop])
            for i in range(whole, depth):
                for r in range(top, bottom):
                    line, share = matrix[r, start:stop], matrix[r, first + i]
                    for c in range(width):
                        line[c] -= share * across[i, c]


@jit
def _subtract_eight(x: F64Array, across: F64Array, line: F64Array) -> None:
    x0, x1, x2, x3, x4, x5, x6, x7 = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
    for c in range(len(line)):
        y = line[c] - x0 * across[0, c]
        y -= x1 * across[1, c]
        y -= x2 * across[2, c]
        y -= x3 * across[3, c]
        y -= x4 * across[4, c]
        y -= x5 * across[5, c]
        y -= x6 * across[6, c]
        line[c] = y - x7 * across[7, c]


@jit
def restore(matrix: F64Array, diagonal: F64Array) -> None:
    """Makes the matrix anew whose root was taken, or tried to be, from what is below the diagonal."""
    for i in range(len(matrix)):
        matrix[i, i] = diagonal[i]
        for j in range(i):
            matrix[j, i] = matrix[i, j]


@jit
def take_apart(matrix: F64Array, diagonal: F64Array, original: F32Array, factor: F32Array) -> None:
    """The matrix whose root was taken, and the root over its own diagonal, zero on and below it."""
    n = len(matrix)
    for i in range(n):
        for j in range(i):
            original[i, j] = matrix[i, j]
            factor[i, j] = 0.0
        original[i, i] = diagonal[i]
        factor[i, i] = 0.0
    for first in range(0, n, 64):  # in tiles: a column at a time would miss the cache at every step
        for i in range(n):
            for j in range(max(first, i + 1), min(first + 64, n)):
                original[i, j] = original[j, i]
                factor[i, j] = matrix[i, j] / matrix[j, j]

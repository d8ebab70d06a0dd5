"""The Cholesky factorization, with one order of summation on every machine and for any number of threads.

A LAPACK may be faster for wide layers, but the order of its sums depends on its build, the processor and the number of
threads. The code of a weight that lies between two levels would then depend on them too.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array
from pocketquant.quant.rounding.kernel import jit

F64Array = npt.NDArray[np.float64]
_BLOCK = 128
"""Number of columns that are processed at a time."""
_ROWS = 16
"""Number of rows that go through a block together: with eight columns of the factor they stay in the L1 cache."""


@jit
def factor_in_place(matrix: F64Array) -> bool:
    """Factors a symmetric f64[k, k] as R R^T and puts R, upper triangular, into its upper triangle.

    The elements below the diagonal are neither read nor changed. Blocks of columns are factored from the right: the
    products of all columns behind a block are subtracted from it, then it is factored column by column.

    Returns:
        Whether the matrix is positive definite. If it is not, its upper triangle holds nothing of use.
    """
    n = len(matrix)
    stop, is_positive = n, True
    while stop > 0:
        start = max(0, stop - _BLOCK)
        below = matrix[start:stop, start:stop].copy()  # computing whole rectangles is faster than leaving this out
        if stop < n:
            _subtract_behind(matrix, start, stop)
        for j in range(stop - 1, start - 1, -1):
            pivot = matrix[j, j]
            if not pivot > 0.0:
                is_positive = False
                break
            diagonal = np.sqrt(pivot)
            column = matrix[start : j + 1, j] / diagonal
            column[j - start] = diagonal
            for i in range(j):
                x = matrix[i, j] / diagonal
                matrix[i, j] = x
                line = matrix[i, start:j]
                for c in range(j - start):
                    line[c] -= x * column[c]
            matrix[j, j] = diagonal
        for i in range(stop - start):
            matrix[start + i, start : start + i] = below[i, :i]
        if not is_positive:
            return False
        stop = start
    return True


@jit
def _subtract_behind(matrix: F64Array, start: int, stop: int) -> None:
    """Subtracts the products of the columns from `stop` on from the columns [start, stop)."""
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
    """Restores the matrix after `factor_in_place`, from the elements below the diagonal and the diagonal given."""
    for i in range(len(matrix)):
        matrix[i, i] = diagonal[i]
        for j in range(i):
            matrix[j, i] = matrix[i, j]


@jit
def separate(matrix: F64Array, diagonal: F64Array, original: F32Array, factor: F32Array) -> None:
    """Writes a factored matrix into two: the original, and the factor divided by its own diagonal.

    The factor gets zeros on and below the diagonal.
    """
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

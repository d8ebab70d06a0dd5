"""A Hessian with damping, scaled, and its Cholesky factor."""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array
from pocketquant.quant.rounding.cholesky import factor_in_place, restore, separate
from pocketquant.quant.rounding.matmul import add_squares, subtract_matmul

F64Array = npt.NDArray[np.float64]
DAMPING = 0.01
"""What is added to the diagonal, as a share of its mean: a text shows only some of the inputs a layer will meet."""

WINDOW = 256
"""Number of columns that are processed at a time."""

_REPAIRS = (0.0, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class FactoredHessian:
    """A Hessian H and its Cholesky factor, made once for all tensors that share it. A Fisher matrix G is one as well.

    H = R R^T, where R is upper triangular: the factor that starts from the last column.

    Attributes:
        matrix: f32[k, k], H with damping, scaled so that its largest diagonal element is 1.
        factor: f32[k, k], R with every column divided by its diagonal element, and zeros on and below the diagonal.
        pivots: f32[k], the squares of R's diagonal: what an error in a column costs if all later columns make up for
            it as well as they can.
    """

    matrix: F32Array
    factor: F32Array
    pivots: F32Array


def factor_hessian(hessian: F32Array | F64Array, damping: float = DAMPING) -> FactoredHessian:
    """Adds damping to a Hessian [k, k] and factors it, in f64; an input that is always zero gets the damping alone.

    Args:
        hessian: symmetric. A matrix in f64 is overwritten.
        damping: see `DAMPING`.

    Raises:
        ValueError: not a positive semi-definite matrix.
    """
    matrix: F64Array = hessian.astype(np.float64, copy=False)
    k = len(matrix)
    if matrix.shape != (k, k) or k == 0 or not np.isfinite(matrix).all() or matrix.diagonal().min() < 0.0:
        raise ValueError(f"not a Hessian: shape {list(matrix.shape)}, or numbers that a Hessian cannot hold")
    peak = float(matrix.diagonal().max())
    if peak > 0.0:
        matrix /= peak
        matrix.flat[:: k + 1] += damping * _mean_diagonal(matrix)
        matrix /= matrix.diagonal().max()
    else:
        matrix[:] = np.eye(k)
    diagonal = _factor(matrix)
    original, factor = np.empty((2, k, k), np.float32)
    separate(matrix, diagonal, original, factor)
    return FactoredHessian(original, factor, (matrix.diagonal() ** 2).astype(np.float32))


def _factor(matrix: F64Array) -> F64Array:
    """Factors a matrix in place, with a larger diagonal where it is not positive definite; returns the diagonal."""
    mean, diagonal = _mean_diagonal(matrix), matrix.diagonal().copy()
    for repair in _REPAIRS:
        if repair:
            diagonal += repair * mean
            restore(matrix, diagonal)
        if factor_in_place(matrix):
            return diagonal
    raise ValueError("not a Hessian: the matrix is far from positive semi-definite")


def _mean_diagonal(matrix: F64Array) -> float:
    return fsum(matrix.diagonal()) / len(matrix)


def losses(errors: F32Array, hessian: FactoredHessian) -> F64Array:
    """The loss d H d^T of each row d of errors f32[n, k]: f64[n]."""
    total = np.zeros(len(errors))
    for start in range(0, errors.shape[1], WINDOW):
        columns = slice(start, start + WINDOW)
        product = errors[:, columns].copy()  # d R of these columns, divided by R's diagonal
        np.negative(product, out=product)
        subtract_matmul(errors[:, : start + WINDOW], hessian.factor[: start + WINDOW, columns], product)
        add_squares(product, hessian.pivots[columns], total)
    return total

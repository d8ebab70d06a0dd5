"""A second moment made ready for rounding: damped, scaled, factored."""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array
from pocketquant.quant.rounding.cholesky import restore, take_apart, take_root
from pocketquant.quant.rounding.matmul import add_squares, subtract_product

F64Array = npt.NDArray[np.float64]
DAMPING = 0.01
"""Added to the diagonal, as a share of its mean: a text shows only some of what a layer will meet."""

WINDOW = 256
"""Columns that are worked on at a time."""

_REPAIRS = (0.0, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Prepared:
    """A second moment H, made ready once for all tensors that share it.

    Attributes:
        hessian: f32[k, k], damped, scaled to a largest diagonal element of 1.
        factor: f32[k, k], R over its diagonal, zero on and below the diagonal; H = R R^T with R upper triangular.
        spread: f32[k], squares of R's diagonal: what an error costs that no later column can make up for.
    """

    hessian: F32Array
    factor: F32Array
    spread: F32Array


def prepare(moment: F32Array | F64Array, damping: float = DAMPING) -> Prepared:
    """Damps and factors a moment [k, k], in f64; inputs that are always zero get the damping alone.

    Args:
        moment: symmetric. One in f64 is taken for the work itself and holds nothing of use afterwards.
        damping: see `DAMPING`.

    Raises:
        ValueError: not a positive semi-definite matrix.
    """
    matrix: F64Array = moment.astype(np.float64, copy=False)
    k = len(matrix)
    if matrix.shape != (k, k) or k == 0 or not np.isfinite(matrix).all() or matrix.diagonal().min() < 0.0:
        raise ValueError(f"no second moment: shape {list(matrix.shape)}, or numbers that none can hold")
    peak = float(matrix.diagonal().max())
    if peak > 0.0:
        matrix /= peak
        matrix.flat[:: k + 1] += damping * _mean_diagonal(matrix)
        matrix /= matrix.diagonal().max()
    else:
        matrix[:] = np.eye(k)
    diagonal = _take_root(matrix)
    hessian, factor = np.empty((2, k, k), np.float32)
    take_apart(matrix, diagonal, hessian, factor)
    return Prepared(hessian, factor, (matrix.diagonal() ** 2).astype(np.float32))


def _take_root(matrix: F64Array) -> F64Array:
    """`take_root`, the diagonal raised where rounding left the matrix short of positive; gives the diagonal."""
    mean, diagonal = _mean_diagonal(matrix), matrix.diagonal().copy()
    for repair in _REPAIRS:
        if repair:
            diagonal += repair * mean
            restore(matrix, diagonal)
        if take_root(matrix):
            return diagonal
    raise ValueError("no second moment: the matrix is far from positive semi-definite")


def _mean_diagonal(matrix: F64Array) -> float:
    return fsum(matrix.diagonal()) / len(matrix)


def losses(errors: F32Array, prepared: Prepared) -> F64Array:
    """d H d^T of each row d of errors f32[n, k], f64[n]."""
    total = np.zeros(len(errors))
    for start in range(0, errors.shape[1], WINDOW):
        columns = slice(start, start + WINDOW)
        product = errors[:, columns].copy()  # d R of these columns, over R's diagonal
        np.negative(product, out=product)
        subtract_product(errors[:, : start + WINDOW], prepared.factor[: start + WINDOW, columns], product)
        add_squares(product, prepared.spread[columns], total)
    return total

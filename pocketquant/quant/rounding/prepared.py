"""A second moment made ready for rounding: damped, scaled, factored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array
from pocketquant.quant.rounding.product import subtract_product

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


def prepare(moment: F32Array, damping: float = DAMPING) -> Prepared:
    """Damps and factors a moment f32[k, k], in f64; inputs that are always zero get the damping alone.

    Raises:
        ValueError: not a symmetric positive semi-definite matrix.
    """
    matrix = np.array(moment, np.float64)
    k = len(matrix)
    if matrix.shape != (k, k) or k == 0 or not np.isfinite(matrix).all() or matrix.diagonal().min() < 0.0:
        raise ValueError(f"no second moment: shape {list(matrix.shape)}, or numbers that none can hold")
    peak = float(matrix.diagonal().max())
    if peak > 0.0:
        matrix /= peak
        matrix.flat[:: k + 1] += damping * matrix.diagonal().mean()
        matrix /= matrix.diagonal().max()
    else:
        matrix[:] = np.eye(k)
    root = _upper_root(matrix)
    hessian = matrix.astype(np.float32)
    del matrix
    diagonal = root.diagonal().copy()
    factor = np.ascontiguousarray(root, np.float32)
    del root
    factor /= diagonal.astype(np.float32)
    factor.flat[:: k + 1] = 0.0
    return Prepared(hessian, factor, (diagonal**2).astype(np.float32))


def _upper_root(matrix: F64Array) -> F64Array:
    """R, upper triangular, with R R^T = matrix; where rounding left it short of positive, the diagonal is raised."""
    mean = matrix.diagonal().mean()
    for repair in _REPAIRS:
        matrix.flat[:: len(matrix) + 1] += repair * mean
        try:
            root: F64Array = np.linalg.cholesky(matrix[::-1, ::-1]).astype(np.float64, copy=False)
            return root[::-1, ::-1]
        except np.linalg.LinAlgError:
            continue
    raise ValueError("no second moment: the matrix is far from positive semi-definite")


def losses(errors: F32Array, prepared: Prepared) -> F64Array:
    """d H d^T of each row d of errors f32[n, k], f64[n]."""
    total = np.zeros(len(errors))
    for start in range(0, errors.shape[1], WINDOW):
        columns = slice(start, start + WINDOW)
        product = errors[:, columns].copy()  # d R of these columns, over R's diagonal
        np.negative(product, out=product)
        subtract_product(errors[:, : start + WINDOW], prepared.factor[: start + WINDOW, columns], product)
        total += (product.astype(np.float64) ** 2) @ prepared.spread[columns].astype(np.float64)
    return total

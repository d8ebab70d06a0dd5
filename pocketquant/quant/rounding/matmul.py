"""The matrix product, with one order of summation on every machine, for any number of threads and of other rows.

A BLAS is half as fast again, but its result for a row depends on the number of rows beside it and on the processor.
The code of a weight that lies between two levels would then depend on them too.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array
from pocketquant.formats.lanes import load, store
from pocketquant.quant.rounding.kernel import jit

_PANEL = 256
"""Number of rows of b that are summed before the next rows of a: with 32 columns they stay in the L1 cache."""


@jit
def subtract_matmul(a: F32Array, b: F32Array, out: F32Array) -> None:
    """out -= a @ b for a f32[n, p], b f32[p, q], out f32[n, q], with contiguous rows and q a multiple of 16.

    The p products of an element are subtracted one after the other, without fused multiply-add.
    """
    n, p = a.shape
    q = out.shape[1]
    q32, n4 = q // 32 * 32, n // 4 * 4
    for first in range(0, p, _PANEL):
        last = min(p, first + _PANEL)
        for c in range(0, q32, 32):
            for r in range(0, n4, 4):
                x0, y0 = load(out[r], c), load(out[r], c + 16)
                x1, y1 = load(out[r + 1], c), load(out[r + 1], c + 16)
                x2, y2 = load(out[r + 2], c), load(out[r + 2], c + 16)
                x3, y3 = load(out[r + 3], c), load(out[r + 3], c + 16)
                for i in range(first, last):
                    u, v = load(b[i], c), load(b[i], c + 16)
                    x0 -= u * a[r, i]
                    y0 -= v * a[r, i]
                    x1 -= u * a[r + 1, i]
                    y1 -= v * a[r + 1, i]
                    x2 -= u * a[r + 2, i]
                    y2 -= v * a[r + 2, i]
                    x3 -= u * a[r + 3, i]
                    y3 -= v * a[r + 3, i]
                store(out[r], c, x0)
                store(out[r], c + 16, y0)
                store(out[r + 1], c, x1)
                store(out[r + 1], c + 16, y1)
                store(out[r + 2], c, x2)
                store(out[r + 2], c + 16, y2)
                store(out[r + 3], c, x3)
                store(out[r + 3], c + 16, y3)
        for r in range(n):
            for c in range(q32 if r < n4 else 0, q, 16):
                x = load(out[r], c)
                for i in range(first, last):
                    x -= load(b[i], c) * a[r, i]
                store(out[r], c, x)


@jit
def add_squares(a: F32Array, weights: F32Array, out: npt.NDArray[np.float64]) -> None:
    """Adds the squares of a f32[n, q], weighted by weights f32[q], to out f64[n], one after the other."""
    for r in range(a.shape[0]):
        for c in range(a.shape[1]):
            out[r] += np.float64(a[r, c]) * np.float64(a[r, c]) * np.float64(weights[c])

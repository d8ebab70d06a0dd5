"""Error feedback: every column makes up for the errors of the columns before it.

With H = R R^T and R upper triangular, the loss d H d^T of a row's error d is the squared length of d R. Element c of it
depends on the errors up to column c only. So the columns are rounded in order, each weight to the value that brings its
element nearest to zero. Sources: Frantar et al., "GPTQ", 2022; Chee et al., "QuIP", 2023 (LDLQ, the same without an
inverse).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array
from pocketquant.formats.lanes import load, store
from pocketquant.quant.rounding.kernel import jit
from pocketquant.quant.rounding.state import Grid, State, code_of_level, scale_and_offset

_F32 = np.float32
F64Array = npt.NDArray[np.float64]


@jit
def feed_back_row(g: Grid, s: State, want: F32Array, factor: F32Array, start: int, row: int) -> None:
    """Chooses the codes of columns [start, start + length) of a row, whose scales have been chosen before.

    Args:
        want: f32[length], the weights with the feedback of all columns before `start`. At the end it holds each weight
            with the feedback of all columns before its own.
        factor: f32[length, length], these columns of R divided by R's diagonal, zero on and below the diagonal.
    """
    length = len(want)
    values, codes, weights, errors = s.values[row], s.codes[row], s.weights[row], s.errors[row]
    for first in range(0, length, g.sub_block_len):
        scale, offset = scale_and_offset(g, s, row, (start + first) // g.sub_block_len)
        inverse = _F32(1.0) / scale if abs(scale) > _F32(1e-36) else _F32(0.0)
        for j in range(first, first + g.sub_block_len):
            column = start + j
            code = code_of_level(g, (want[j] - offset) * inverse)
            value = scale * g.levels[code] + offset
            error = value - weights[column]
            codes[column] = code
            values[column] = value
            errors[column] = error
            for c in range(j // 16 * 16, length, 16):
                store(want, c, load(want, c) - load(factor[j], c) * error)


@jit
def feed_back(
    g: Grid, s: State, wanted: F32Array, factor: F32Array, pivots: F32Array, start: int, loss: F64Array
) -> None:
    """Calls `feed_back_row` for all rows of wanted f32[n, length], and adds their losses to loss f64[n]."""
    for row in range(wanted.shape[0]):
        feed_back_row(g, s, wanted[row], factor, start, row)
        for j in range(wanted.shape[1]):
            miss = np.float64(s.values[row, start + j] - wanted[row, j])
            loss[row] += miss * miss * np.float64(pivots[j])

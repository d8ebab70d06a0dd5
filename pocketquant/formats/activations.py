"""What llama.cpp's CPU kernels lose of a layer's inputs: they round them to 8 bits beside quantized weights.

Beside K-quants and IQ4_XS a scale serves 256 columns (Q8_K, kept in F32), beside the other block formats 32 (Q8_0,
Q8_1, kept in F16), so one large input costs its whole block. How large the errors are is measured on the inputs
themselves; peaks of normal numbers with the same variances would give a quarter of it where inputs have long tails, as
behind SwiGLU. That Q8_1 keeps a block's sum in F16, too, is not counted.

Source: ggml/src/ggml-quants.c (`quantize_row_q8_K_ref`, `quantize_row_q8_0_ref`) and ggml/src/ggml-cpu/ggml-cpu.c
(`type_traits_cpu`) of llama.cpp (b10359).
"""

from __future__ import annotations

import math

import numba
import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array

COARSE, FINE = 256, 32
"""Columns that share a scale: every `activation_block` that a format has."""

_NOTHING = np.float32(1e-30)
"""Inputs below have errors that no sum shows, and the inverse of their scale may be infinite."""


def add_rounding_errors(rows: F32Array, sums: npt.NDArray[np.float64]) -> None:
    """Adds the squared errors of rounding rows f32[n, k] to 8 bits to sums f64[2, k].

    Args:
        rows: inputs.
        sums: by column, with scales for 256 and for 32 columns; columns that are no whole blocks have one scale.
    """
    for total, block in zip(sums, (COARSE, FINE), strict=True):
        _add_errors(rows, block if rows.shape[1] % block == 0 else rows.shape[1], block == FINE, total)


@numba.njit(nogil=True, cache=True)
def _add_errors(rows: F32Array, block: int, is_half: bool, sums: npt.NDArray[np.float64]) -> None:
    for start in range(0, rows.shape[1], block):
        stop = start + block
        for row in rows:
            peak = np.float32(0)
            for column in range(start, stop):
                peak = max(peak, abs(row[column]))
            if peak < _NOTHING:
                continue
            scale, inverse = peak / np.float32(127), np.float32(127) / peak
            if is_half:  # codes are chosen by the scale as it was, values are those of the one that is kept
                unit = np.float32(math.ldexp(1.0, max(math.frexp(scale)[1], -13) - 11))
                scale = np.rint(scale / unit) * unit
            for column in range(start, stop):
                error = row[column] - scale * np.rint(row[column] * inverse)
                sums[column] += np.float64(error) * np.float64(error)

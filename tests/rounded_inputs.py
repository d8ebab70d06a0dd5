"""What rounding inputs to 8 bits loses, written out in numpy: the definition that kernels are compared with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def rounding_errors(rows: npt.NDArray[np.float32], block: int, *, is_half: bool) -> npt.NDArray[np.float64]:
    """Sums over rows f32[n, k] of squared errors by column, f64[k]; `is_half` where scales are kept in F16."""
    blocks = rows.reshape(len(rows), -1, block)
    peaks = np.abs(blocks).max(axis=2, keepdims=True)
    scales = peaks / np.float32(127)
    codes = np.rint(blocks * np.divide(np.float32(127), peaks, out=np.zeros_like(peaks), where=peaks > 0))
    kept = scales.astype(np.float16).astype(np.float32) if is_half else scales
    return np.square((blocks - kept * codes).astype(np.float64)).sum(axis=0).reshape(-1)

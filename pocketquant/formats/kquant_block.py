"""What the five K-quants share: 256 weights a block, in sub-blocks that each have a small scale of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.half import refuse_beyond
from pocketquant.formats.kernel import jit
from pocketquant.formats.lanes import highest, largest, load, splat, store, total

BLOCK_LEN = 256


def encode_rows(
    name: str, steps: int, kernel: Callable[..., None], layout: np.dtype[Any], rows: F32Array, weights: F32Array | None
) -> U8Array:
    """Runs `kernel(rows, importance, blocks)` over f32[n, k] rows; returns the blocks as u8[n, bytes].

    Args:
        name, steps: see `refuse_beyond`.

    Raises:
        OverflowError: a weight is beyond what a block can hold.
        ValueError: k is no multiple of 256, or `weights` is not f32[k].
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    n_rows, n_cols = rows.shape
    if n_cols % BLOCK_LEN:
        raise ValueError(f"{n_cols} columns are no multiple of {BLOCK_LEN}")
    if weights is not None and weights.shape != (n_cols,):
        raise ValueError(f"importance has shape {list(weights.shape)}, expected [{n_cols}]")
    importance = np.ascontiguousarray(np.zeros(0) if weights is None else weights, dtype=np.float32)
    blocks: npt.NDArray[Any] = np.zeros((n_rows, n_cols // BLOCK_LEN), layout)
    kernel(rows, importance, blocks)
    refuse_beyond(name, steps, rows, *(blocks[field] for field in ("d", "dmin") if field in (layout.names or ())))
    return blocks.view(np.uint8).reshape(n_rows, -1)


def decode_rows(kernel: Callable[..., None], layout: np.dtype[Any], data: U8Array, n_cols: int) -> F32Array:
    """Runs `kernel(blocks, rows)` over u8[n, bytes]; returns f32[n, n_cols]."""
    rows = np.empty((data.shape[0], n_cols), np.float32)
    kernel(np.ascontiguousarray(data).view(layout), rows)
    return rows


@jit
def take_block(row: F32Array, importance: F32Array, start: int, x: F32Array, w: F32Array) -> float:
    """Copies one block into x f32[256] and its importance into w f32[256], both brought near one.

    The factor of x is a power of two, so nothing is rounded, and sums over weights of any magnitude neither overflow
    nor vanish. A block without any importance counts as one with equal importance; sixteen weights without any keep so
    little that it decides nothing but their own codes.

    Returns:
        What to multiply a scale of the copy with to get the scale of the row.
    """
    peaks = splat(0.0)
    for i in range(0, 256, 16):
        v = load(row, start + i)
        peaks = highest(peaks, highest(v, 0.0 - v))
    # the exponents of F32: below 2**-67 nothing of a weight is left in F16, and above 2**126 a factor is subnormal
    exponent = np.int64(np.float32(largest(peaks)).view(np.uint32)) >> 23
    exponent = min(max(exponent, np.int64(60)), np.int64(253))
    factor = np.uint32((254 - exponent) << 23).view(np.float32)
    for i in range(0, 256, 16):
        store(x, i, load(row, start + i) * factor)

    peak = np.float32(0.0)
    if len(importance) > 0:
        peaks = splat(0.0)
        for i in range(0, 256, 16):
            peaks = highest(peaks, load(importance, start + i))
        peak = largest(peaks)
    for i in range(0, 256, 16):
        if peak > 0.0:
            part = load(importance, start + i) / peak
            store(w, i, part if total(part) > 1e-20 else splat(2.0**-30))
        else:
            store(w, i, splat(1.0))
    return 1.0 / np.float64(factor)

"""What rounding of inputs loses against ggml's own: `quantize_row_q8_K_ref` and `quantize_row_q8_0_ref` and back."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import pytest
from ggml_library import open_ggml

from pocketquant.formats.activations import add_rounding_errors

F32Array = npt.NDArray[np.float32]
Q8_0 = np.dtype([("d", "<f2"), ("qs", "i1", 32)])
Q8_K = np.dtype([("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)])
"""ggml-common.h: the blocks that inputs are rounded to."""


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    return open_ggml()


def errors_of_ggml(ggml: ctypes.CDLL, rows: F32Array, function: str, layout: np.dtype) -> npt.NDArray[np.float64]:
    """Sums of squared errors by column, f64[k]."""
    quantize = getattr(ggml, function, None)
    if quantize is None:
        pytest.skip(f"this ggml shows no {function}")
    quantize.argtypes, quantize.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    blocks = np.zeros((len(rows), rows.shape[1] // layout["qs"].shape[0]), layout)
    quantize(rows.ctypes.data, blocks.ctypes.data, rows.size)
    values = blocks["d"].astype(np.float32)[:, :, None] * blocks["qs"].astype(np.float32)
    return np.sum((values.reshape(rows.shape).astype(np.float64) - rows) ** 2, axis=0)


def make_rows(kind: str) -> F32Array:
    rng = np.random.default_rng(11)
    rows = rng.standard_normal((300, 512))
    if kind == "uneven columns":
        rows *= rng.lognormal(0.0, 2.0, 512)
    elif kind == "long tails":
        rows = rng.standard_normal((300, 512)) * rng.standard_t(2, (300, 512))
    elif kind == "tiny":  # the F16 scales of small blocks are subnormal, some are zero
        rows *= 10.0 ** rng.integers(-9, -2, (300, 1))
    elif kind == "zero rows and blocks":
        rows[::3] = 0
        rows[1::3, 64:128] = 0
        rows[2::3, 256:] = 0
    return rows.astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "uneven columns", "long tails", "tiny", "zero rows and blocks"])
def test_squared_errors_are_those_of_ggml(kind: str, ggml: ctypes.CDLL) -> None:
    rows, sums = make_rows(kind), np.zeros((2, 512))
    add_rounding_errors(rows, sums)
    coarse = errors_of_ggml(ggml, rows, "quantize_row_q8_K_ref", Q8_K)
    fine = errors_of_ggml(ggml, rows, "quantize_row_q8_0_ref", Q8_0)
    for ours, theirs in ((sums[0], coarse), (sums[1], fine)):
        # the last bit of a scale turns a few ties, a column's sum moves little by one and the whole not at all
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-12 * float(np.square(rows).max()))
        assert np.isclose(ours, theirs, rtol=2e-5, atol=0).mean() > 0.99
        assert ours.sum() == pytest.approx(theirs.sum(), rel=1e-5)
    assert 1.3 * sums[1].sum() < sums[0].sum()  # a scale of its own is worth something, so the two were not mixed up

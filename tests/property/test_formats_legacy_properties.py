"""What holds of the formats of 32 weights and of IQ4 for any weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketquant.formats import FORMATS

F32Array = npt.NDArray[np.float32]
# Largest error of a weight, as a share of its block's largest magnitude: half the widest step plus what clipping
# one end may cost, for equal importance and 256 weights
BOUNDS = {"Q4_0": 0.55, "Q4_1": 0.5, "Q5_0": 0.4, "Q5_1": 0.4, "Q8_0": 0.0045, "IQ4_NL": 0.55, "IQ4_XS": 0.55}
NAMES = list(BOUNDS)


@st.composite
def weights(draw: st.DrawFn, n_cols: int = 512) -> F32Array:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = rng.standard_t(draw(st.sampled_from([2.5, 4, 100])), (draw(st.integers(1, 5)), n_cols))
    rows = np.clip(rows * 2.0 ** draw(st.integers(-14, 10)), -3e4, 3e4)  # a rare weight is beyond what Q5_1 can hold
    rows += draw(st.sampled_from([0.0, 0.0, 1.0])) * np.abs(rows).max()
    if draw(st.booleans()):
        rows[:, rng.integers(0, n_cols, 8)] = 0.0
    return rows.astype(np.float32)


@st.composite
def importances(draw: st.DrawFn, n_cols: int = 512) -> F32Array | None:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["none", "lognormal", "sparse"]))
    if kind == "none":
        return None
    values = rng.lognormal(0, 2, n_cols)
    return (values * (rng.random(n_cols) < 0.5) if kind == "sparse" else values).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(rows=weights(), importance=importances())
def test_rows_apart_are_rows_together(name: str, rows: F32Array, importance: F32Array | None) -> None:
    together = FORMATS[name].encode(rows, importance)
    apart = np.concatenate([FORMATS[name].encode(row[None], importance) for row in rows])
    assert np.array_equal(together, apart)
    strided = np.repeat(rows, 2, axis=0)[::2]
    assert np.array_equal(together, FORMATS[name].encode(strided, importance))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(rows=weights())
def test_error_is_bounded(name: str, rows: F32Array) -> None:
    decoded = FORMATS[name].decode(FORMATS[name].encode(rows), rows.shape[1])
    length = FORMATS[name].block_len
    peak = np.abs(rows.reshape(-1, length)).max(axis=1, keepdims=True)
    error = np.abs(rows - decoded).reshape(-1, length)
    # 2^-23: the smallest halves are as coarse as that
    assert (error <= BOUNDS[name] * peak + 128 * 2.0**-23).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(rows=weights(), importance=importances())
def test_error_is_below_that_of_zeros(name: str, rows: F32Array, importance: F32Array | None) -> None:
    decoded = FORMATS[name].decode(FORMATS[name].encode(rows, importance), rows.shape[1])
    weight = np.ones(rows.shape[1]) if importance is None else importance.astype(np.float64)
    error = (weight * (rows.astype(np.float64) - decoded) ** 2).sum()
    assert error <= 0.12 * (weight * rows.astype(np.float64) ** 2).sum() + 1e-12


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
@settings(max_examples=25, deadline=None)
@given(rows=weights())
def test_rounded_formats_encode_what_they_decoded_without_loss(name: str, rows: F32Array) -> None:
    once = FORMATS[name].decode(FORMATS[name].encode(rows), rows.shape[1])
    assert np.array_equal(FORMATS[name].decode(FORMATS[name].encode(once), rows.shape[1]), once)


@pytest.mark.parametrize("name", ["Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS"])
@settings(max_examples=15, deadline=None)
@given(rows=weights())
def test_searched_formats_encode_what_they_decoded_with_little_loss(name: str, rows: F32Array) -> None:
    once = FORMATS[name].decode(FORMATS[name].encode(rows), rows.shape[1])
    twice = FORMATS[name].decode(FORMATS[name].encode(once), rows.shape[1])
    first = ((rows - once).astype(np.float64) ** 2).sum()
    again = ((once - twice).astype(np.float64) ** 2).sum()
    assert again <= 0.3 * first + 1e-12


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_bytes_with_finite_scales_decode_to_what_gguf_py_says(name: str, seed: int) -> None:
    quants = pytest.importorskip("gguf.quants")
    data = np.random.default_rng(seed).integers(0, 256, (4, FORMATS[name].row_bytes(512)), dtype=np.uint8)
    blocks = data.reshape(-1, FORMATS[name].block_bytes)
    for high_byte in (1, 3) if name.endswith("_1") else (1,):
        blocks[(blocks[:, high_byte] & 0x7C) == 0x7C, high_byte] &= 0xBF
    decoded = FORMATS[name].decode(data, 512)
    assert np.isfinite(decoded).all()
    peer = quants.dequantize(data, quants.GGMLQuantizationType[name])
    assert np.array_equal(decoded.view(np.uint32), peer.view(np.uint32))

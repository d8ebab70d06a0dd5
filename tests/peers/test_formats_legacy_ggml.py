"""The formats of 32 weights and IQ4 against ggml's own library: its bytes, its decoder, its error."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from ggml_library import open_ggml

from pocketquant.formats import FORMATS

F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]
Ggml = Callable[[str, F32Array, F32Array | None], U8Array]
SEARCHED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS"]
DECODED = [*SEARCHED, "Q8_0"]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return open_ggml()


@pytest.fixture(scope="module")
def ggml_encode(library: ctypes.CDLL) -> Ggml:
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def encode(name: str, rows: F32Array, importance: F32Array | None) -> U8Array:
        n_rows, n_cols = rows.shape
        data = np.zeros((n_rows, FORMATS[name].row_bytes(n_cols)), dtype=np.uint8)
        weights = None if importance is None else importance.ctypes.data
        quantize(FORMATS[name].ggml_id, rows.ctypes.data, data.ctypes.data, 0, n_rows, n_cols, weights)
        return data

    return encode


@pytest.fixture(scope="module")
def ggml_decode(library: ctypes.CDLL) -> Callable[[str, U8Array, int], F32Array]:
    def decode(name: str, data: U8Array, n_cols: int) -> F32Array:
        dequantize = getattr(library, f"dequantize_row_{name.lower()}")
        dequantize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        dequantize.restype = None
        values = np.empty((data.shape[0], n_cols), dtype=np.float32)
        dequantize(data.ctypes.data, values.ctypes.data, values.size)
        return values

    return decode


def make_rows(kind: str, n_rows: int, n_cols: int, rng: np.random.Generator) -> F32Array:
    shape = (n_rows, n_cols)
    if kind == "gaussian":
        rows = rng.standard_normal(shape)
    elif kind == "student":
        rows = rng.standard_t(3.5, shape)
    elif kind == "laplace":
        rows = rng.laplace(size=shape)
    elif kind == "outlier columns":
        rows = rng.standard_normal(shape)
        rows[:, rng.integers(0, n_cols, n_cols // 100)] *= 20
    else:  # "tiny": scales that are subnormal halves
        rows = rng.standard_normal(shape) * 0.02
    return (rows * 0.02).astype(np.float32)


def make_importance(kind: str, n_cols: int, rng: np.random.Generator) -> F32Array | None:
    if kind == "none":
        return None
    if kind == "lognormal":
        return rng.lognormal(0, 1, n_cols).astype(np.float32)
    if kind == "chi2":
        return rng.chisquare(1, n_cols).astype(np.float32)
    weights = rng.lognormal(0, 0.5, n_cols)
    weights[rng.integers(0, n_cols, n_cols // 200)] *= 300
    return weights.astype(np.float32)


def weighted_error(rows: F32Array, decoded: F32Array, importance: F32Array | None) -> float:
    squares = (rows.astype(np.float64) - decoded) ** 2
    return float((squares if importance is None else squares * importance).sum())


@pytest.mark.parametrize("n_cols", [2560, 9216])
@pytest.mark.parametrize("name", SEARCHED)
def test_error_is_below_ggmls(name: str, n_cols: int, ggml_encode: Ggml) -> None:
    rng = np.random.default_rng(n_cols)
    number_format = FORMATS[name]
    ratios = {}
    for rows_kind in ("gaussian", "student", "laplace", "outlier columns", "tiny"):
        for importance_kind in ("none", "lognormal", "chi2", "few huge"):
            rows = make_rows(rows_kind, 8, n_cols, rng)
            importance = make_importance(importance_kind, n_cols, rng)
            theirs = number_format.decode(ggml_encode(name, rows, importance), n_cols)
            ours = number_format.decode(number_format.encode(rows, importance), n_cols)
            error = weighted_error(rows, ours, importance)
            ratios[rows_kind, importance_kind] = error / weighted_error(rows, theirs, importance)
    assert max(ratios.values()) <= 1.0, ratios
    assert np.mean(list(ratios.values())) < 0.97, ratios


@pytest.mark.parametrize("kind", ["gaussian", "student", "outlier columns", "tiny", "ties"])
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_rounded_formats_equal_ggmls_bytes(name: str, kind: str, ggml_encode: Ggml) -> None:
    rng = np.random.default_rng(7)
    rows = make_rows(kind, 64, 2560, rng)
    if kind == "ties":  # codes that fall on halves, extremes of both signs, zero blocks
        rows = (rng.integers(-16, 17, (64, 2560)) / 2).astype(np.float32)
        rows[:8, :64] = 0.0
        rows[8:16, :32] = -0.0
    assert np.array_equal(FORMATS[name].encode(rows), ggml_encode(name, rows, None))


def test_q8_0_is_ggmls_with_importance_too(ggml_encode: Ggml) -> None:
    rng = np.random.default_rng(8)
    rows, importance = make_rows("student", 16, 2560, rng), make_importance("chi2", 2560, rng)
    assert np.array_equal(FORMATS["Q8_0"].encode(rows, importance), ggml_encode("Q8_0", rows, importance))


def make_bytes(name: str, n_rows: int, n_cols: int, rng: np.random.Generator) -> U8Array:
    """Random blocks whose halves (the scale, and the minimum where there is one) are finite."""
    data = rng.integers(0, 256, (n_rows, FORMATS[name].row_bytes(n_cols)), dtype=np.uint8)
    blocks = data.reshape(-1, FORMATS[name].block_bytes)
    for high_byte in (1, 3) if name.endswith("_1") else (1,):
        blocks[(blocks[:, high_byte] & 0x7C) == 0x7C, high_byte] &= 0xBF
    return data


@pytest.mark.parametrize("name", DECODED)
def test_any_bytes_decode_as_ggml_and_gguf_py_do(
    name: str, ggml_decode: Callable[[str, U8Array, int], F32Array]
) -> None:
    quants = pytest.importorskip("gguf.quants", reason="gguf-py is the second decoder")
    data = make_bytes(name, 64, 2560, np.random.default_rng(9))
    ours = FORMATS[name].decode(data, 2560)
    assert np.isfinite(ours).all()
    assert np.array_equal(ours.view(np.uint32), ggml_decode(name, data, 2560).view(np.uint32))
    peer = quants.dequantize(data, quants.GGMLQuantizationType[name])
    assert np.array_equal(ours.view(np.uint32), peer.view(np.uint32))

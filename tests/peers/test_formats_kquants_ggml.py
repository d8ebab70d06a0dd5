"""The K-quants against ggml's own kernels, as llama-cpp-python ships them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from ggml_library import open_ggml

from pocketquant.formats import FORMATS

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
NAMES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    return open_ggml()


def encode_with_ggml(ggml: ctypes.CDLL, name: str, rows: F32, importance: F32 | None) -> U8:
    n_rows, n_cols = rows.shape
    data = np.empty((n_rows, FORMATS[name].row_bytes(n_cols)), np.uint8)
    pointer = None if importance is None else importance.ctypes.data
    written = ggml.ggml_quantize_chunk(
        FORMATS[name].ggml_id, rows.ctypes.data, data.ctypes.data, 0, n_rows, n_cols, pointer
    )
    assert written == data.size
    return data


def with_outlier_columns(random: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    rows = random.normal(size=shape)
    rows[:, random.choice(shape[1], shape[1] // 50, replace=False)] *= 8
    return rows


ROWS: dict[str, Callable[[np.random.Generator, tuple[int, int]], npt.NDArray[np.float64]]] = {
    "normal": lambda random, shape: random.normal(size=shape),
    "student": lambda random, shape: random.standard_t(3.5, size=shape),
    "laplace": lambda random, shape: random.laplace(size=shape),
    "outlier columns": with_outlier_columns,
}


def with_huge_columns(random: np.random.Generator, n_cols: int) -> npt.NDArray[np.float64]:
    importance = random.chisquare(3, n_cols)
    importance[random.choice(n_cols, n_cols // 200, replace=False)] *= 1e4
    return importance


IMPORTANCE: dict[str, Callable[[np.random.Generator, int], npt.NDArray[np.float64]] | None] = {
    "none": None,
    "lognormal": lambda random, n_cols: random.lognormal(0, 1.5, n_cols),
    "chi2": lambda random, n_cols: random.chisquare(1, n_cols),
    "huge columns": with_huge_columns,
}


@pytest.mark.parametrize("name", NAMES)
def test_decode_equals_ggml(ggml: ctypes.CDLL, name: str) -> None:
    data = np.random.default_rng(0).integers(0, 256, (256, FORMATS[name].block_bytes), dtype=np.uint8)
    expected = np.empty((256, 256), np.float32)
    traits = ggml.ggml_get_type_traits(FORMATS[name].ggml_id).contents
    assert traits.type_size == FORMATS[name].block_bytes
    traits.to_float(data.ctypes.data, expected.ctypes.data, expected.size)
    np.testing.assert_array_equal(FORMATS[name].decode(data, 256), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_cols", [2560, 9216])
def test_error_is_never_above_ggml(ggml: ctypes.CDLL, name: str, n_cols: int) -> None:
    """On every kind of rows and importance, measured as llama.cpp's importance is meant: per column."""
    ratios = {}
    for rows_kind, make_rows in ROWS.items():
        for importance_kind, make_importance in IMPORTANCE.items():
            random = np.random.default_rng(n_cols)
            rows = (make_rows(random, (8, n_cols)) * 0.02).astype(np.float32)
            importance = make_importance(random, n_cols).astype(np.float32) if make_importance else None
            errors = [
                float(np.average(np.square(FORMATS[name].decode(data, n_cols) - rows).sum(axis=0), weights=importance))
                for data in (
                    FORMATS[name].encode(rows, importance),
                    encode_with_ggml(ggml, name, rows, importance),
                )
            ]
            ratios[rows_kind, importance_kind] = errors[0] / errors[1]
    assert max(ratios.values()) <= 1.001, ratios
    assert np.mean(list(ratios.values())) < 0.95, ratios

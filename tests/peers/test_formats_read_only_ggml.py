"""The formats that are only read against ggml's own decoder and encoder, as llama-cpp-python ships them."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import pytest
from ggml_library import open_ggml

from pocketquant.formats import FORMATS

F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]
NAMES = [name for name, item in FORMATS.items() if not item.written]
N_COLS = 1024


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    return open_ggml()


def ggml_decode(ggml: ctypes.CDLL, name: str, data: U8Array) -> F32Array:
    traits = ggml.ggml_get_type_traits(FORMATS[name].ggml_id).contents
    assert (traits.type_name.decode().upper(), traits.blck_size, traits.type_size) == (
        name,
        FORMATS[name].block_len,
        FORMATS[name].block_bytes,
    )
    rows = np.empty((len(data), data.shape[1] // traits.type_size * traits.blck_size), np.float32)
    traits.to_float(data.ctypes.data, rows.ctypes.data, rows.size)
    return rows


def assert_same_bits(ours: F32Array, theirs: F32Array) -> None:
    """Equal to the last bit and sign of zero; a NaN may be any NaN."""
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
    known = ~np.isnan(ours)
    np.testing.assert_array_equal(ours[known].view(np.uint32), theirs[known].view(np.uint32))


@pytest.mark.parametrize("name", NAMES)
def test_random_bytes_decode_to_ggmls_bits(ggml: ctypes.CDLL, name: str) -> None:
    shape = (512, FORMATS[name].row_bytes(N_COLS))
    data = np.random.default_rng(len(name)).integers(0, 256, shape, dtype=np.uint8)
    decoded = FORMATS[name].decode(data, N_COLS)
    assert_same_bits(decoded, ggml_decode(ggml, name, data))
    assert np.isfinite(decoded).mean() > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_ggmls_own_blocks_decode_to_ggmls_bits(ggml: ctypes.CDLL, name: str) -> None:
    rng = np.random.default_rng(7)
    rows = (rng.standard_t(4, (16, N_COLS)) * 0.02).astype(np.float32)
    importance = rng.lognormal(0, 1, N_COLS).astype(np.float32)
    data = np.zeros((len(rows), FORMATS[name].row_bytes(N_COLS)), np.uint8)
    kind = FORMATS[name].ggml_id
    ggml.ggml_quantize_init(kind)
    written = ggml.ggml_quantize_chunk(kind, rows.ctypes.data, data.ctypes.data, 0, *rows.shape, importance.ctypes.data)
    assert written == data.nbytes
    decoded = FORMATS[name].decode(data, N_COLS)
    assert_same_bits(decoded, ggml_decode(ggml, name, data))
    # a file layout read wrong would find nothing of the rows again
    correlation = np.corrcoef(decoded.ravel(), rows.ravel())[0, 1]
    assert correlation > (0.55 if name[0] == "T" else 0.65), correlation

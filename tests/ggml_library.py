"""ggml's own library, inside the installed llama-cpp-python: the peer of the number formats."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import pytest


class TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def open_ggml() -> ctypes.CDLL:
    """The library with the signatures that the tests call; skips the test where it is absent."""
    spec = importlib.util.find_spec("llama_cpp")
    folders = [Path(place) / "lib" for place in (spec.submodule_search_locations or ())] if spec else []
    found = [path for folder in folders for path in sorted(folder.glob("*ggml-base.*")) if path.is_file()]
    if not found:
        pytest.skip("llama-cpp-python is not installed, and with it ggml")
    library = ctypes.CDLL(str(found[0]))
    library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [
        ctypes.c_void_p
    ]  # fmt: skip
    return library

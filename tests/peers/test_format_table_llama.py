"""The table of formats against llama.cpp's own: file types and what activations are rounded to."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from ggml_library import open_ggml

from pocketquant.formats import FORMATS, QuantFormat

llama_cpp = pytest.importorskip("llama_cpp")
_KINDS = ("", "_S", "_M", "_L", "_MOE")
"""What follows a format's name in the names of `llama_ftype`."""


class CpuTraits(ctypes.Structure):
    """`ggml_type_traits_cpu` of ggml/include/ggml-cpu.h."""

    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


def file_types_named(item: QuantFormat) -> set[int]:
    names = [f"LLAMA_FTYPE_MOSTLY_{item.name}{kind}" for kind in _KINDS] + [f"LLAMA_FTYPE_ALL_{item.name}"]
    return {getattr(llama_cpp, name) for name in names if hasattr(llama_cpp, name)}


@pytest.mark.parametrize("name", FORMATS)
def test_file_types_are_those_that_llama_names_after_the_format(name: str) -> None:
    item, named = FORMATS[name], file_types_named(FORMATS[name])
    assert item.file_type in named
    assert set(item.main_in) <= named


def test_no_two_formats_share_a_file_type() -> None:
    assert len({item.file_type for item in FORMATS.values()}) == len(FORMATS)
    numbers = [number for item in FORMATS.values() for number in item.main_in]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("name", FORMATS)
def test_activations_are_rounded_in_the_blocks_of_the_type_that_is_multiplied(name: str) -> None:
    ggml = open_ggml()
    folder = Path(str(llama_cpp.__file__)).parent / "lib"
    found = [path for path in sorted(folder.glob("*ggml-cpu.*")) if path.is_file()]
    if not found:
        pytest.skip("the library of ggml's CPU kernels has another name here")
    traits = ctypes.CDLL(str(found[0])).ggml_get_type_traits_cpu
    traits.restype, ggml.ggml_blck_size.restype = ctypes.POINTER(CpuTraits), ctypes.c_int64
    multiplied = traits(FORMATS[name].ggml_id).contents.vec_dot_type
    assert ggml.ggml_blck_size(multiplied) == (FORMATS[name].activation_block or 1)

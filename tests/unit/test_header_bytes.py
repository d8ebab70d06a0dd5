"""A header's bytes are those that gguf-py's writer gives."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from pocketquant.formats import FORMATS
from pocketquant.gguf_file.header import encode_table
from pocketquant.gguf_file.reading import GgufTensor
from pocketquant.model import Value

_KINDS = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "[]", "u64", "i64", "f64")


def test_header_equals_gguf_py(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": Value("str", "qwen35"),
        "k.u8": Value("u8", 200),
        "k.i8": Value("i8", -3),
        "k.u16": Value("u16", 65000),
        "k.i16": Value("i16", -5),
        "k.u32": Value("u32", 1 << 31),
        "k.i32": Value("i32", -7),
        "k.u64": Value("u64", 1 << 60),
        "k.i64": Value("i64", -(1 << 50)),
        "k.f32": Value("f32", 0.1),
        "k.f64": Value("f64", 0.1),
        "k.bool": Value("bool", True),
        "k.str": Value("str", "Ωμέγα"),
        "k.texts": Value("str[]", ["a", "", "ß"]),
        "k.numbers": Value("i32[]", [1, -2, 3]),
        "k.flags": Value("bool[]", [True, False]),
        "k.floats": Value("f32[]", [0.1, 2.0]),
    }
    shapes = {"a": ((3, 256), "Q4_K"), "b": ((33,), "F32"), "c": ((2, 5, 64), "Q8_0"), "d": ((7, 3), "BF16")}
    tensors = [
        GgufTensor(name, shape, FORMATS[kind], 0, int(np.prod(shape[:-1])) * FORMATS[kind].row_bytes(shape[-1]))
        for name, (shape, kind) in shapes.items()
    ]
    writer = gguf.GGUFWriter(tmp_path / "theirs", "")
    writer.kv_data[0].clear()
    for key, value in metadata.items():
        kinds = [gguf.GGUFValueType(_KINDS.index(value.kind.removesuffix("[]")))]
        if value.kind.endswith("[]"):
            kinds.insert(0, gguf.GGUFValueType.ARRAY)
        writer.kv_data[0][key] = gguf.GGUFValue(value.value, *kinds)
    for tensor in tensors:
        raw_dtype = gguf.GGMLQuantizationType[tensor.format.name]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    assert encode_table(metadata, tensors) == (tmp_path / "theirs").read_bytes()

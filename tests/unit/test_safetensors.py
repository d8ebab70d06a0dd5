"""The safetensors header reader: every lie is refused, with the name of the tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketquant.convert.safetensors import read_safetensors_header
from pocketquant.errors import SourceError


def write_file(path: Path, header: Any, n_data: int, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(n_data))
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.arange(4, dtype=np.float16)}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    tensors = {tensor.name: tensor for tensor in read_safetensors_header(tmp_path / "x.safetensors")}
    raw = (tmp_path / "x.safetensors").read_bytes()
    for name, array in arrays.items():
        tensor = tensors[name]
        assert tensor.shape == array.shape
        assert raw[tensor.offset : tensor.offset + tensor.nbytes] == array.tobytes()


@pytest.mark.parametrize(
    ("header", "n_data", "message"),
    [
        ({"w": entry([2, 2], 0, 15)}, 16, r"w: F32 \[2, 2\] takes 16 bytes"),
        ({"w": entry([2, 2], 0, 16)}, 12, r"w: ends at byte .*\(truncated\)"),
        ({"w": entry([2, 2], -16, 0)}, 16, "w: F32"),
        ({"w": entry([2, 2], 16, 0)}, 16, "w: F32"),
        ({"w": entry([2, -2], 0, 16)}, 16, "w: shape"),
        ({"w": entry([2, 2], 0, 16, "F12")}, 16, "w: data type 'F12' is unknown"),
        ({"w": {"dtype": "F32", "shape": [1]}}, 4, "w: data_offsets None"),
        ({"w": 3}, 4, "w: no JSON object"),
        ({"v": entry([2], 0, 8), "w": entry([2], 4, 12)}, 12, "w: its data overlaps that of v"),
        ([1, 2], 0, "no JSON object"),
        (b"{nonsense", 0, "no JSON"),
        (b"\xff\xfe{}", 0, "no JSON"),
    ],
)
def test_refuses_a_header_that_contradicts_the_file(tmp_path: Path, header: Any, n_data: int, message: str) -> None:
    path = write_file(tmp_path / "x.safetensors", header, n_data)
    with pytest.raises(SourceError, match=message) as caught:
        read_safetensors_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [1 << 62, 1000, (1 << 64) - 1])
def test_refuses_a_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    path = write_file(tmp_path / "x.safetensors", {}, 4, length)
    with pytest.raises(SourceError, match=f"announces {length} bytes"):
        read_safetensors_header(path)


def test_lists_every_offender(tmp_path: Path) -> None:
    header = {f"w{i}": entry([3], 0, 8) for i in range(14)}
    with pytest.raises(SourceError, match=r"w0: .*\n(.*\n)+  \.\.\. and 4 more"):
        read_safetensors_header(write_file(tmp_path / "x.safetensors", header, 8))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_hostile_bytes_raise_nothing_else(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    try:
        tensors = read_safetensors_header(path)
    except SourceError:
        return
    assert all(tensor.offset + tensor.nbytes <= len(data) for tensor in tensors)

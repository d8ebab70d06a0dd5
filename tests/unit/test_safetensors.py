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
        ({"v": entry([2], 2, 10), "w": entry([2], 10, 18)}, 18, "v: begins at byte .*; the 2 before it belong to no"),
        ({"v": entry([2], 0, 8), "w": entry([2], 12, 20)}, 20, "w: begins at byte .*; the 4 before it belong to no"),
        ({"v": entry([2], 0, 8)}, 11, "the last 3 of the file's .* bytes belong to no tensor"),
        ({}, 3, "the last 3 of the file's .* bytes belong to no tensor"),
        ({"v": entry([2], 0, 8), "w": entry([0], 4, 4)}, 8, "w: its data overlaps that of v"),
        ({"w": entry([1 << 70], 0, 8)}, 8, "w: shape"),
        ({"w": entry([2], 0, 1 << 70)}, 8, "w: data_offsets"),
        ({"w": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, 8, r"w: data type \['F32'\] is unknown"),
        (b'{"w": {"dtype": "F32", "shape": [1' + b"0" * 5000 + b'], "data_offsets": [0, 8]}}', 8, "w: shape"),
        ([1, 2], 0, "no JSON object"),
        (b"{nonsense", 0, "broken JSON"),
        (b"\xff\xfe{}", 0, "not UTF-8"),
    ],
)
def test_refuses_a_header_that_contradicts_the_file(tmp_path: Path, header: Any, n_data: int, message: str) -> None:
    path = write_file(tmp_path / "x.safetensors", header, n_data)
    with pytest.raises(SourceError, match=message) as caught:
        read_safetensors_header(path)
    assert str(path) in str(caught.value)


def test_shifted_offsets_are_no_other_numbers(tmp_path: Path) -> None:
    """Every tensor in its place plus two bytes fits the file and would read as other numbers."""
    from safetensors.numpy import save

    raw = save({"a": np.arange(4, dtype=np.float16), "b": np.arange(6, dtype=np.float32)})
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for item in header.values():
        item["data_offsets"] = [n + 2 for n in item["data_offsets"]]
    shifted = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(shifted).to_bytes(8, "little") + shifted + raw[8 + length :] + b"\0\0")
    with pytest.raises(SourceError, match="the 2 before it belong to no tensor"):
        read_safetensors_header(path)


@pytest.mark.parametrize(
    ("raw", "twice"),
    [
        (b'{"w": %s, "v": %s, "w": %s}', ["w"]),
        (b'{"w": %s, "v": %s, "w": %s, "v": {}}', ["v", "w"]),
        (b'{"w": {"dtype": "F16", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', ["dtype"]),
        (b'{"__metadata__": {"format": "pt", "format": "mlx"}}', ["format"]),
    ],
)
def test_keys_that_come_twice_are_refused(tmp_path: Path, raw: bytes, twice: list[str]) -> None:
    entries = [json.dumps(entry([2], at, at + 8)).encode() for at in (0, 8, 16)]
    header = raw % tuple(entries) if b"%s" in raw else raw
    with pytest.raises(SourceError, match=r"keys twice(.|\n)*again:\n") as caught:
        read_safetensors_header(write_file(tmp_path / "x.safetensors", header, 24))
    assert sorted(str(caught.value).split(":\n")[1].split()) == twice


def test_tensors_without_numbers_are_allowed_anywhere_between(tmp_path: Path) -> None:
    header = {
        "z": entry([0], 0, 0),
        "a": entry([2], 0, 8),
        "b": entry([0, 3], 8, 8),
        "c": entry([1], 8, 12),
        "d": entry([0], 12, 12),
    }
    tensors = read_safetensors_header(write_file(tmp_path / "x.safetensors", header, 12))
    assert {tensor.name: tensor.nbytes for tensor in tensors} == {"a": 8, "b": 0, "c": 4, "d": 0, "z": 0}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(
    items=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0] * 9 + [-1, 1])), max_size=5),
    tail=st.sampled_from([0] * 9 + [-1, 1]),
    order=st.randoms(use_true_random=False),
)
def test_accepts_what_the_safetensors_package_accepts(tmp_path: Path, items: Any, tail: int, order: Any) -> None:
    """Runs of bytes side by side, some of them moved: refused here if and only if refused there."""
    from safetensors import SafetensorError, deserialize

    header, at = {}, 0
    for i, (nbytes, moved) in enumerate(items):
        begin = max(0, at + moved)
        header[f"t{order.randrange(10**6)}.{i}"] = entry([nbytes], begin, begin + nbytes, "U8")
        at += nbytes
    path = write_file(tmp_path / "x.safetensors", header, max(0, at + tail))
    try:
        deserialize(path.read_bytes())
        is_accepted = True
    except SafetensorError:
        is_accepted = False
    try:
        read_safetensors_header(path)
        assert is_accepted
    except SourceError:
        assert not is_accepted


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

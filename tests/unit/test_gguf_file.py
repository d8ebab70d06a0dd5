"""Reading and writing GGUF headers, against gguf-py and against hostile files."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.errors import ArchitectureError, SourceError
from pocketquant.files.reading import read_at
from pocketquant.formats import FORMATS
from pocketquant.gguf_file.header import encode_header, file_name
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.gguf_file.reading import read_header
from pocketquant.model import Model, Value

SMALL = 8 << 10


@pytest.fixture(scope="module")
def written(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(plan(open_model(checkpoint), open_recipe("bf16")), path)
    return path


def test_gguf_py_reads_the_same(written: Path) -> None:
    theirs, ours = gguf.GGUFReader(written), read_header(written)
    assert [tensor.name for tensor in theirs.tensors] == [tensor.name for tensor in ours.tensors]
    for their, our in zip(theirs.tensors, ours.tensors, strict=True):
        assert tuple(int(n) for n in their.shape)[::-1] == our.shape
        assert (their.tensor_type.name, their.n_bytes, their.data_offset) == (our.format.name, our.nbytes, our.offset)
        assert their.data.tobytes() == read_at(written, our.offset, our.nbytes).tobytes()
    keys = {key for key in theirs.fields if not key.startswith("GGUF.")}
    assert keys == set(ours.metadata)
    for key in keys:
        assert theirs.fields[key].contents() == pytest.approx(ours.metadata[key].value), key


def test_every_value_kind_survives() -> None:
    metadata = {
        "general.architecture": Value("str", "qwen35"),
        **{f"k.{kind}": Value(kind, 7) for kind in ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64")},
        "k.f32": Value("f32", 0.5),
        "k.f64": Value("f64", 0.1),
        "k.bool": Value("bool", True),
        "k.str": Value("str", "Ωμέγα"),
        "k.list": Value("str[]", ["a", "", "ß"]),
        "k.numbers": Value("i32[]", [1, -2, 3]),
        "k.flags": Value("bool[]", [True, False]),
    }
    header = encode_header(metadata, [])
    path = Path(__file__).with_suffix(".tmp")
    path.write_bytes(header)
    try:
        assert read_header(path).metadata == metadata
    finally:
        path.unlink()


def test_opens_as_the_same_model(written: Path, checkpoint: Path) -> None:
    source, copy = open_model(checkpoint), open_gguf(written)
    assert copy.sizes == source.sizes
    assert [(t.name, t.role, t.layer, t.shape, t.keep_f32) for t in copy.tensors] == [
        (t.name, t.role, t.layer, t.shape, t.keep_f32) for t in source.tensors
    ]
    for ours, theirs in zip(copy.tensors, source.tensors, strict=True):
        assert np.array_equal(ours.rows(0, ours.n_rows), theirs.rows(0, theirs.n_rows)), ours.name


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(at=st.integers(0, SMALL - 1), byte=st.integers(0, 255))
def test_a_flipped_header_byte_is_read_or_refused(written: Path, tmp_path: Path, at: int, byte: int) -> None:
    data = bytearray(written.read_bytes())
    data[at] = byte
    path = tmp_path / "flipped.gguf"
    path.write_bytes(data)
    try:
        header = read_header(path)
    except SourceError:
        return
    assert all(tensor.offset + tensor.nbytes <= len(data) for tensor in header.tensors)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(data=st.binary(max_size=300))
def test_hostile_bytes_raise_nothing_else(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + data)
    try:
        read_header(path)
    except SourceError:
        return


def test_refuses_truncated_data(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(written.read_bytes()[:-1000])
    with pytest.raises(SourceError, match=r"broken tensor table .*truncated(.|\n)*do not lie aligned within"):
        open_gguf(path)


def test_refuses_another_architecture_and_unknown_tensors(written: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(encode_header({"general.architecture": Value("str", "llama")}, []))
    with pytest.raises(ArchitectureError, match="'llama' is not supported; supported are qwen35"):
        open_gguf(other)
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(written.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(ArchitectureError, match=r"blk\.1\.ffn_xx\.weight"):
        open_gguf(renamed)


def test_refuses_missing_tensors_all_listed_beside_the_unknown(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "renamed.gguf"
    data = written.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight")
    path.write_bytes(data.replace(b"blk.3.attn_q.weight", b"blk.3.attn_z.weight"))
    with pytest.raises(ArchitectureError) as refused:
        open_gguf(path)
    unknown, missing = str(refused.value).split("that are missing:")
    assert "blk.1.ffn_xx.weight" in unknown
    assert "blk.3.attn_z.weight" in unknown
    assert [line.strip() for line in missing.splitlines()[1:3]] == ["blk.1.ffn_up.weight", "blk.3.attn_q.weight"]


@pytest.mark.parametrize(("kind", "what"), [("adapter", "a LoRA adapter"), ("imatrix", "an importance matrix")])
def test_what_is_no_model_is_called_what_it_is(kind: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(encode_header({"general.type": Value("str", kind)}, []))
    with pytest.raises(ArchitectureError, match=f"{what}, and no model"):
        open_gguf(path)


def test_non_finite_block_is_named(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "nan.gguf"
    data = bytearray(written.read_bytes())
    tensor = next(tensor for tensor in read_header(written).tensors if tensor.name == "blk.1.ffn_up.weight")
    data[tensor.offset : tensor.offset + 2] = b"\xff\x7f"
    path.write_bytes(data)
    broken = next(t for t in open_gguf(path).tensors if t.name == "blk.1.ffn_up.weight")
    for read in (broken.rows, broken.source.stored):
        with pytest.raises(SourceError, match=r"blk\.1\.ffn_up\.weight: non-finite weight in rows 0"):
            read(0, 4)
        read(1, 4)


def test_file_names_follow_the_convention(checkpoint: Path) -> None:
    model: Model = open_model(checkpoint)
    assert file_name(model.metadata, "q4_k_m") == "Tiny-1M-Q4_K_M.gguf"


def test_format_table_equals_gguf_pys() -> None:
    for name, quant_format in FORMATS.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (quant_format.ggml_id, gguf.GGML_QUANT_SIZES[kind]) == (
            kind.value,
            (quant_format.block_len, quant_format.block_bytes),
        )

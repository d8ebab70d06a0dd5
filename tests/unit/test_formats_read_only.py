"""Formats that are read and never written: decoded as gguf-py does, refused where something would write them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.errors import RecipeError
from pocketquant.eval.weights import weight_errors
from pocketquant.formats import FORMATS
from pocketquant.gguf_file.header import encode_table
from pocketquant.gguf_file.reading import GgufTensor, read_header
from pocketquant.model import padded
from pocketquant.quant.recipe import parse_recipe

NAMES = [name for name, item in FORMATS.items() if not item.written]
# what of a file is stored so, all with rows of 256 weights
CHANGED = {f"blk.{i % 4}.ffn_{'gate' if i // 4 == 0 else 'up'}.weight": name for i, name in enumerate(NAMES[:8])}
CHANGED |= {"token_embd.weight": NAMES[8]} | dict(
    zip(("blk.3.attn_q.weight", "blk.3.attn_k.weight", "blk.3.attn_v.weight"), NAMES[9:], strict=True)
)


def random_blocks(name: str, n_rows: int, n_cols: int, seed: int = 0) -> np.ndarray:
    """Bytes whose scales are all finite."""
    data = np.random.default_rng(seed).integers(0, 256, (4 * n_rows, FORMATS[name].row_bytes(n_cols)), dtype=np.uint8)
    if name == "MXFP4":
        data[:, ::17] %= 128  # exponents
    good = np.abs(FORMATS[name].decode(data, n_cols)).max(axis=1) < 1e9
    return data[good][:n_rows]


def expected_rows(name: str, data: np.ndarray) -> np.ndarray:
    """What gguf-py decodes."""
    if name == "Q1_0":  # which gguf-py does not
        blocks = data.reshape(-1, 18)
        signs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little") * 2.0 - 1
        return (signs * blocks[:, :2].copy().view(np.float16).astype(np.float32)).reshape(len(data), -1)
    decoded: np.ndarray = dequantize(data, GGMLQuantizationType[name])
    return decoded


@pytest.fixture(scope="module")
def mixed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a tensor of every format that is only read, the others in F32."""
    folder = tmp_path_factory.mktemp("mixed")
    write(plan(open_model(checkpoint), open_recipe("f32")), folder / "f32.gguf")
    header, data = read_header(folder / "f32.gguf"), (folder / "f32.gguf").read_bytes()
    entries, pieces = [], []
    for seed, item in enumerate(header.tensors):
        piece = data[item.offset : item.offset + item.nbytes]
        kind = FORMATS[CHANGED.get(item.name, item.format.name)]
        if item.name in CHANGED:
            piece = random_blocks(kind.name, item.shape[0], item.shape[1], seed).tobytes()
        entries.append(GgufTensor(item.name, item.shape, kind, 0, len(piece)))
        pieces.append(piece.ljust(padded(len(piece)), b"\0"))
    table = encode_table(header.metadata, entries)
    (folder / "mixed.gguf").write_bytes(table.ljust(padded(len(table)), b"\0") + b"".join(pieces))
    return folder / "mixed.gguf"


@pytest.mark.parametrize("name", NAMES)
def test_decode_equals_gguf_py(name: str) -> None:
    data = random_blocks(name, 64, 1024, 3)
    assert len(data) == 64
    np.testing.assert_allclose(FORMATS[name].decode(data, 1024), expected_rows(name, data), rtol=1e-6)


def test_every_such_format_is_in_the_file(mixed: Path, checkpoint: Path) -> None:
    assert sorted(CHANGED.values()) == sorted(NAMES)
    opened = {tensor.name: tensor for tensor in open_model(mixed).tensors}
    assert {name: opened[name].dtype for name in CHANGED} == CHANGED
    raw = mixed.read_bytes()
    for item in read_header(mixed).tensors:
        if item.name in CHANGED:
            stored = np.frombuffer(raw[item.offset : item.offset + item.nbytes], np.uint8).reshape(item.shape[0], -1)
            part = opened[item.name].rows(3, 7)  # from the middle
            np.testing.assert_allclose(part, expected_rows(item.format.name, stored)[3:7], rtol=1e-6)
    errors = {error.name: error for error in weight_errors(open_model(mixed), open_model(checkpoint))}
    assert {name for name, error in errors.items() if error.snr_db is not None} == set(CHANGED)


def test_inspect_shows_them(mixed: Path) -> None:
    command = [str(Path(sys.executable).with_name("pocketquant")), "inspect", str(mixed), "--json"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["tensors"]
    assert {each["name"]: each["type"] for each in listed if each["name"] in CHANGED} == CHANGED


def test_becomes_f32_or_stays_as_it_is_and_nothing_else(mixed: Path, tmp_path: Path) -> None:
    source = open_model(mixed)
    write(plan(source, open_recipe("f32")), tmp_path / "f32.gguf")
    for ours, theirs in zip(open_model(tmp_path / "f32.gguf").tensors, source.tensors, strict=True):
        assert np.array_equal(ours.rows(0, ours.n_rows), theirs.rows(0, theirs.n_rows)), ours.name
    with pytest.raises(RecipeError, match=r"12 tensor\(s\) of the source are quantized already"):
        plan(source, open_recipe("q8_0"))


def test_copies_but_does_not_make_them(mixed: Path, checkpoint: Path, tmp_path: Path) -> None:
    recipe = open_recipe(f"from:{mixed}")
    write(plan(open_model(mixed), recipe), tmp_path / "copy.gguf")
    for ours, theirs in zip(read_header(tmp_path / "copy.gguf").tensors, read_header(mixed).tensors, strict=True):
        assert (ours.name, ours.format) == (theirs.name, theirs.format)
        read = [path.read_bytes()[item.offset :][: item.nbytes] for path, item in
                ((tmp_path / "copy.gguf", ours), (mixed, theirs))]  # fmt: skip
        assert read[0] == read[1], ours.name
    with pytest.raises(RecipeError) as failure:
        plan(open_model(checkpoint), recipe)
    assert "12 tensor(s) would become formats that can be read but not written; choose one of F32" in str(failure.value)
    assert f"would become {CHANGED['blk.0.ffn_up.weight']}" in str(failure.value)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_to_encode(name: str, checkpoint: Path) -> None:
    with pytest.raises(RecipeError, match=f"{name} can be read but not written; choose one of F32 .* llama-quantize"):
        FORMATS[name].encode(np.ones((2, 256), np.float32))
    recipe = parse_recipe(f'name = "r"\ndescription = "d"\nfile_type = 2\ndefault = "{name}"\n', "r.toml")
    with pytest.raises(RecipeError, match=rf"would become {name} \(default of r\)"):
        plan(open_model(checkpoint), recipe)

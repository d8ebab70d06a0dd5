"""One command writes all that a checkpoint holds: the model, `mmproj-NAME` and `mtp-NAME`, together or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_maker import mtp_weights_for, write_safetensors
from vision_maker import make_vision_checkpoint

from pocketquant.gguf_file.reading import read_header

COMMAND = str(Path(sys.executable).with_name("pocketquant"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a vision tower and a multi-token-prediction block, in two shards."""
    folder = make_vision_checkpoint(tmp_path_factory.mktemp("whole") / "Whole-1M")
    config = json.loads((folder / "config.json").read_text())
    text = {"architectures": config["architectures"], **config.get("text_config", config)}
    text["architectures"] = config["architectures"]
    block = mtp_weights_for(text)
    write_safetensors(folder / "model-mtp.safetensors", block)
    raw = (folder / "model.safetensors").read_bytes()
    names = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    (folder / "model.safetensors").rename(folder / "model-trunk.safetensors")
    weight_map = {name: "model-trunk.safetensors" for name in names if name != "__metadata__"}
    weight_map |= dict.fromkeys(block, "model-mtp.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def architecture_of(path: Path) -> str:
    return str(read_header(path).metadata["general.architecture"].value)


def test_quantize_writes_all_three(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    summary = json.loads(run("quantize", whole, "--out", out, "--json", "--quiet").stdout)
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf", "mmproj-m.gguf", "mtp-m.gguf"}
    assert {entry["kind"]: entry["file"] for entry in summary["files"]} == {
        "model": "m.gguf",
        "mmproj": "mmproj-m.gguf",
        "mtp": "mtp-m.gguf",
    }
    for entry in summary["files"]:
        assert (tmp_path / entry["file"]).stat().st_size == entry["file_bytes"]
    assert architecture_of(tmp_path / "mmproj-m.gguf") == "clip"
    assert architecture_of(tmp_path / "mtp-m.gguf") == architecture_of(out) == "qwen35"
    assert "qwen35.nextn_predict_layers" not in read_header(out).metadata
    assert read_header(tmp_path / "mmproj-m.gguf").metadata["pocketquant.recipe"].value == "pocket_mmproj"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--mtp", "drop"], {"m.gguf", "mmproj-m.gguf"}),
        (["--mtp", "embed"], {"m.gguf", "mmproj-m.gguf"}),
        (["--mmproj", "none"], {"m.gguf", "mtp-m.gguf"}),
        (["--mmproj", "q8_0", "--mtp", "drop"], {"m.gguf", "mmproj-m.gguf"}),
    ],
)
def test_each_part_can_be_had_otherwise(options: list[str], expected: set[str], whole: Path, tmp_path: Path) -> None:
    run("convert", whole, "--out", tmp_path / "m.gguf", *options)
    assert {path.name for path in tmp_path.iterdir()} == expected
    embedded = "qwen35.nextn_predict_layers" in read_header(tmp_path / "m.gguf").metadata
    assert embedded == ("embed" in options)
    if "q8_0" in options:
        formats = {tensor.format.name for tensor in read_header(tmp_path / "mmproj-m.gguf").tensors}
        assert "Q8_0" in formats


def test_a_broken_tower_leaves_nothing_behind(whole: Path, tmp_path: Path) -> None:
    """All files appear together: one that fails stops the others."""
    (tmp_path / "m.gguf").write_bytes(b"good")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in whole.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    data = bytearray((broken / "model-trunk.safetensors").read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    at = 8 + length + next(v["data_offsets"][0] for k, v in header.items() if "visual" in k and "qkv.weight" in k)
    data[at : at + 4] = b"\xff\xff\xff\x7f"  # NaN in every floating-point format
    (broken / "model-trunk.safetensors").write_bytes(data)
    result = subprocess.run([COMMAND, "quantize", broken, "--out", tmp_path / "m.gguf"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "non-finite" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf", "broken"}
    assert (tmp_path / "m.gguf").read_bytes() == b"good"


def test_make_keeps_the_sidecars(whole: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 200)
    options = ["--text", text, "--context", 64, "--chunks", 4, "--imatrix", "none", "--recipe", "q8_0"]
    result = json.loads(run("make", whole, "--out", tmp_path / "out", *options, "--json", "--quiet").stdout)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    for sidecar in result["sidecars"]:
        assert sidecar["file"] in names
        assert sidecar["file"] in (tmp_path / "out" / "SHA256SUMS").read_text()
    assert [sidecar["file"].split("-")[0] for sidecar in result["sidecars"]] == ["mmproj", "mtp"]


def test_make_splits_what_it_keeps(whole: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 200)
    options = ["--text", text, "--context", 64, "--chunks", 4, "--imatrix", "none", "--recipe", "q8_0"]
    run("make", whole, "--out", tmp_path / "out", *options, "--split-max-size", "1500k", "--mtp", "drop", "--quiet")
    shards = sorted((tmp_path / "out").glob("*-of-*.gguf"))
    assert len(shards) > 1
    assert all(shard.stat().st_size <= 1_500_000 for shard in shards)
    sums = (tmp_path / "out" / "SHA256SUMS").read_text()
    assert all(shard.name in sums for shard in shards)
    assert json.loads(run("inspect", shards[0], "--json").stdout)["file_bytes"] == sum(
        shard.stat().st_size for shard in shards if not shard.name.startswith("mmproj-")
    )


def test_sidecars_are_split_or_refused(whole: Path, tmp_path: Path) -> None:
    """llama.cpp looks for shards of models, and the MTP block's file is one; it reads an mmproj from one file."""
    planned = json.loads(run("quantize", whole, "--dry-run", "--json", "--quiet").stdout)
    sizes = {entry["kind"]: entry["file_bytes"] for entry in planned["files"]}
    assert sizes["mmproj"] < sizes["mtp"] < sizes["model"]
    options = ["--out", tmp_path / "m.gguf", "--split-max-size"]
    run("quantize", whole, *options, sizes["mmproj"])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "mmproj-m.gguf" in names
    assert any(name.startswith("m-00002-of-") for name in names)
    assert any(name.startswith("mtp-m-00002-of-") for name in names)
    assert all(path.stat().st_size <= sizes["mmproj"] for path in tmp_path.iterdir())
    for path in tmp_path.iterdir():
        path.unlink()
    for command in (["quantize", whole], ["make", whole, "--imatrix", "none", "--recipe", "q8_0"]):
        smaller = [COMMAND, *command, "--out", tmp_path / "m.gguf", "--split-max-size", sizes["mmproj"] - 1]
        if command[0] == "make":
            smaller += ["--mmproj", "pocket_mmproj"]
        result = subprocess.run([str(word) for word in smaller], capture_output=True, text=True)
        assert result.returncode == 2
        assert "the vision tower takes" in " ".join(result.stderr.split())
        assert not list(tmp_path.iterdir())


def test_make_splits_the_block_as_well(whole: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 200)
    options = ["--text", text, "--context", 64, "--chunks", 2, "--imatrix", "none", "--recipe", "q8_0", "--quiet"]
    run("make", whole, "--out", tmp_path / "out", *options, "--mmproj", "pocket_mmproj", "--split-max-size", "900k")
    shards = sorted((tmp_path / "out").glob("mtp-*-of-*.gguf"))
    assert len(shards) > 1
    assert all(path.stat().st_size <= 900_000 for path in (tmp_path / "out").glob("*.gguf"))

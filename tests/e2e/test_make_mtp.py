"""`make` calibrates a multi-token-prediction block along with its model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_maker import make_checkpoint, mtp_weights_for, write_safetensors

from pocketquant.demo import text_path
from pocketquant.gguf_file.reading import read_header
from pocketquant.quant import read_importance

COMMAND = str(Path(sys.executable).with_name("pocketquant"))


def run(*arguments: object) -> None:
    result = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def with_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with a multi-token-prediction block."""
    folder = make_checkpoint(tmp_path_factory.mktemp("block") / "Block-1M")
    config = json.loads((folder / "config.json").read_text())
    block = mtp_weights_for({"architectures": config["architectures"], **config.get("text_config", config)})
    write_safetensors(folder / "model-mtp.safetensors", block)
    raw = (folder / "model.safetensors").read_bytes()
    names = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    (folder / "model.safetensors").rename(folder / "model-trunk.safetensors")
    weight_map = {name: "model-trunk.safetensors" for name in names if name != "__metadata__"}
    weight_map |= dict.fromkeys(block, "model-mtp.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_breaks_today_02_make_weighs_the_mtp_block(with_block: Path, tmp_path: Path) -> None:
    """Other matrices have no entries for the block, so it cannot be rounded by what its inputs are."""
    out = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 100)
    options = [
        "--recipe",
        "q8_0",
        "-r",
        "q4_0",
        "--context",
        32,
        "--chunks",
        2,
        "--calibrate-chunks",
        4,
        "--text",
        text,
    ]
    run("make", with_block, "--out", out, *options, "--calibrate", text_path("calibration"), "--quiet")
    [matrix], [sidecar] = out.glob("*-imatrix.gguf"), out.glob("mtp-*.gguf")
    header = read_header(sidecar)
    n_layer = max(int(t.name.split(".")[1]) for t in header.tensors if t.name.startswith("blk."))
    entries = [name for name in read_importance(matrix).weights if name.startswith(f"blk.{n_layer}.")]
    assert f"blk.{n_layer}.nextn.eh_proj.weight" in entries
    assert len(entries) >= 8
    assert header.metadata["quantize.imatrix.file"].value == matrix.name
    assert header.metadata["quantize.imatrix.entries_count"].value == len(entries)
    listed = {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert {sidecar.name, matrix.name} < listed
    assert not [name for name in listed if "F32" in name]
    # the matrix that was kept makes the same files
    run("quantize", with_block, "--recipe", "q8_0", "--imatrix", matrix, "-o", tmp_path / "m.gguf", "--quiet")
    assert (tmp_path / "mtp-m.gguf").read_bytes() == sidecar.read_bytes()

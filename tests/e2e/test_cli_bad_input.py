"""Bad input through the command itself: a clear message, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, make_sparse_checkpoint, text_config, weights_for

COMMAND = [str(Path(sys.executable).with_name("pocketquant"))]


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def truncated_shard(folder: Path) -> None:
    path = folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def lying_offsets(folder: Path) -> None:
    path = folder / "model-00001-of-00003.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"] = [0, 2]
    raw = json.dumps(header).encode().ljust(length)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))


def rewritten(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    weights = weights_for(text_config())
    change(weights)
    shutil.rmtree(folder)
    make_checkpoint(folder, weights=weights)


def wrong_shape(folder: Path) -> None:
    rewritten(folder, lambda weights: weights.update({"model.norm.weight": np.ones(7, np.float32)}))


def unknown_tensor(folder: Path) -> None:
    rewritten(folder, lambda weights: weights.update({"model.layers.0.lora_A.weight": np.ones(7, np.float32)}))


def missing_tensor(folder: Path) -> None:
    rewritten(folder, lambda weights: weights.pop("model.layers.3.self_attn.k_norm.weight"))


def non_finite_weight(folder: Path) -> None:
    rewritten(folder, lambda weights: weights["model.layers.2.mlp.up_proj.weight"].__setitem__((3, 3), np.inf))


CASES = {
    missing_shard: "model-00002-of-00003.safetensors",
    truncated_shard: "truncated",
    lying_offsets: "data_offsets [0, 2] say 2",
    unknown_architecture: "model class 'MambaForCausalLM' is not supported",
    wrong_shape: "model.norm.weight: BF16 [7], expected [n_embd=256]",
    unknown_tensor: "model.layers.0.lora_A.weight",
    missing_tensor: "model.layers.3.self_attn.k_norm.weight [64]",
    non_finite_weight: "model.layers.2.mlp.up_proj.weight rows 0 to 511: non-finite weight",
}


@pytest.mark.parametrize("damage", CASES, ids=lambda damage: damage.__name__)
def test_exit_code_2_a_clear_message_and_nothing_written(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", n_shards=3)
    damage(folder)
    out = tmp_path / "out"
    out.mkdir()
    result = run("quantize", folder, "--out", out / "model.gguf", "--recipe", "q8_0")
    assert result.returncode == 2
    assert CASES[damage] in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(out.iterdir()) == []


def test_unwritable_target(tmp_path: Path, checkpoint: Path) -> None:
    for target in ("/proc/model.gguf", tmp_path / "missing" / "model.gguf", tmp_path):
        result = run("convert", checkpoint, "--out", target)
        assert result.returncode == 2
        assert str(target) in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_full_disk_is_said_before_anything_is_written(small_disk: Path, checkpoint: Path) -> None:
    (small_disk / "model.gguf").write_bytes(b"good")
    result = run("convert", checkpoint, "--out", small_disk / "model.gguf")
    assert result.returncode == 2
    assert "the disk has" in result.stderr
    assert [path.name for path in small_disk.iterdir()] == ["model.gguf"]
    assert (small_disk / "model.gguf").read_bytes() == b"good"


def test_disk_that_fills_up_meanwhile(small_disk: Path, checkpoint: Path) -> None:
    """The check before the start cannot see what others write; a failing write has to end as cleanly."""
    code = (
        "import pocketquant.pipeline as p, pocketquant.cli, sys\n"
        "p._check_space = lambda plan, target: None\n"
        f"sys.argv = ['pocketquant', 'convert', {str(checkpoint)!r}, '--out', {str(small_disk / 'm.gguf')!r}]\n"
        "pocketquant.cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "No space left on device" in result.stderr
    assert list(small_disk.iterdir()) == []


def test_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    config = text_config(num_hidden_layers=16, layer_types=None, intermediate_size=16384, hidden_size=2048)
    folder = make_sparse_checkpoint(tmp_path / "big", config, prefix="model.")
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.gguf").write_bytes(b"good")
    process = subprocess.Popen([*COMMAND, "quantize", folder, "--out", out / "model.gguf"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(os.listdir(out)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(os.listdir(out)) == 2, "it never started writing"
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in talk
    assert [path.name for path in out.iterdir()] == ["model.gguf"]
    assert (out / "model.gguf").read_bytes() == b"good"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert"], "Missing argument"),
        (["quantize", "{checkpoint}"], "--out"),
        (["convert", "{checkpoint}", "--out", "x.gguf", "--type", "q8_0"], "bf16, f16 or f32"),
        (["quantize", "{checkpoint}", "--out", "x.gguf", "--recipe", "q9"], "q9: neither a recipe nor a file"),
        (["quantize", "{checkpoint}", "--out", "x.gguf", "--imatrix", "none.gguf"], "none.gguf"),
        (["inspect", "/dev/null"], "no such folder"),
        (["eval", "none.gguf", "--reference", "none.gguf", "--text", "none.txt"], "none.txt"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, checkpoint: Path, tmp_path: Path) -> None:
    result = run(*(argument.format(checkpoint=checkpoint) for argument in arguments), cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []

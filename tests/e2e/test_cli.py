"""The commands as a user types them: what they write, what they print, and the JSON that others rely on."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocketquant.demo import checkpoint_dir
from pocketquant.gguf_file.reading import read_header
from pocketquant.quant import builtin_recipes

COMMAND = str(Path(sys.executable).with_name("pocketquant"))


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32"])
def test_convert_is_quantize_with_that_recipe(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    run("convert", checkpoint, "--out", tmp_path / "a.gguf", "--type", kind)
    run("quantize", checkpoint, "--out", tmp_path / "b.gguf", "--recipe", kind)
    assert digest(tmp_path / "a.gguf") == digest(tmp_path / "b.gguf")


@pytest.mark.parametrize("recipe", builtin_recipes())
def test_dry_run_tells_the_exact_size(recipe: str, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    planned = json.loads(run("quantize", checkpoint, "--recipe", recipe, "--dry-run", "--json").stdout)
    assert not out.exists()
    made = json.loads(run("quantize", checkpoint, "--recipe", recipe, "--out", out, "--json", "--quiet").stdout)
    assert planned["file_bytes"] == made["file_bytes"] == out.stat().st_size
    written = {tensor.name: tensor for tensor in read_header(out).tensors}
    assert {entry["name"] for entry in planned["tensors"]} == written.keys()
    for entry in planned["tensors"]:
        tensor = written[entry["name"]]
        assert entry["shape"] == list(tensor.shape)
        assert (entry["type"], entry["nbytes"]) == (tensor.format.name, tensor.nbytes)
        assert entry["reason"]


def test_a_recipe_file(checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'name = "mine"\ndescription = "all Q8_0 but the value projection"\nfile_type = 7\ndefault = "Q8_0"\n'
        '[[rules]]\nformat = "F16"\nreason = "wanted so"\nroles = ["attn_v"]\n'
    )
    entries = json.loads(run("quantize", checkpoint, "--recipe", recipe, "--dry-run", "--json").stdout)["tensors"]
    assert {entry["type"] for entry in entries if entry["role"] == "attn_v"} == {"F16"}
    assert {entry["type"] for entry in entries if entry["role"] == "ffn_up"} == {"Q8_0"}


@pytest.mark.parametrize("kind", ["checkpoint", "gguf"])
def test_inspect(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    source = checkpoint
    if kind == "gguf":
        source = tmp_path / "x.gguf"
        run("convert", checkpoint, "--out", source)
    shown = json.loads(run("inspect", source, "--json").stdout)
    files = [source] if kind == "gguf" else [source / "model.safetensors"]
    assert shown["file_bytes"] == sum(file.stat().st_size for file in files)
    embedding = next(entry for entry in shown["tensors"] if entry["role"] == "embed")
    assert embedding == {
        "name": "token_embd.weight",
        "role": "embed",
        "shape": [320, 256],
        "type": "BF16",
        "nbytes": 320 * 256 * 2,
    }
    assert "qwen35.block_count" in run("inspect", source).stdout


def test_silent_when_quiet_or_piped(checkpoint: Path, tmp_path: Path) -> None:
    quiet = run("convert", checkpoint, "--out", tmp_path / "a.gguf", "--quiet")
    assert (quiet.stdout, quiet.stderr) == ("", "")
    piped = run("convert", checkpoint, "--out", tmp_path / "b.gguf")
    assert piped.stdout == ""
    assert [line.partition(" ")[0] for line in piped.stderr.splitlines()] == ["will", "written:"]
    assert "\x1b" not in piped.stderr


def test_eval_prints_the_report(demo_gguf: Callable[[str], Path], demo_text: Path) -> None:
    arguments = ["eval", demo_gguf("q4_0"), "--reference", demo_gguf("f32"), "--text", demo_text]
    report: dict[str, Any] = json.loads(run(*arguments, "--context", 128, "--chunks", 12, "--json").stdout)
    kld, top1, ppl = (report["metrics"][name] for name in ("kld", "top1", "ppl"))
    assert 0 < kld["median"] < kld["mean"] < kld["p99"] <= kld["max"]
    assert 0 < kld["se"] < kld["mean"]
    assert 0.5 < top1["mean"] < 1
    assert 0 < top1["se"] < 0.1
    assert ppl["ratio"] == pytest.approx(ppl["model"] / ppl["reference"])
    assert report["tokens"] == 12 * 63
    assert report["provenance"]["model"]["sha256"] == digest(demo_gguf("q4_0"))
    assert report["provenance"]["corpus"]["sha256"] == digest(demo_text)
    assert "KL divergence, mean" in run(*arguments, "--context", 128, "--chunks", 2).stdout


def test_eval_weights_needs_no_inference(demo_gguf: Callable[[str], Path]) -> None:
    shown = json.loads(run("weights", demo_gguf("q4_0"), "--reference", demo_gguf("f32"), "--json").stdout)
    by_name = {entry["name"]: entry for entry in shown["tensors"]}
    assert by_name["output_norm.weight"]["max_abs_error"] == 0
    assert 15 < by_name["blk.0.ffn_up.weight"]["snr_db"] < 30
    assert 0.98 < by_name["blk.0.ffn_up.weight"]["cosine"] < 1


def test_make_twice(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["make", checkpoint_dir(), "--out", out, "--context", 128, "--chunks", 8, "--calibrate-chunks", 8]
    run(*arguments)
    names = {path.name for path in out.iterdir()}
    assert {"report.json", "report.md", "report.html", "SHA256SUMS"} < names
    assert len(names) == 7
    first = {name: digest(out / name) for name in names}
    for line in (out / "SHA256SUMS").read_text().splitlines():
        expected, name = line.split("  ")
        assert first[name] == expected
    report = json.loads((out / "report.json").read_text())
    assert [variant["recipe"] for variant in report["variants"]] == ["pocket_4bit", "q8_0"]
    four, eight = (variant["evaluation"]["metrics"]["kld"]["mean"] for variant in report["variants"])
    assert 0 < eight < four / 5
    assert report["variants"][0]["file_bytes"] < report["variants"][1]["file_bytes"]
    run(*arguments)
    assert {name: digest(out / name) for name in names} == first


def test_make_that_fails_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.md").write_text("good")
    (tmp_path / "short.txt").write_text("too short")
    arguments = [COMMAND, "make", checkpoint_dir(), "--out", out, "--text", tmp_path / "short.txt"]
    arguments += ["--calibrate-chunks", 1]
    result = subprocess.run([*map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 2
    assert "short.txt" in result.stderr
    assert os.listdir(out) == ["report.md"]
    assert (out / "report.md").read_text() == "good"


def test_make_interrupted_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.md").write_text("good")
    process = subprocess.Popen(
        [COMMAND, "make", str(checkpoint_dir()), "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not list(out.glob(".making/.*.partial")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(out.glob(".making/.*.partial")), "it never started writing"
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in talk
    kept = set(os.listdir(out)) - {"report.md"}
    assert kept <= {".making"}
    assert not kept or b".making" in talk, "what is kept is named"
    assert (out / "report.md").read_text() == "good"


def test_make_says_the_cost_first(tmp_path: Path) -> None:
    result = run("make", checkpoint_dir(), "--out", tmp_path / "out", "--dry-run")
    assert "of disk while it runs" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    result = run("demo", cwd=tmp_path)
    assert "KL divergence" in result.stdout
    assert (tmp_path / "demo-out/report.json").exists()


def test_help_and_version() -> None:
    assert "quantize" in run("--help").stdout
    assert run("--version").stdout.startswith("pocketquant 0.")

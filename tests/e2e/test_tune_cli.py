"""`tune` as a user types it, as far as it goes without torch: its cost, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pocketquant.cli.app import app
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.gguf_file.reading import read_header
from pocketquant.tuning.tune import DoesNotPay

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
COMMAND = str(Path(sys.executable).with_name("pocketquant"))


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([COMMAND, "tune", *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result


def test_the_cost_is_said_first(demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    file, reference, out = demo_gguf("q4_k_s"), demo_gguf("f32"), tmp_path / "tuned.gguf"
    asked = (file, "--reference", reference, "--out", out, "--context", 64, "--chunks", 5, "--sampled", 3, "--dry-run")
    cost = json.loads(run(*asked, "--json").stdout)
    model, header = open_gguf(reference), read_header(file)
    names = {tensor.name for tensor in model.tensors if not tensor.keep_f32}
    free = [tensor for tensor in header.tensors if tensor.name in names and tensor.format.layout]
    n_codes = sum(rows * cols for rows, cols in (tensor.shape for tensor in free))
    assert cost["tokens"] == 64 * (5 + 3)
    assert cost["codes"] == n_codes
    # Q4_K and Q5_K have two scales for 256 weights, Q6_K one
    assert n_codes / 256 < cost["scales"] < 2 * n_codes / 256
    assert cost["disk_bytes"] == 8 * n_codes + 4 * cost["tokens"] * model.sizes["n_embd"]
    fewer = json.loads(run(*asked, "--json", "--code-rate", 0).stdout)
    assert fewer["codes"] == 0
    assert fewer["disk_bytes"] == cost["disk_bytes"] - 8 * n_codes
    assert f"{cost['scales']} scales, {n_codes} codes" in run(*asked).stderr.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"GGUF": "f32"}, "nothing to tune"),
        ({"--text": "self"}, "--sampled"),
        ({"--reference": "another"}, "was not made from this reference"),
        ({"--out": "GGUF"}, "would replace"),
        ({}, "`tune` and `calibrate --curvature` need torch"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    change: dict[str, str], message: str, demo_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    if not change and importlib.util.find_spec("torch"):
        pytest.skip("torch is installed here")
    file, reference, out = demo_gguf(change.get("GGUF", "q4_k_s")), demo_gguf("f32"), tmp_path / "tuned.gguf"
    more = []
    if change.get("--out"):
        out = file
    if change.get("--text"):
        more = ["--text", change["--text"]]
    if change.get("--reference"):
        (tmp_path / "other").mkdir()
        reference = other_model(reference, tmp_path / "other" / "other.gguf")
    before = file.read_bytes()
    failed = run(file, "--reference", reference, "--out", out, "--chunks", 3, *more, code=2)
    assert message in failed.stderr
    assert file.read_bytes() == before
    assert not (tmp_path / "tuned.gguf").exists()


def other_model(reference: Path, path: Path) -> Path:
    """The same model with one norm changed."""
    tensor = next(tensor for tensor in read_header(reference).tensors if tensor.name == "blk.0.attn_norm.weight")
    data = bytearray(reference.read_bytes())
    data[tensor.offset + 2] ^= 0x40
    path.write_bytes(data)
    return path


def test_tuning_that_does_not_pay_is_no_bad_input(
    demo_gguf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command's part of it; tests/peers has a run that really does not pay."""

    def does_not_pay(file: Path, *_: object, **__: object) -> None:
        raise DoesNotPay(file, 0.011, 0.012)

    monkeypatch.setattr("pocketquant.tuning.tune.tune_file", does_not_pay)
    monkeypatch.setattr("pocketquant.calibration.torch_layers.require_torch", lambda: None)
    words = [demo_gguf("q4_k_s"), "--reference", demo_gguf("f32"), "--out", tmp_path / "t.gguf", "--context", 64]
    result = CliRunner().invoke(app, ["tune", *map(str, words), "--chunks", "5", "--json"])
    assert result.exit_code == 1, result.output
    document = json.loads(result.stdout)
    assert (document["schema"], document["out"]) == ("pocketquant.tune/1", None)
    assert document["held_back_kld"] == {"before": 0.011, "after": 0.012}
    assert "does not pay" in result.stderr.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []

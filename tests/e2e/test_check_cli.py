"""`pocketquant check` and `--chat-template` as a user runs them: exit codes, stdout, stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from adapter_maker import make_adapter
from check_maker import make_trained_checkpoint
from checkpoint_maker import make_checkpoint, mtp_weights_for, text_config, weights_for
from gguf_maker import Parts, changed

from pocketquant.gguf_file.reading import read_header

COMMAND = [str(Path(sys.executable).with_name("pocketquant"))]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained_checkpoint(tmp_path_factory.mktemp("check") / "Tiny")


@pytest.fixture(scope="module")
def gguf(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("check") / "tiny.gguf"
    assert run("quantize", source, "-r", "q4_k_m", "-o", target).returncode == 0
    return target


def test_a_clean_file_ends_with_0(gguf: Path, source: Path) -> None:
    done = run("check", gguf, "--source", source)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 errors, 0 warnings (qwen35, 55 tensors" in done.stdout
    assert "least like the source: blk." in done.stdout


def test_a_broken_file_ends_with_1_and_is_described(gguf: Path, tmp_path: Path) -> None:
    def damage(parts: Parts) -> None:
        for name in [name for name in parts.tensors if name.startswith("blk.2.")]:
            del parts.tensors[name]
        parts.tensors["output_norm.weight"][0][7] = np.inf

    path = changed(gguf, tmp_path / "m.gguf", damage)
    done = run("check", path)
    assert done.returncode == 1
    assert "error: non-finite output_norm.weight: 1 numbers are infinite or NaN" in done.stdout
    assert "  ... and 6 more of tensor-missing; --json lists them all" in done.stdout
    as_json = run("check", path, "--json")
    assert as_json.returncode == 1
    report = json.loads(as_json.stdout)
    assert (report["errors"], report["warnings"]) == (15, 0)
    assert {finding["code"] for finding in report["findings"]} == {"tensor-missing", "non-finite"}
    assert all(finding["advice"] for finding in report["findings"])


def test_what_cannot_be_read_ends_with_2(tmp_path: Path, gguf: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf.read_bytes()[:1000])
    for arguments in (["check", path], ["check", tmp_path / "missing.gguf"], ["check", gguf, "--source", tmp_path]):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert "error:" in done.stderr


def test_a_split_model_is_checked_as_one(gguf: Path, source: Path, tmp_path: Path) -> None:
    assert run("split", gguf, "-o", tmp_path / "m.gguf", "--split-max-size", "600k").returncode == 0
    shards = sorted(tmp_path.glob("m-*.gguf"))
    assert len(shards) > 2
    done = run("check", shards[0], "--source", source)
    assert done.returncode == 0
    assert "0 errors, 0 warnings (qwen35, 55 tensors" in done.stdout
    assert "shard" not in done.stdout
    second = run("check", shards[1])
    assert second.returncode == 2
    assert "open the first one" in second.stderr
    shards[1].unlink()
    assert "shards are missing" in run("check", shards[0]).stderr


@pytest.mark.parametrize("recipe", ["q4_k_m", "q4_0", "iq4_xs"])
def test_our_files_with_multi_token_prediction_are_clean(recipe: str, tmp_path: Path) -> None:
    """The trunk's types are llama.cpp's; the block, which no importance matrix sees, has Q5_K or better."""
    weights = weights_for(text_config()) | mtp_weights_for(text_config())
    for name in weights:
        if name.endswith("linear_attn.norm.weight"):
            weights[name] += 1
    checkpoint = make_checkpoint(tmp_path / "c", weights=weights)
    assert run("quantize", checkpoint, "-r", recipe, "-o", tmp_path / "m.gguf").returncode == 0
    for name in ("m.gguf", "mtp-m.gguf"):
        assert "0 errors, 0 warnings" in run("check", tmp_path / name).stdout
    assert run("quantize", checkpoint, "-r", recipe, "--mtp", "embed", "-o", tmp_path / "e.gguf").returncode == 0
    report = json.loads(run("check", tmp_path / "e.gguf", "--json").stdout)
    assert [finding["code"] for finding in report["findings"]] == ["mtp-inside"]  # what embedding means


def test_adapters_and_matrices_are_shown_as_what_they_are(gguf: Path, source: Path, tmp_path: Path) -> None:
    adapter, text = make_adapter(tmp_path / "lora", source), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    assert run("adapter", adapter, "--base", source, "-o", tmp_path / "lora.gguf").returncode == 0
    made = run("imatrix", gguf, "--text", text, "-o", tmp_path / "imatrix.gguf", "--context", "32", "--chunks", "2")
    assert made.returncode == 0, made.stderr
    for name, what in (("lora.gguf", "a LoRA adapter"), ("imatrix.gguf", "an importance matrix")):
        shown = run("inspect", tmp_path / name)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert f"note: {what}, no model" in shown.stdout
        assert json.loads(run("inspect", tmp_path / name, "--json").stdout)["tensors"]
        checked = run("check", tmp_path / name)
        assert f"note: {what}: only its numbers are looked at" in checked.stdout
        refused = run("quantize", tmp_path / name, "-o", tmp_path / "no.gguf")
        assert refused.returncode == 2
        assert what in refused.stderr


def test_an_adapter_larger_than_the_limit_is_refused(source: Path, tmp_path: Path) -> None:
    adapter, out = make_adapter(tmp_path / "lora", source), tmp_path / "lora.gguf"
    done = run("adapter", adapter, "--base", source, "-o", out, "--split-max-size", "50k")
    assert done.returncode == 2
    assert "from one file alone" in " ".join(done.stderr.split())
    assert not out.exists()


def test_a_checkpoint_is_checked_before_it_is_converted(source: Path, tmp_path: Path) -> None:
    assert run("check", source).returncode == 0
    folder = make_checkpoint(tmp_path / "c")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}\n{% if %}")
    done = run("check", folder)
    assert done.returncode == 1
    assert "chat template, line 2: syntax error" in done.stdout
    assert run("check", source, "--source", source).returncode == 2


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_a_template_can_be_given(command: str, tmp_path: Path) -> None:
    folder, own, out = make_checkpoint(tmp_path / "c"), tmp_path / "own.jinja", tmp_path / "m.gguf"
    (folder / "chat_template.jinja").write_text("{% if %}")
    refused = run(command, folder, "-o", out)
    assert refused.returncode == 2
    assert "--chat-template FILE" in refused.stderr
    assert not out.exists()
    own.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    assert run(command, folder, "-o", out, "--chat-template", own).returncode == 0
    assert read_header(out).metadata["tokenizer.chat_template"].value == own.read_text()

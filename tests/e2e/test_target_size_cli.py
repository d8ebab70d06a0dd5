"""`quantize --target-size`, `--explain`, `from:FILE` and `recipe`, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pocketquant.demo import checkpoint_dir
from pocketquant.gguf_file.reading import read_header
from pocketquant.quant import builtin_recipes, format_recipe, open_recipe

COMMAND = str(Path(sys.executable).with_name("pocketquant"))


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.format.name for tensor in read_header(path).tensors}


def test_a_target_is_met_from_below_and_another_file_can_take_its_types(tmp_path: Path) -> None:
    demo, first, second = checkpoint_dir(), tmp_path / "first.gguf", tmp_path / "second.gguf"
    told = run("quantize", demo, "--target-size", "2.4MB", "--out", first)
    assert "of 2,400,000 bytes, predicted loss" in told.stderr
    assert told.stdout == ""
    assert 0.995 * 2_400_000 < first.stat().st_size <= 2_400_000
    assert {"Q4_K", "Q5_K"} <= set(types_of(first).values())
    run("quantize", demo, "--recipe", f"from:{first}", "--out", second)
    assert types_of(second) == types_of(first)

    saved = tmp_path / "saved.toml"
    saved.write_text(run("recipe", "show", f"from:{first}").stdout)
    shown = json.loads(run("quantize", demo, "--recipe", saved, "--dry-run", "--json").stdout)
    assert {entry["name"]: entry["type"] for entry in shown["tensors"]} == types_of(first)


def test_bits_per_weight_with_an_explanation_in_json(tmp_path: Path) -> None:
    arguments = ["quantize", checkpoint_dir(), "--target-bpw", 5.2, "--explain", "--dry-run"]
    shown = json.loads(run(*arguments, "--json").stdout)
    assert 5.2 * 0.995 < shown["bits_per_weight"] <= 5.2
    explained = shown["explain"]
    assert explained["file_bytes"] == shown["file_bytes"]
    assert sum(share["loss_share"] for share in explained["roles"]) == pytest.approx(1)
    by_role = {share["role"]: share for share in explained["roles"]}
    for role, share in by_role.items():
        assert share["nbytes"] == sum(entry["nbytes"] for entry in shown["tensors"] if entry["role"] == role), role
    down = by_role["ffn_down"]
    assert down["cheaper"]["file_bytes"] < shown["file_bytes"] < down["dearer"]["file_bytes"]
    assert down["dearer"]["loss"] < 0 < down["cheaper"]["loss"]
    text = run(*arguments).stdout
    assert "share of loss" in text
    assert f"{shown['file_bytes']:,} bytes, predicted loss" in text


def test_any_recipe_can_be_explained_and_another_table_changes_the_prediction(tmp_path: Path) -> None:
    arguments = ["quantize", checkpoint_dir(), "--explain", "--dry-run", "--json"]
    ours = json.loads(run(*arguments).stdout)
    assert ours["recipe"] == "pocket_4bit"
    table = tmp_path / "measured.toml"
    roles = {share["role"] for share in ours["explain"]["roles"]}
    table.write_text(
        'schema = 1\nsource = "made up"\n[[measured]]\nmodel = "demo"\nn_weights = 1000\nn_layer = 4\n'
        "[measured.whole_model]\nQ3_K = 0.4\nQ4_K = 0.1\nQ5_K = 0.03\nQ6_K = 0.01\nQ8_0 = 0.001\nIQ4_NL = 0.1\n"
        + "".join(f"[measured.roles.{role}]\nloss = [{100.0 if role == 'ffn_gate' else 1.0}]\n" for role in roles)
    )
    target = ["quantize", checkpoint_dir(), "--target-size", ours["file_bytes"], "--explain", "--dry-run", "--json"]
    without, measured = (json.loads(run(*target, *more).stdout) for more in ([], ["--sensitivity", table]))

    def bits(shown: dict[str, dict[str, list[dict[str, float]]]], role: str) -> float:
        return next(share["bits_per_weight"] for share in shown["explain"]["roles"] if share["role"] == role)

    assert bits(measured, "ffn_gate") > 6 > bits(without, "ffn_gate")
    assert measured["explain"]["sensitivity"] == "made up"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-size", "1kB"], "this model's files are from"),
        (["--target-size", "900GB"], "this model's files are from"),
        (["--target-bpw", "1.5"], "1.5 bits per weight cannot be reached"),
        (["--target-size", "plenty"], "2GB"),
        (["--target-size", "2MB", "--target-bpw", "5"], "give one"),
        (["--target-size", "2MB", "--recipe", "q4_k_m"], "give one"),
        (["--sensitivity", "x.toml"], "--explain"),
        (["--sensitivity", "missing.toml", "--explain"], "missing.toml: cannot be read"),
        (["--recipe", "from:missing.gguf"], "missing.gguf: cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: list[str], message: str, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    told = run("quantize", checkpoint_dir(), *arguments, "--out", out, code=2)
    assert message in " ".join(told.stderr.split())
    assert "Traceback" not in told.stderr
    assert not out.exists()


def test_recipes_are_listed_and_shown() -> None:
    listed = json.loads(run("recipe", "list", "--json").stdout)["recipes"]
    assert [entry["name"] for entry in listed] == list(builtin_recipes())
    assert all(entry["description"] in run("recipe", "list").stdout for entry in listed[:1])
    assert run("recipe", "show", "q4_k_m").stdout == format_recipe(open_recipe("q4_k_m"))
    assert "neither a recipe nor a file" in run("recipe", "show", "q4_k_xxl", code=2).stderr

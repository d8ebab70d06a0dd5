"""What a user is told: advice that can be followed, files that are written, matrices that are not counted twice."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint
from gguf_maker import changed
from typer.testing import CliRunner

from pocketquant import compare, open_model, open_recipe, plan, write
from pocketquant.calibration.importance import ImportanceSums, merge_sums
from pocketquant.cli.app import app
from pocketquant.errors import EvalError, RecipeError
from pocketquant.eval.kinship import check_architecture, describe_quantized
from pocketquant.eval.reference import PackSettings, make_reference
from pocketquant.eval.report.markdown import to_markdown
from pocketquant.extras import install_command
from pocketquant.gguf_file.identity import identify, identify_model
from pocketquant.gguf_file.shards import split_file
from pocketquant.texts.corpus import Text
from pocketquant.texts.embedded import read_texts

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("extra", ["eval", "cluster", "tasks", "reference", "curvature"])
def test_advice_names_packages_that_exist(extra: str) -> None:
    known = " ".join(metadata.requires("pocketquant") or [])
    command = install_command(extra)
    packages = re.findall(r"'([A-Za-z0-9._-]+)", command.removeprefix("pip install "))
    assert packages
    assert "pocketquant" not in packages
    assert all(package in known for package in packages)
    assert ("llama-cpp-python" in packages) == (extra != "cluster")


def test_no_advice_names_the_package_on_an_index() -> None:
    """It may not be there under that name; what it needs is."""
    for path in (ROOT / "pocketquant").rglob("*.py"):
        assert "pip install 'pocketquant[" not in path.read_text(encoding="utf-8"), path


def sums(scale: float, dataset: str = "a.txt") -> ImportanceSums:
    rng = np.random.default_rng(int(scale))
    arrays = {name: scale + rng.random((1, 8)) for name in ("blk.0.ffn_up.weight", "blk.1.ffn_up.weight")}
    return ImportanceSums(arrays, {name: np.array([64]) for name in arrays}, 32, (dataset,))


def test_the_same_text_is_not_added_twice() -> None:
    merged = merge_sums([sums(1), sums(2), sums(3, "b.txt")])
    assert merged.n_chunks == 6
    again = sums(2)
    again = ImportanceSums({k: v * 1.0001 for k, v in again.sums.items()}, again.counts, 32, again.datasets)
    with pytest.raises(RecipeError, match=r"two.gguf and again.gguf, from a.txt"):
        merge_sums([sums(1), sums(2), again], ["one.gguf", "two.gguf", "again.gguf"])


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stderr


def test_a_file_is_said_to_be_written_once_it_is(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    said = run("convert", checkpoint, "--out", out)
    assert f"written: {out}" in said.splitlines()[-1]
    assert "written:" not in run("convert", checkpoint, "--out", out, "--dry-run")
    assert f"written: {tmp_path / 's-00001-of-'}" in run(
        "split", out, "--out", tmp_path / "s.gguf", "--split-max-size", "1M"
    )


def test_another_architecture_is_no_reference(checkpoint: Path, tmp_path: Path) -> None:
    mixture = make_checkpoint(tmp_path / "moe", num_experts=6)
    for name, folder in (("dense", checkpoint), ("moe", mixture)):
        write(plan(open_model(folder), open_recipe("bf16")), tmp_path / f"{name}.gguf")
    (tmp_path / "text.txt").write_text("some words " * 100)
    for reference in (tmp_path / "moe.gguf", mixture):
        with pytest.raises(EvalError, match=r"is a qwen35, .* a qwen35moe, so they are different models"):
            compare(tmp_path / "dense.gguf", reference, tmp_path / "text.txt", context=16)
    check_architecture(tmp_path / "dense.gguf", checkpoint)
    check_architecture(tmp_path / "dense.gguf", tmp_path / "dense.gguf")


def test_a_quantized_reference_is_called_one(checkpoint: Path, tmp_path: Path) -> None:
    for recipe, expected in (("f32", ""), ("bf16", ""), ("q8_0", r"\d+ % Q8_0"), ("q4_k_m", r"\d+ % Q4_K.*Q6_K")):
        write(plan(open_model(checkpoint), open_recipe(recipe)), tmp_path / f"{recipe}.gguf")
        assert re.fullmatch(expected, describe_quantized(tmp_path / f"{recipe}.gguf"))
    (tmp_path / "text.txt").write_text("some words " * 100)
    reference, pack = tmp_path / "q8_0.gguf", tmp_path / "q8_0.pqref"
    make_reference(reference, [Text("text", tmp_path / "text.txt")], pack, PackSettings(context=16, chunks=1))
    for each in (reference, pack):
        report = compare(tmp_path / "bf16.gguf", each, tmp_path / "text.txt", context=16, chunks=1)
        assert re.fullmatch(r"\d+ % Q8_0", report.provenance.reference_quantized or "")
        assert "q8_0.gguf is itself quantized" in to_markdown(report).replace("\\_", "_")
    assert describe_quantized(checkpoint) == ""
    folder = changed(tmp_path / "f32.gguf", tmp_path / "none.gguf", lambda parts: parts.tensors.clear())
    assert describe_quantized(folder) == ""


def test_texts_of_the_package_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = read_texts(["package:prose", "mine=package:evaluation", "domains"])
    assert [text.domain for text in texts[:2]] == ["prose", "mine"]
    assert texts[0].path == next(text.path for text in texts[2:] if text.domain == "prose")
    assert texts[1].path.name == "evaluation.txt"
    with pytest.raises(EvalError, match=r"package:nope: no such text .*there are: .*prose"):
        read_texts(["package:nope"])
    monkeypatch.chdir(tmp_path)
    Path("package:prose").write_text("mine")
    assert read_texts(["package:prose"])[0].path == Path("package:prose")


def test_the_recipes_are_a_document() -> None:
    result = CliRunner().invoke(app, ["recipe", "list", "--json"])
    assert {entry["name"] for entry in json.loads(result.stdout)["recipes"]} >= {"q4_k_m", "pocket_4bit"}


def test_a_split_model_is_as_large_as_all_of_its_shards(checkpoint: Path, tmp_path: Path) -> None:
    write(plan(open_model(checkpoint), open_recipe("q8_0")), tmp_path / "m.gguf")
    whole = identify_model(tmp_path / "m.gguf")
    assert whole == identify(tmp_path / "m.gguf")
    shards = split_file(tmp_path / "m.gguf", tmp_path / "s.gguf", 1 << 20)
    found = identify_model(shards[0])
    assert found.name == shards[0].name
    assert found.size == sum(shard.stat().st_size for shard in shards)
    assert whole.size <= found.size < 1.1 * whole.size
    assert found.sha256 not in {identify(shard).sha256 for shard in shards}

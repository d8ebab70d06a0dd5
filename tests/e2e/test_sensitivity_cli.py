"""`sensitivity`, and what `quantize` makes of its tables and of statistics, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pocketquant.demo import checkpoint_dir, text_path
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.gguf_file.reading import read_header
from pocketquant.quant.loss_table import LossTable, read_figures
from pocketquant.quant.sensitivity import read_sensitivity

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

COMMAND = str(Path(sys.executable).with_name("pocketquant"))
SHORT = ("--context", 64, "--chunks", 3, "--quiet")


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "demo.stats"
    run("calibrate", checkpoint_dir(), "--out", path, "--context", 64, "--chunks", 12, "--quiet")
    return path


def test_a_measured_table_is_read_and_an_interrupted_series_goes_on(tmp_path: Path) -> None:
    table, state = tmp_path / "measured.toml", tmp_path / ".measured.toml.runs.json"
    cost = json.loads(run("sensitivity", checkpoint_dir(), "--out", table, "--groups", 1, "--dry-run", "--json").stdout)
    assert cost["runs"] == 13 + 7
    assert not table.exists()
    run("sensitivity", checkpoint_dir(), "--out", table, "--groups", 1, *SHORT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["measured.toml"]
    measured = read_sensitivity(table).measured[0]
    assert len(measured.curves) == 13
    assert measured.whole_model["Q3_K"] > measured.whole_model["Q4_K"] > measured.whole_model["Q6_K"] > 0
    out = tmp_path / "out.gguf"
    run("quantize", checkpoint_dir(), "--target-size", "2.4MB", "--sensitivity", table, "--out", out, "--quiet")
    assert out.stat().st_size <= 2_400_000

    state.write_text(json.dumps({"run": {}, "results": {}}))
    failed = run("sensitivity", checkpoint_dir(), "--out", table, "--groups", 1, "--resume", *SHORT, code=2)
    assert "results of another model or of other settings" in failed.stderr


def test_predictions_are_recalibrated_by_runs_and_choose_types(statistics: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "losses.json", tmp_path / "out.gguf"
    arguments = ["--stats", statistics, "--rounding", "descent", "--recalibrate", "--json"]
    shown = json.loads(run("sensitivity", checkpoint_dir(), "--out", table, *arguments, *SHORT).stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.json"]
    read = read_figures(table)
    assert isinstance(read, LossTable)
    assert {role.value: value for role, value in read.multipliers.items()} == pytest.approx(
        {role: min(max(row["ratio"], 0.25), 4.0) for role, row in shown["roles"].items()}
    )
    sizing = ["--target-size", "2.4MB", "--sensitivity", table, "--stats", statistics, "--rounding", "descent"]
    explained = json.loads(run("quantize", checkpoint_dir(), *sizing, "--explain", "--out", out, "--json").stdout)
    assert out.stat().st_size == explained["file_bytes"] <= 2_400_000
    lost = sum(read.loss(tensor, tensor.dtype) for tensor in open_gguf(out).tensors if not tensor.keep_f32)
    assert explained["explain"]["predicted_loss"] == pytest.approx(lost)
    assert "descent" in read_header(out).metadata["pocketquant.rounding"].value


def test_pocket_recipes_choose_types_by_statistics_within_their_bytes(statistics: Path, tmp_path: Path) -> None:
    types, sizes = [], []
    for extra in ([], ["--keep-types"]):
        out = tmp_path / f"{len(extra)}.gguf"
        run("quantize", checkpoint_dir(), "--stats", statistics, "--out", out, "--quiet", *extra)
        header = read_header(out)
        assert header.metadata["pocketquant.recipe"].value == "pocket_4bit"
        assert "pocketquant.rounding" in header.metadata
        types.append({tensor.name: tensor.format.name for tensor in header.tensors})
        sizes.append(out.stat().st_size)
    assert types[0] != types[1]
    assert 0.99 * sizes[1] < sizes[0] <= sizes[1]


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    base = ["sensitivity", checkpoint_dir(), "--out", tmp_path / "x"]
    assert "needs --stats" in run(*base, "--recalibrate", code=2).stderr
    assert "needs --stats" in run(*base, "--rounding", "descent", code=2).stderr
    for more in ((), ("--dry-run",)):
        assert "none, search" in run(*base, "--stats", tmp_path / "missing", "--rounding", "best", *more, code=2).stderr
        assert "cannot be read" in run(*base, "--text", tmp_path / "missing.txt", *more, code=2).stderr
        assert "cannot be read" in run(*base, "--stats", tmp_path / "missing", *more, code=2).stderr
    assert text_path("calibration").exists()


def test_without_any_statistics_a_target_loses_less_than_the_recipe_of_its_size(tmp_path: Path, demo_gguf) -> None:  # type: ignore[no-untyped-def]
    from pocketquant import compare

    lost = {}
    for recipe in ("q4_k_m", "q5_k_m"):
        of_recipe, made = demo_gguf(recipe), tmp_path / f"{recipe}.gguf"
        size = of_recipe.stat().st_size
        run("quantize", checkpoint_dir(), "--target-size", size, "--out", made, "--quiet")
        assert made.stat().st_size <= size
        for path in (of_recipe, made):
            report = compare(path, demo_gguf("f32"), text_path("evaluation"), context=256, chunks=24)
            lost[path == made] = report.metrics.kld.mean
        assert lost[True] < 0.9 * lost[False], recipe

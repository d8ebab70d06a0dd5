"""The table of loss per byte, made small: files no larger than the peer's, and figures of the very model left out."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from pocketquant.demo import text_path
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.gguf_file.reading import read_header
from pocketquant.quant.loss_table import read_figures
from pocketquant.quant.sensitivity import Sensitivity

pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks/quality.py"
    spec = importlib.util.spec_from_file_location("bench_quality", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_figures_of_the_very_model_are_left_out(
    quality: ModuleType, demo_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    made = quality.without_this_model(open_gguf(demo_gguf("f32")), tmp_path / "table.toml")
    left, packaged = read_figures(made), read_figures(None)
    assert isinstance(left, Sensitivity)
    assert isinstance(packaged, Sensitivity)
    names = {each.model for each in packaged.measured}
    assert names - {each.model for each in left.measured} == {"the embedded model"}


def test_nothing_is_left_out_for_a_model_that_is_not_in_it(
    quality: ModuleType, tmp_path: Path, checkpoint: Path
) -> None:
    from pocketquant import open_model

    assert quality.without_this_model(open_model(checkpoint), tmp_path / "table.toml") is None


@pytest.mark.slow
def test_the_table(quality: ModuleType, demo_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibration = tmp_path / "calibration.txt"
    calibration.write_text(text_path("calibration").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    kept = tmp_path / "kept"
    words = ["--calibration", calibration, "--evaluation", f"name={demo_text}", "--keep", kept, "--sizes", "Q4_K_M"]
    measured = tmp_path / "measured.csv"
    quality.main([*map(str, words), "--chunks", "4", "--methods", "0", "2", "--native-only", "--csv", str(measured)])
    lines = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    rows = {line[2]: line for line in lines if len(line) > 6 and line[1] == "Q4_K_M"}
    assert list(rows) == ["peer", "types only, no statistics", "types and rounding, no gradients"]
    sizes = [int(row[3].replace(",", "")) for row in rows.values()]
    assert sizes[0] >= max(sizes[1:]) > 0.99 * sizes[0]
    losses = [float(row[4].split()[0]) for row in rows.values()]
    assert losses[2] < losses[0]
    assert rows["peer"][7] == "1.000"
    assert float(rows["types and rounding, no gradients"][7]) == pytest.approx(losses[2] / losses[0], abs=0.002)
    files = {path.name.split("_any")[0]: path for path in kept.glob("*.gguf")}
    assert {t.name for t in read_header(files["peer_Q4_K_M.gguf"]).tensors} == {
        t.name for t in read_header(files["Q4_K_M_types_only_no_statistics"]).tensors
    }
    with measured.open(encoding="utf-8", newline="") as file:
        kept = {each["method"]: each for each in csv.DictReader(file)}
    assert [f"{float(each['kld_nats']):.6f} ± {float(each['kld_se']):.6f}" for each in kept.values()] == [
        row[4] for row in rows.values()
    ]
    assert [int(each["bytes"]) for each in kept.values()] == sizes
    assert {each["text"] for each in kept.values()} == {"name"}

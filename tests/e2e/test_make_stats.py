"""`pocketquant make --stats`: rounds by statistics, and makes an importance matrix only for what they leave out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from statistics_maker import make_statistics

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.calibration.statistics import open_statistics
from pocketquant.demo import checkpoint_dir, text_path
from pocketquant.gguf_file.reading import read_header
from pocketquant.quant.rounding.encoding import with_rounding
from pocketquant.texts.calibration import CalibrationSettings

pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")

from pocketquant.calibration.statistics_run import collect_statistics

COMMAND = str(Path(sys.executable).with_name("pocketquant"))


def make(out: Path, *arguments: object) -> dict[str, object]:
    command = [COMMAND, "make", str(checkpoint_dir()), "--out", str(out), "--json", "--quiet", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def test_no_matrix_is_made_where_statistics_cover_everything(demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    stats = tmp_path / "demo.stats"
    collect_statistics(demo_gguf("f32"), [text_path("calibration")], stats, CalibrationSettings(128, 16, threads=1))
    few = ("--recipe", "q4_k_m", "--context", 128, "--chunks", 8)
    result = make(tmp_path / "stats", *few, "--recipe", "pocket_4bit", "--stats", stats)
    plain = make(tmp_path / "plain", *few, "--imatrix", "none")
    assert result["importance"] is None
    said = "two-sided; 2048 tokens of calibration.txt"
    assert [each["variants"][0]["rounding"] for each in (result, plain)] == [said, None]
    name, pocket = (variant["file"] for variant in result["variants"])
    write(
        with_rounding(plan(open_model(checkpoint_dir()), open_recipe("q4_k_m")), open_statistics(stats)),
        tmp_path / name,
    )
    assert (tmp_path / "stats" / name).read_bytes() == (tmp_path / name).read_bytes()
    metadata = read_header(tmp_path / "stats" / name).metadata
    assert metadata["pocketquant.rounding"].value == said
    assert not [key for key in metadata if key.startswith("quantize.imatrix")]
    # a pocket recipe is a size: its types are chosen by the statistics, as `quantize` chooses them
    options = ["--recipe", "pocket_4bit", "--stats", str(stats), "--quiet", "--out", str(tmp_path / "quantized.gguf")]
    subprocess.run([COMMAND, "quantize", str(checkpoint_dir()), *options], check=True)
    assert (tmp_path / "stats" / pocket).read_bytes() == (tmp_path / "quantized.gguf").read_bytes()
    chosen = {tensor.name: tensor.format for tensor in read_header(tmp_path / "quantized.gguf").tensors}
    own = plan(open_model(checkpoint_dir()), open_recipe("pocket_4bit"))
    assert chosen != {item.tensor.name: item.format for item in own.tensors}
    kld, plain_kld = (each["variants"][0]["evaluation"]["metrics"]["kld"]["mean"] for each in (result, plain))
    assert kld < 0.9 * plain_kld


def test_a_matrix_is_made_for_what_statistics_leave_out(tmp_path: Path) -> None:
    left_out = "blk.2.ffn_down.weight"
    stats = make_statistics(open_model(checkpoint_dir()), tmp_path / "made.stats", without=[left_out], n_group=2)
    few = ("--recipe", "q4_0", "--context", 64, "--chunks", 2, "--calibrate-chunks", 4)
    result = make(tmp_path / "out", *few, "--stats", stats, "--rounding", "feedback")
    assert result["importance"]["windows"] == 4
    (matrix,) = (tmp_path / "out").glob("*imatrix.gguf")
    (quantized,) = (path for path in (tmp_path / "out").glob("*.gguf") if path != matrix)
    metadata = read_header(quantized).metadata
    assert metadata["pocketquant.rounding"].value.startswith("feedback; 99 tokens of made-up.txt")
    assert metadata["quantize.imatrix.file"].value == matrix.name

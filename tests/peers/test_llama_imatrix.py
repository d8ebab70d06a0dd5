"""Equal sums and counts from llama-imatrix, dense and with experts, where that program is installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from moe_checkpoint import golden_checkpoint

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.calibration.importance import read_sums, write_sums
from pocketquant.demo import text_path
from pocketquant.texts.calibration import CalibrationSettings

pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")

from pocketquant.calibration.imatrix import collect_importance


@pytest.fixture
def peer() -> str:
    program = shutil.which("llama-imatrix")
    if program is None:
        pytest.skip("no llama-imatrix on the PATH; build it from llama.cpp")
    return program


def compare_with(peer: str, model: Path, folder: Path, context: int, chunks: int) -> None:
    text = folder / "text.txt"
    text.write_text(text_path("calibration").read_text()[:30000])
    command = [peer, "-m", model, "-f", text, "-c", context, "-b", context, "-t", 1, "--chunks", chunks]
    subprocess.run([*map(str, command), "-o", folder / "peer.gguf"], check=True, capture_output=True)
    sums, _ = collect_importance(model, text, CalibrationSettings(context, chunks, threads=1))
    write_sums(sums, folder / "ours.gguf")
    ours, theirs = read_sums(folder / "ours.gguf"), read_sums(folder / "peer.gguf")
    assert ours.sums.keys() == theirs.sums.keys()
    assert (ours.n_chunks, ours.context) == (theirs.n_chunks, theirs.context) == (chunks, context)
    for name, array in ours.sums.items():
        np.testing.assert_allclose(array, theirs.sums[name], rtol=1e-3, err_msg=name)
        np.testing.assert_array_equal(ours.counts[name], theirs.counts[name], err_msg=name)


@pytest.mark.parametrize("context", [512, 200])
def test_sums_of_a_dense_model(peer: str, context: int, demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    compare_with(peer, demo_gguf("f32"), tmp_path, context, 3)


def test_sums_and_counts_of_experts(peer: str, tmp_path: Path) -> None:
    model = tmp_path / "moe.gguf"
    write(plan(open_model(golden_checkpoint(tmp_path / "checkpoint")), open_recipe("f32")), model)
    compare_with(peer, model, tmp_path, 64, 5)


def test_the_peer_reads_ours(peer: str, demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    sums, _ = collect_importance(demo_gguf("f32"), text_path("calibration"), CalibrationSettings(128, 2, threads=1))
    write_sums(sums, tmp_path / "ours.gguf")
    command = [
        peer,
        "-m",
        demo_gguf("f32"),
        "--in-file",
        tmp_path / "ours.gguf",
        "-o",
        tmp_path / "again.gguf",
        "-c",
        "128",
        "-b",
        "128",
    ]
    subprocess.run(command, check=True, capture_output=True)
    again = read_sums(tmp_path / "again.gguf")
    for name, array in read_sums(tmp_path / "ours.gguf").sums.items():
        np.testing.assert_array_equal(again.sums[name], array)
    assert again.n_chunks == 2

"""The checkpoint itself as the reference, run by transformers, where torch is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocketquant.demo import checkpoint_dir
from pocketquant.eval import compare
from pocketquant.eval.packs.pack import read_pack

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
CONTEXT, CHUNKS = 96, 4
RUN = "from pocketquant.cli import main; main()"


@pytest.fixture(scope="module")
def run_with_torch(oracle_python: Path) -> Callable[..., Any]:
    """Runs a command of ours in the interpreter that has torch, with our own packages behind its own."""
    ours = subprocess.run(
        [sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"], capture_output=True, text=True
    ).stdout.strip()
    root = Path(__file__).parents[2]
    probe = subprocess.run(
        [oracle_python, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True
    )
    if probe.stdout.strip() != str(sys.version_info[:2]):
        pytest.skip("the oracles' Python is of another version, so that it cannot import our packages")

    def run(*arguments: str | Path) -> Any:
        environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{ours}"}
        done = subprocess.run(
            [oracle_python, "-c", RUN, *arguments, "--json", "--quiet"],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return run


def test_the_conversion_loses_nothing(
    run_with_torch: Callable[..., Any], demo_gguf: Callable[[str], Path], demo_text: Path, tmp_path: Path
) -> None:
    window = ["--text", demo_text, "--context", str(CONTEXT), "--chunks", str(CHUNKS)]
    report = run_with_torch("eval", demo_gguf("f32"), "--reference", checkpoint_dir(), *window)
    assert 0 <= report["metrics"]["kld"]["mean"] < 1e-6
    assert report["metrics"]["kld"]["max"] < 1e-4
    assert report["metrics"]["top1"]["mean"] == 1
    assert {"torch", "transformers"} & set(report["provenance"]["versions"]) == set()
    assert report["provenance"]["reference"]["name"] == "checkpoint"

    pack = tmp_path / "checkpoint.pqref"
    made = run_with_torch("reference", checkpoint_dir(), "--out", pack, *window)
    assert made["floor"]["kld_mean"] < 1e-9
    header = read_pack(pack).header
    assert header.head is not None
    assert (header.head.format, header.coding) == ("BF16", "f24")
    assert {"torch", "transformers"} <= set(header.versions)
    # torch is needed to make it, not to use it
    live = run_with_torch("eval", demo_gguf("q4_k_m"), "--reference", checkpoint_dir(), *window)["metrics"]["kld"]
    packed = compare(demo_gguf("q4_k_m"), pack, demo_text, context=CONTEXT, chunks=CHUNKS).metrics.kld
    assert abs(packed.mean - live["mean"]) < header.floor.shift
    side_by_side = compare(demo_gguf("q4_k_m"), demo_gguf("f32"), demo_text, context=CONTEXT, chunks=CHUNKS).metrics.kld
    assert packed.mean == pytest.approx(side_by_side.mean, abs=2e-6)
    top = run_with_torch("reference", checkpoint_dir(), "--out", tmp_path / "top.pqref", "--top-k", "32", *window)
    assert 0.5 < top["floor"]["captured"] < 1

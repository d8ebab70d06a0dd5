"""Equal numbers from `llama-perplexity --kl-divergence` where that program is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketquant.eval import compare

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
CONTEXT = 128


@pytest.fixture
def peer() -> str:
    program = shutil.which("llama-perplexity")
    if program is None:
        pytest.skip("no llama-perplexity on the PATH; build it from llama.cpp")
    return program


def test_numbers_are_those_of_llama_perplexity(
    peer: str, demo_gguf: Callable[[str], Path], demo_text: Path, tmp_path: Path
) -> None:
    model, reference, logits = demo_gguf("q4_k_m"), demo_gguf("f32"), tmp_path / "logits.bin"

    def run(*arguments: str | Path) -> str:
        command = [peer, "-c", str(CONTEXT), "-b", str(CONTEXT), "-t", "1", "--kl-divergence-base", logits, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    base = run("-m", reference, "-f", demo_text, "--chunks", "60")
    said = run("-m", model, "--kl-divergence")

    def value(name: str) -> float:
        found = re.search(rf"{re.escape(name)}\s*:\s*([-\d.]+)", said)
        assert found, said
        return float(found[1])

    report = compare(model, reference, demo_text, context=CONTEXT, chunks=60)
    metrics = report.metrics
    perplexity = re.search(r"PPL = ([\d.]+)", base)
    assert perplexity, base
    assert metrics.ppl.reference == pytest.approx(float(perplexity[1]), rel=1e-4)
    # the program may be built from another llama.cpp than the binding, whose kernels round activations otherwise
    assert metrics.ppl.model == pytest.approx(value("Mean PPL(Q)"), rel=2e-3)
    assert metrics.kld.mean == pytest.approx(value("Mean    KLD"), rel=0.02)
    assert metrics.kld.median == pytest.approx(value("Median  KLD"), rel=0.03)
    assert metrics.kld.p99 == pytest.approx(value("99.0%   KLD"), rel=0.1)
    assert 100 * metrics.top1.mean == pytest.approx(value("Same top p"), abs=0.5)

"""Equal numbers from `llama-perplexity --kl-divergence` where that program is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocketquant.eval import compare

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
CONTEXT, CHUNKS = 128, 60


@pytest.fixture
def peer() -> str:
    program = shutil.which("llama-perplexity")
    if program is None:
        pytest.skip("no llama-perplexity on the PATH; build it from llama.cpp")
    return program


def run_peer(peer: str, model: Path, reference: Path, text: Path, logits: Path) -> tuple[str, str]:
    """What the base pass and the compare pass say.

    The program writes from a thread of its own and now and then ends before its last lines are out; ask again then.
    """
    options = ["-c", str(CONTEXT), "-b", str(CONTEXT), "-t", "1", "--kl-divergence-base", logits]

    def run(last_words: str, *arguments: str | Path) -> str:
        for _ in range(8):
            done = subprocess.run([peer, *options, *arguments], capture_output=True, text=True, check=True)
            if last_words in done.stdout + done.stderr:
                return done.stdout + done.stderr
        pytest.skip(f"llama-perplexity lost its last lines, with {last_words!r} among them, eight times")

    base = run("Final estimate", "-m", reference, "-f", text, "--chunks", str(CHUNKS))
    return base, run("Same top p:", "-m", model, "--kl-divergence")


def read_value(said: str, name: str) -> float:
    found = re.search(rf"{re.escape(name)}\s*:\s*([-\d.]+)", said)
    assert found, said
    return float(found[1])


def test_numbers_are_those_of_llama_perplexity(
    peer: str, demo_gguf: Callable[[str], Path], demo_text: Path, tmp_path: Path
) -> None:
    model, reference = demo_gguf("q4_k_m"), demo_gguf("f32")
    base, said = run_peer(peer, model, reference, demo_text, tmp_path / "logits.bin")
    metrics = compare(model, reference, demo_text, context=CONTEXT, chunks=CHUNKS).metrics
    perplexity = re.search(r"PPL = ([\d.]+)", base)
    assert perplexity, base
    assert metrics.ppl.reference == pytest.approx(float(perplexity[1]), rel=1e-4)
    # the program may be built from another llama.cpp than the binding, whose kernels round activations otherwise
    assert metrics.ppl.model == pytest.approx(read_value(said, "Mean PPL(Q)"), rel=2e-3)
    assert metrics.kld.mean == pytest.approx(read_value(said, "Mean    KLD"), rel=0.02)
    assert metrics.kld.median == pytest.approx(read_value(said, "Median  KLD"), rel=0.03)
    assert metrics.kld.p99 == pytest.approx(read_value(said, "99.0%   KLD"), rel=0.1)
    assert 100 * metrics.top1.mean == pytest.approx(read_value(said, "Same top p"), abs=0.5)


def test_every_digit_is_that_of_llama_perplexity_over_one_library(
    peer: str, demo_gguf: Callable[[str], Path], demo_text: Path, tmp_path: Path
) -> None:
    folder = Path(peer).resolve().parent
    if not (folder / "libllama.so").exists():
        pytest.skip("llama-perplexity has no libllama.so beside it; build it with -DBUILD_SHARED_LIBS=ON")
    model, reference = demo_gguf("q4_k_m"), demo_gguf("f32")
    _, said = run_peer(peer, model, reference, demo_text, tmp_path / "logits.bin")

    def run_ours(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, Path(__file__).with_name("eval_with_library.py"), model, "--reference", reference]
        command += ["--text", demo_text, "--context", str(CONTEXT), "--chunks", str(CHUNKS), "--threads", "2"]
        done = subprocess.run(
            [*map(str, command), "--json", *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"LLAMA_CPP_LIB_PATH": str(folder)},
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)["metrics"]
        return found

    alike, exact = run_ours("--like", "llama-perplexity"), run_ours()
    kld, delta_p, ppl = alike["kld"], alike["delta_p"], alike["ppl"]
    printed = {
        "Mean PPL(Q)": ppl["model"],
        "Mean PPL(base)": ppl["reference"],
        "Mean PPL(Q)/PPL(base)": ppl["ratio"],
        "Mean    KLD": kld["mean"],
        "Maximum KLD": kld["max"],
        "99.9%   KLD": kld["p999"],
        "99.0%   KLD": kld["p99"],
        "90.0%   KLD": kld["p90"],
        "Median  KLD": kld["median"],
    }
    for name, ours in printed.items():
        assert ours == pytest.approx(read_value(said, name), abs=1.5e-6, rel=1e-6), name
    shares = {"Mean    Δp": delta_p["mean"], "RMS Δp": delta_p["rms"], "Same top p": alike["top1"]["mean"]}
    shares |= {f"{percent:.1f}%   Δp": delta_p[f"p{percent}"] for percent in (99, 95, 90, 75, 25, 10)}
    shares |= {f" {percent:.1f}%   Δp": delta_p[f"p{percent}"] for percent in (5, 1)} | {"Median  Δp": delta_p["p50"]}
    for name, ours in shares.items():
        assert 100 * ours == pytest.approx(read_value(said, name), abs=1.5e-3), name
    # what the 16 bits and exp(-16) cost
    assert exact["kld"]["mean"] == pytest.approx(kld["mean"], abs=3e-5, rel=0.01)
    assert exact["ppl"]["reference"] == pytest.approx(ppl["reference"], rel=1e-4)
    assert exact["kld"]["mean"] != kld["mean"]

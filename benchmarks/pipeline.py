"""Checkpoint -> file against llama.cpp's converter followed by its quantizer, side by side, whole processes.

    python benchmarks/pipeline.py [0.8B|4B] [--repeats N]

Makes a synthetic checkpoint of the real model's shapes (random BF16 weights) and measures, in turn: one-pass Q4_K_M and
Q8_0 against the peer's two steps with the same threads, and conversion to BF16 against `cp`. Wall and CPU seconds and
peak memory (largest resident set of the steps) are the operating system's; the figure to quote is the ratio of medians.
Needs .venv-peers (`make peers`) for the peer's converter; that row is left out where it is absent.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from checkpoint_maker import make_sparse_checkpoint, text_config  # noqa: E402

COMMAND = str(Path(sys.executable).with_name("pocketquant"))
PEER_PYTHON = ROOT / ".venv-peers/bin/python"
CONVERTER = ROOT / "tests/peers/llama_convert.py"
QUANTIZER = """
import ctypes, sys, llama_cpp.llama_cpp as llama
params = llama.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), int(sys.argv[4])
sys.exit(llama.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""
SHAPES = {
    "0.8B": {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "linear_num_value_heads": 16}
    | {"num_attention_heads": 8, "num_key_value_heads": 2},
    "4B": {"hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "linear_num_value_heads": 32}
    | {"num_attention_heads": 16, "num_key_value_heads": 4},
}


@dataclass(frozen=True)
class Cost:
    """What one or more processes took: seconds, bytes."""

    wall: float
    cpu: float
    peak_bytes: int

    def then(self, after: Cost) -> Cost:
        return Cost(self.wall + after.wall, self.cpu + after.cpu, max(self.peak_bytes, after.peak_bytes))


def run(*command: object) -> Cost:
    """Runs a command to its end; SystemExit with its words if it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as talk:
        process = subprocess.Popen([str(part) for part in command], stdout=talk, stderr=talk)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            talk.seek(0)
            raise SystemExit(f"{command[0]} failed:\n{talk.read()[-2000:]}")
    return Cost(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def make_checkpoint(folder: Path, size: str) -> Path:
    """A checkpoint of the real shapes; gaussian weights, one mebibyte of them over and over."""
    config = text_config(
        **SHAPES[size],
        head_dim=256,
        linear_num_key_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        layer_types=None,
        full_attention_interval=4,
        vocab_size=248320,
    )
    make_sparse_checkpoint(folder, config, prefix="model.")
    path = folder / "model.safetensors"
    values = np.random.default_rng(0).standard_normal(1 << 19, dtype=np.float32) * 0.02
    block = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    with open(path, "r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        remaining = path.stat().st_size - start
        file.seek(start)
        while remaining > 0:
            remaining -= file.write(block[: min(len(block), remaining)])
    return folder


def peer(checkpoint: Path, work: Path, file_type: int, threads: int) -> Cost:
    """llama.cpp's converter to BF16, then its quantizer."""
    first = run(PEER_PYTHON, CONVERTER, checkpoint, work, "bf16")
    quantizer = [sys.executable, "-c", QUANTIZER, work / "theirs-bf16.gguf", work / "theirs.gguf", file_type, threads]
    return first.then(run(*quantizer))


def median(costs: list[Cost]) -> Cost:
    return Cost(*(statistics.median(getattr(cost, field) for cost in costs) for field in ("wall", "cpu", "peak_bytes")))


def main(arguments: list[str]) -> None:
    size = next((argument for argument in arguments if argument in SHAPES), "0.8B")
    repeats = int(arguments[arguments.index("--repeats") + 1]) if "--repeats" in arguments else 3
    threads = len(os.sched_getaffinity(0))
    results = {}
    with tempfile.TemporaryDirectory(dir=ROOT / "build" if (ROOT / "build").exists() else None) as name:
        work = Path(name)
        checkpoint = make_checkpoint(work / "checkpoint", size)
        ours = work / "ours.gguf"
        run(COMMAND, "quantize", checkpoint, "--out", ours, "--recipe", "q4_k_m")  # compiles and warms the cache
        print(f"{size} shapes, {threads} threads, medians of {repeats}; ratios are theirs / ours")
        print("| job | wall | CPU | peak memory | ours: wall s, CPU s, peak MB |")
        print("|---|---:|---:|---:|---|")
        jobs = {"q4_k_m": 15, "q8_0": 7} if PEER_PYTHON.exists() else {}
        for recipe, file_type in jobs.items():
            pairs = [
                (
                    run(COMMAND, "quantize", checkpoint, "--out", ours, "--recipe", recipe, "--threads", threads),
                    peer(checkpoint, work, file_type, threads),
                )
                for _ in range(repeats)
            ]
            results[recipe] = show(f"checkpoint to {recipe}", pairs)
        copies = [
            (
                run(COMMAND, "convert", checkpoint, "--out", ours, "--threads", threads),
                run("cp", checkpoint / "model.safetensors", work / "copy"),
            )
            for _ in range(repeats)
        ]
        results["bf16"] = show("checkpoint to bf16, against `cp`", copies)
    if "--json" in arguments:
        print(json.dumps(results))


def show(job: str, pairs: list[tuple[Cost, Cost]]) -> dict[str, float]:
    ours, theirs = median([pair[0] for pair in pairs]), median([pair[1] for pair in pairs])
    ratios = {
        field: getattr(theirs, field) / max(getattr(ours, field), 1e-9) for field in ("wall", "cpu", "peak_bytes")
    }
    own = f"{ours.wall:.1f}, {ours.cpu:.1f}, {ours.peak_bytes / 1e6:.0f}"
    print(f"| {job} | {ratios['wall']:.2f} | {ratios['cpu']:.2f} | {ratios['peak_bytes']:.2f} | {own} |", flush=True)
    return ratios


if __name__ == "__main__":
    main(sys.argv[1:])

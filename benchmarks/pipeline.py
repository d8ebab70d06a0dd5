"""Checkpoint -> file against llama.cpp's converter followed by its quantizer, side by side, whole processes.

Measured in turn: one-pass Q4_K_M and Q8_0 against the peer's two steps with the same threads; conversion to BF16
against `cp`, which does not wait for the disk as we do, and against `cp` and `sync`; all threads against one. Every
output is a new file, and the source is in the page cache as far as it fits. Needs .venv-peers (`make peers`) for the
peer's converter; those rows are left out where it is absent.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from processes import COMMAND, Cost, Row, compare, run, run_in_turn

ROOT = Path(__file__).parent.parent
PEER_PYTHON = ROOT / ".venv-peers/bin/python"
CONVERTER = ROOT / "tests/peers/llama_convert.py"
QUANTIZER = """
import ctypes, sys, llama_cpp.llama_cpp as llama
params = llama.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), int(sys.argv[4])
sys.exit(llama.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""
RECIPES = {"q4_k_m": ("Q4_K_M", 15), "q8_0": ("Q8_0", 7)}
"""Recipe -> its name, and llama.cpp's number for the same (`llama_ftype`)."""


def measure(checkpoint: Path, work: Path, size: str, repeats: int) -> Iterator[Row]:
    """The rows, one after the other; `work` is on the disk to measure."""
    threads = len(os.sched_getaffinity(0))
    for recipe in RECIPES:  # compiles the kernels
        quantize(checkpoint, work, recipe, threads)
    if PEER_PYTHON.exists():
        for recipe, (name, file_type) in RECIPES.items():
            yield compare(
                f"{size} checkpoint to {name}, {threads} threads",
                "llama.cpp's converter, then its quantizer",
                *run_in_turn(
                    repeats,
                    lambda recipe=recipe: quantize(checkpoint, work, recipe, threads),
                    lambda file_type=file_type: convert_and_quantize(checkpoint, work, file_type, threads),
                ),
            )
    else:
        print(
            f"{PEER_PYTHON} is absent (`make peers` makes it): no rows against llama.cpp's converter", file=sys.stderr
        )
    source, copied = checkpoint / "model.safetensors", work / "copy"
    ours, theirs, synced = run_in_turn(
        repeats,
        lambda: _to_new_file(work / "ours.gguf", COMMAND, "convert", checkpoint, "--threads", threads, "--out"),
        lambda: _to_new_file(copied, "cp", source),
        lambda: _to_new_file(copied, "sh", "-c", 'cp "$0" "$1" && sync "$1"', source),
    )
    yield compare(f"{size} checkpoint to BF16", "`cp`", ours, theirs, memory=False)
    yield compare(f"{size} checkpoint to BF16", "`cp` and `sync`", ours, synced, memory=False)
    if threads > 1:
        yield from measure_scaling(checkpoint, work, size, repeats, threads)


def quantize(checkpoint: Path, work: Path, recipe: str, threads: int) -> Cost:
    """Ours, from the checkpoint in one pass."""
    command = (COMMAND, "quantize", checkpoint, "--recipe", recipe, "--threads", threads, "--out")
    return _to_new_file(work / "ours.gguf", *command)


def convert_and_quantize(checkpoint: Path, work: Path, file_type: int, threads: int) -> Cost:
    """llama.cpp's converter to BF16, then its quantizer."""
    converted, quantized = work / "theirs-bf16.gguf", work / "theirs.gguf"
    try:
        first = run(PEER_PYTHON, CONVERTER, checkpoint, work, "bf16")
        return first.then(run(sys.executable, "-c", QUANTIZER, converted, quantized, file_type, threads))
    finally:
        converted.unlink(missing_ok=True)
        quantized.unlink(missing_ok=True)


def measure_scaling(checkpoint: Path, work: Path, size: str, repeats: int, threads: int) -> Iterator[Row]:
    """All threads against one of ours: the whole command, and the writing alone, which is what threads share."""
    from pocketquant import open_model, open_recipe, plan, write

    for recipe, (name, _) in RECIPES.items():
        both = run_in_turn(
            repeats,
            lambda recipe=recipe: quantize(checkpoint, work, recipe, threads),
            lambda recipe=recipe: quantize(checkpoint, work, recipe, 1),
        )
        yield compare(f"{size} to {name}, {threads} threads", "1 thread", *both, memory=False)
        planned = plan(open_model(checkpoint), open_recipe(recipe))

        def write_with(n_threads: int) -> Cost:
            wall, cpu = time.perf_counter(), time.process_time()
            write(planned, work / "ours.gguf", threads=n_threads)  # noqa: B023 used at once
            cost = Cost(time.perf_counter() - wall, time.process_time() - cpu, 1, 1)
            (work / "ours.gguf").unlink()
            return cost

        write_with(threads)
        both = run_in_turn(repeats, lambda: write_with(threads), lambda: write_with(1))
        yield compare(f"the same without starting and planning, {name}", "1 thread", *both, memory=False)


def _to_new_file(out: Path, *command: object) -> Cost:
    """Runs a command that takes the path of its output last; the output is new and does not stay."""
    try:
        return run(*command, out)
    finally:
        out.unlink(missing_ok=True)

"""How far apart the figures of one file are on different kernels of llama.cpp: the floor that `gate` goes by.

    python benchmarks/kernels_floor.py [--library DIR ...] [--chunks N]

The embedded model in several recipes is evaluated with the installed library, with the same without its extra kernels,
and with each other build of it, in a folder made by `pip install --target DIR --no-deps llama-cpp-python` under other
CMAKE_ARGS. Same text, same windows: what differs is the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RECIPES = ("q8_0", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs")
PLAIN = "from pocketquant.llama import trial\nfound = trial.Trial(True, False)\ntrial.trusted = lambda: found\n"
MAIN = "from pocketquant.cli import main\nmain()"
METRICS = {
    "KL divergence": ("kld", "mean", True),
    "its 99th percentile": ("kld", "p99", True),
    "total variation": ("tv", "mean", True),
    "same top token": ("top1", "mean", False),
    "top 5": ("top5", "mean", False),
    "bits per byte": ("bpb", "difference", False),
}
"""Column -> where a report has it, and whether two are compared by their ratio or by their difference."""


def evaluate(model: Path, reference: Path, chunks: int, *, code: str, library: Path | None) -> dict[str, Any]:
    """A report of the embedded evaluation text."""
    from pocketquant.demo import text_path

    places = [str(library)] if library else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])}
    words = ["eval", model, "--reference", reference, "--text", text_path("evaluation"), "--chunks", chunks, "--json"]
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, action="append", default=[])
    parser.add_argument("--chunks", type=int, default=32)
    options = parser.parse_args()
    from pocketquant import open_model, open_recipe, plan, write
    from pocketquant.demo import checkpoint_dir

    runs = [(MAIN, None), (PLAIN + MAIN, None), *((MAIN, library) for library in options.library)]
    print(f"| file | kernels | {' | '.join(METRICS)} |")
    print("|---|---" * 1 + "|---:" * len(METRICS) + "|")
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for recipe in ("f32", *RECIPES):
            files[recipe] = Path(folder, f"{recipe}.gguf")
            write(plan(open_model(checkpoint_dir()), open_recipe(recipe)), files[recipe])
        for recipe in RECIPES:
            first: dict[str, Any] = {}
            for code, library in runs:
                report = evaluate(files[recipe], files["f32"], options.chunks, code=code, library=library)
                first = first or report
                versions = report["provenance"]["versions"]
                features = "AVX-512" if "AVX512 = 1" in versions["llama_cpp_features"] else "without AVX-512"
                cells = [_compared(report, first, *place) for place in METRICS.values()]
                print(f"| {recipe} | {versions['llama_cpp_kernels']}, {features} | {' | '.join(cells)} |", flush=True)


def _compared(report: dict[str, Any], first: dict[str, Any], metric: str, value: str, is_ratio: bool) -> str:
    ours, theirs = report["metrics"][metric][value], first["metrics"][metric][value]
    if report is first:
        return f"{ours:.6f}"
    return f"x {ours / theirs:.5f}" if is_ratio else f"{ours - theirs:+.6f}"


if __name__ == "__main__":
    main()

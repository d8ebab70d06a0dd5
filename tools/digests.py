"""Makes twenty files from the checkpoint that comes with the package, and prints the SHA-256 of each.

Run before and after a change that must not alter a byte: `PYTHONPATH=. python tools/digests.py > before.txt`. Matrices
and statistics depend on llama.cpp's kernels, so both lists must come from one machine.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pocketquant.demo import checkpoint_dir, text_path

RECIPES = (
    "pocket_4bit",
    "pocket_5bit",
    "pocket_8bit",
    "q4_k_m",
    "q4_k_s",
    "q5_k_m",
    "iq4_xs",
    "iq4_nl",
    "q6_k",
    "q4_0",
)


def commands(folder: Path) -> Iterator[tuple[str, list[str | Path]]]:
    """Name of the file -> the command line that makes it. Later ones use the files of earlier ones."""
    source, text = checkpoint_dir(), text_path("calibration")
    for kind in ("f32", "bf16", "f16"):
        yield f"{kind}.gguf", ["convert", source, "--type", kind]
    for recipe in RECIPES:
        yield f"{recipe}.gguf", ["quantize", source, "--recipe", recipe]
    short: list[str | Path] = ["--text", text, "--context", "128", "--chunks", "4"]
    yield "matrix.gguf", ["imatrix", folder / "f32.gguf", *short]
    yield "statistics.stats", ["calibrate", source, *short]
    weighted: list[str | Path] = ["quantize", source, "--imatrix", folder / "matrix.gguf"]
    yield "weighted.gguf", [*weighted, "--recipe", "q4_k_m"]
    yield "size.gguf", [*weighted, "--target-size", "2.6MB"]
    yield "bits.gguf", [*weighted, "--target-bpw", "4.8", "--device", "any"]
    rounded: list[str | Path] = ["quantize", source, "--stats", folder / "statistics.stats"]
    yield "two-sided.gguf", [*rounded, "--recipe", "pocket_4bit"]
    yield "feedback.gguf", [*rounded, "--recipe", "q4_k_m", "--rounding", "feedback"]
    yield "pack.pqref", ["reference", folder / "f32.gguf", *short]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, command in commands(folder):
            line = [sys.executable, "-m", "pocketquant", *map(str, command), "--out", str(folder / file), "--quiet"]
            subprocess.run(line, check=True)
            print(hashlib.sha256((folder / file).read_bytes()).hexdigest(), file, flush=True)


if __name__ == "__main__":
    main()

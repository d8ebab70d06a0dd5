"""KL divergence of a file against its reference: ours against llama-perplexity's base pass and compare pass.

    python benchmarks/evaluation.py [--peer DIR] [--repeats N] [--context N] [--chunks N] [--threads N]
                                    [--model GGUF --reference GGUF --text FILE]

Whole processes in turn on the same files, text and threads: one of ours, two of theirs with a file of logits between
them. Without files of your own: the embedded model, Q4_K_M against F32, on its evaluation text. Wall and CPU seconds,
peak memory and the bytes of the file of logits; the figure to quote is the ratio of medians. llama-perplexity is looked
for on the PATH or in DIR; without it there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from processes import COMMAND, Cost, Row, compare, run, run_in_turn, to_markdown


def make_demo(folder: Path) -> tuple[Path, Path, Path]:
    """The embedded model in Q4_K_M and F32, and its text."""
    from pocketquant.demo import checkpoint_dir, text_path

    files = []
    for recipe in ("q4_k_m", "f32"):
        files.append(folder / f"demo-{recipe}.gguf")
        run(COMMAND, "quantize", checkpoint_dir(), "--out", files[-1], "--recipe", recipe, "--quiet")
    return files[0], files[1], text_path("evaluation")


def time_ours(files: tuple[Path, Path, Path], context: int, chunks: int, threads: int) -> Cost:
    model, reference, text = files
    sizes = ["--context", context, "--chunks", chunks, "--threads", threads]
    return run(COMMAND, "eval", model, "--reference", reference, "--text", text, *sizes, "--quiet")


def time_theirs(
    peer: Path, files: tuple[Path, Path, Path], context: int, chunks: int, threads: int, logits: Path
) -> Cost:
    model, reference, text = files
    options = ["-c", context, "-t", threads, "--kl-divergence-base", logits]
    base = run(peer, "-m", reference, "-f", text, "--chunks", chunks, *options)
    return base.then(run(peer, "-m", model, "--kl-divergence", *options))


def measure(
    repeats: int,
    *,
    peer: Path | None = None,
    files: tuple[Path, Path, Path] | None = None,
    context: int = 512,
    chunks: int = 100,
    threads: int | None = None,
) -> Iterator[Row]:
    """The one row, none without llama-perplexity; `files` are model, reference and text."""
    found = peer / "llama-perplexity" if peer else shutil.which("llama-perplexity")
    if found is None:
        print("no llama-perplexity on the PATH: no row for the evaluation", file=sys.stderr)
        return
    sizes = (context, chunks, threads or len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as name:
        chosen = files or make_demo(Path(name))
        run(COMMAND, "eval", chosen[0], "--reference", chosen[1], "--text", chosen[2], "--chunks", 1)  # compiles
        ours, theirs = run_in_turn(
            repeats,
            lambda: time_ours(chosen, *sizes),
            lambda: time_theirs(Path(found), chosen, *sizes, Path(name) / "logits.bin"),
        )
    job = f"KL divergence, {chosen[0].stem}, up to {chunks} windows of {context}, {sizes[2]} threads"
    yield compare(job, "llama-perplexity, both passes", ours, theirs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--threads", type=int)
    for name in ("--model", "--reference", "--text"):
        parser.add_argument(name, type=Path)
    asked = parser.parse_args()
    given = (asked.model, asked.reference, asked.text)
    rows = measure(
        asked.repeats,
        peer=asked.peer,
        files=given if all(given) else None,
        context=asked.context,
        chunks=asked.chunks,
        threads=asked.threads,
    )
    print(to_markdown(list(rows)), end="")


if __name__ == "__main__":
    main()

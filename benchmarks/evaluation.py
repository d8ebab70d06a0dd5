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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from processes import COMMAND, Cost, median, run


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


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    for name in ("--model", "--reference", "--text"):
        parser.add_argument(name, type=Path)
    asked, _ = parser.parse_known_args(arguments)
    found = asked.peer / "llama-perplexity" if asked.peer else shutil.which("llama-perplexity")
    if found is None:
        print("evaluation: no llama-perplexity on the PATH; left out")
        return
    with tempfile.TemporaryDirectory() as name:
        work, logits = Path(name), Path(name) / "logits.bin"
        given = (asked.model, asked.reference, asked.text)
        files = given if all(given) else make_demo(work)
        sizes = (asked.context, asked.chunks, asked.threads)
        run(COMMAND, "eval", files[0], "--reference", files[1], "--text", files[2], "--chunks", 1)  # compiles
        pairs = [
            (time_ours(files, *sizes), time_theirs(Path(found), files, *sizes, logits)) for _ in range(asked.repeats)
        ]
        stored = logits.stat().st_size
    ours, theirs = median([pair[0] for pair in pairs]), median([pair[1] for pair in pairs])
    print(f"KL divergence, {files[0].name} against {files[1].name}, context {sizes[0]}, up to {sizes[1]} windows,")
    print(f"{sizes[2]} threads, medians of {asked.repeats}; ratios are theirs / ours")
    print("| | wall s | CPU s | peak MB | stored MB |")
    print("|---|---:|---:|---:|---:|")
    for who, cost, megabytes in (("ours", ours, 0.0), ("theirs, both passes", theirs, stored / 1e6)):
        print(f"| {who} | {cost.wall:.1f} | {cost.cpu:.1f} | {cost.peak_bytes / 1e6:.0f} | {megabytes:.0f} |")
    ratios = (theirs.wall / ours.wall, theirs.cpu / ours.cpu, theirs.peak_bytes / ours.peak_bytes)
    print(f"| ratio | {ratios[0]:.2f} | {ratios[1]:.2f} | {ratios[2]:.2f} | |")


if __name__ == "__main__":
    main(sys.argv[1:])

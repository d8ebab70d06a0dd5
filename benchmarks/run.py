"""`make bench`: one table of ratios against llama.cpp and `cp`, measured side by side on this machine.

    python benchmarks/run.py [--size 0.8B|4B] [--repeats N] [--only kernels|pipeline|evaluation] [--write FILE]

`--write` puts the table between the lines `<!-- bench -->` and `<!-- /bench -->` of a file. A synthetic checkpoint is
made in build/, or in --work: 1.5 GB and as much again for 0.8B, 8.4 GB and 20 GB more for 4B.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import evaluation
import kernels
import pipeline
from checkpoints import SHAPES, make_checkpoint
from processes import Row, to_markdown

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"


def describe_machine() -> str:
    """Processor, memory and versions, to stand under the table."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    peers = [f"llama-cpp-python {version('llama-cpp-python')}"]
    if pipeline.PEER_PYTHON.exists():
        release = pipeline.PEER_PYTHON.parent.parent / "llama.cpp/RELEASE"
        peers.append(f"the converter of {release.read_text().strip()}")
    return (
        f"{processor}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GB of memory, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, numba {version('numba')}, "
        f"{', '.join(peers)}"
    )


def replace_block(path: Path, text: str) -> None:
    """Puts `text` between the two marks of a file; SystemExit if they are not there once each."""
    content = path.read_text(encoding="utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(BEGIN) > content.index(END):
        raise SystemExit(f"{path}: must hold one line {BEGIN} and, below it, one line {END}")
    before, after = content[: content.index(BEGIN)], content[content.index(END) :]
    path.write_text(f"{before}{BEGIN}\n{text}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="One table of ratios, measured side by side on this machine.")
    parser.add_argument("--size", choices=sorted(SHAPES), default="0.8B", help="shapes of the synthetic checkpoint")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each job; medians count")
    parser.add_argument("--only", choices=("kernels", "pipeline", "evaluation"), help="a part of the table")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the table in this file")
    parser.add_argument("--work", type=Path, default=ROOT / "build", help="folder on the disk to measure")
    arguments = parser.parse_args()
    if arguments.write:
        replace_block(arguments.write, "(being measured)\n")  # now rather than in an hour, if it cannot be written
    rows: list[Row] = []
    if arguments.only in (None, "kernels"):
        rows += kernels.measure_formats(kernels.NAMES)
    if arguments.only in (None, "evaluation"):
        rows += evaluation.measure(arguments.repeats)
    if arguments.only in (None, "pipeline"):
        arguments.work.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=arguments.work) as name:
            checkpoint = make_checkpoint(Path(name) / "checkpoint", arguments.size)
            for row in pipeline.measure(checkpoint, Path(name), arguments.size, arguments.repeats):
                rows.append(row)
                print(to_markdown([row]).splitlines()[-1], file=sys.stderr, flush=True)
    text = (
        f"{to_markdown(rows)}\nTheirs divided by ours, medians of {arguments.repeats} runs taken in turn; above 1 is "
        f"faster, or less. {describe_machine()}.\n"
    )
    print(text, end="")
    if arguments.write:
        replace_block(arguments.write, f"\n{text}\n")


if __name__ == "__main__":
    main()

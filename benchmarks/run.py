"""`make bench`: every table of ratios against llama.cpp, measured side by side on this machine.

python benchmarks/run.py [0.8B|4B]
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import kernels
import pipeline


def describe_machine() -> str:
    """Processor, cores and versions, for the head of the tables."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    processor = f"{names[0]}, {len(names)} cores" if names else platform.processor()
    return f"{processor}; Python {platform.python_version()}, llama-cpp-python {version('llama-cpp-python')}"


if __name__ == "__main__":
    print(describe_machine(), end="\n\n")
    kernels.main([])
    print()
    pipeline.main(sys.argv[1:])

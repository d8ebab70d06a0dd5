"""Compiled kernels: cached, thrown away when any kernel's source changes, and no cache needed at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pocketquant
from pocketquant.formats import FORMATS

CODE = """
import sys, numpy as np
from pocketquant.formats import FORMATS, half
rows = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
print(FORMATS["Q8_0"].encode(rows).tobytes().hex())
half.f16_bits(np.float32(1.0))
print(len(half.f16_bits.stats.cache_hits))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package that a test may change."""
    shutil.copytree(Path(pocketquant.__file__).parent, tmp_path / "pocketquant", ignore=shutil.ignore_patterns("*.nb*"))
    return tmp_path / "pocketquant"


def run(package: Path, **environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=package.parent,
        env={**os.environ, "PYTHONPATH": str(package.parent), **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_second_run_compiles_nothing_until_a_source_changes(package: Path) -> None:
    first, second = run(package), run(package)
    assert (first[1], second[1]) == ("0", "1")
    assert first[0] == second[0]
    with open(package / "formats" / "lanes.py", "a") as file:
        file.write("# changed\n")
    assert run(package)[1] == "0"


def test_works_where_no_cache_can_be_written(package: Path) -> None:
    locator = "NUMBA_CACHE_LOCATOR_CLASSES"
    rows = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
    assert run(package, **{locator: "IPythonCacheLocator"})[0] == FORMATS["Q8_0"].encode(rows).tobytes().hex()

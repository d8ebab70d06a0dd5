"""The flags that `make setup` builds llama-cpp-python with: by what a compiler does, not by its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "llama_build_flags.py"
DROPS = "load:\n\tpxor %xmm0, %xmm0\n\tmovaps %xmm0, -64(%rsp)\n\tldtilecfg -64(%rsp)\n\tret\n"
KEEPS = DROPS.replace("\tldtilecfg", "\tmovb %dil, -48(%rsp)\n\tldtilecfg")


def flags_for(compiler: Path | str) -> str:
    environment = os.environ | {"CXX": str(compiler)}
    return subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, check=True, env=environment
    ).stdout.strip()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (f"cat <<'E'\n{DROPS}\nE", "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"),
        (f"cat <<'E'\n{KEEPS}\nE", ""),
        ("echo 'unrecognized option -mamx-tile' >&2; exit 1", ""),
    ],
)
def test_what_a_compiler_makes_decides(script: str, expected: str, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\ncat >/dev/null\n{script}\n")
    compiler.chmod(0o755)
    assert flags_for(compiler) == expected


def test_no_compiler_needs_no_flags(tmp_path: Path) -> None:
    assert flags_for(tmp_path / "none") == ""

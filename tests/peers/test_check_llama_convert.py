"""Files of llama.cpp's own converter pass the check, against the checkpoint too."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pocketquant import open_model
from pocketquant.check import check_gguf
from pocketquant.demo import checkpoint_dir


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_the_peers_file_is_clean(kind: str, oracle_python: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("llama_convert.py")
    command = [oracle_python, script, checkpoint_dir(), tmp_path, kind]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = check_gguf(tmp_path / f"theirs-{kind}.gguf", open_model(checkpoint_dir()))
    assert (report.findings, len(report.comparisons)) == ((), report.described["tensors"])

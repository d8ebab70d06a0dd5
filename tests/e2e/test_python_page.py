"""The page about Python says what is true: its script runs as it stands, on a small model in the large one's place."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pocketquant
from pocketquant.demo import checkpoint_dir, text_path

PAGE = Path(__file__).parent.parent.parent / "docs/python.md"


def test_the_script_of_the_page_runs(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    script = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    (tmp_path / "Qwen3.5-4B").symlink_to(checkpoint_dir(), target_is_directory=True)
    (tmp_path / "calibration.txt").write_bytes(text_path("calibration").read_bytes())
    (tmp_path / "text.txt").write_bytes(text_path("evaluation").read_bytes())
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of the size, predicted loss" in done.stdout
    assert "q9_k: neither a recipe nor a file" in done.stdout
    assert re.search(r"^True 4b-q4.gguf: \d limits kept, 0 broken", done.stdout, re.MULTILINE)
    made = {"4b.gguf", "4b-q4.gguf", "4b-q8.gguf", "4b-bf16.gguf", "4b-imatrix.gguf", "4b.stats", "report.html"}
    assert made | {"report.md"} <= {path.name for path in tmp_path.iterdir()}
    assert {"report.json", "report.html", "SHA256SUMS"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "never.gguf").exists()


def test_every_function_of_the_table_is_there() -> None:
    named = re.findall(r"^\| `\w+` \| `(\w+)\(([\w, ]+)\)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) == 9
    for name, parameters in named:
        code = getattr(pocketquant, name).__code__
        assert tuple(parameters.split(", ")) == code.co_varnames[: parameters.count(",") + 1], name

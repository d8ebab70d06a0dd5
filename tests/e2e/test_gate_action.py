"""The GitHub Action's own script, run as a runner would, on the embedded model; only the installation is left out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

ACTION = Path(__file__).parent.parent.parent / "action.yml"
VARIABLES = ("MODEL", "REFERENCE", "TEXT", "LIMITS", "BASELINE", "CONTEXT", "CHUNKS", "WEIGHTS", "STRICT", "OUT")


def read_action() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
    return found


def test_every_input_reaches_the_script_as_a_variable_only() -> None:
    action = read_action()
    (step,) = [each for each in action["runs"]["steps"] if each.get("id") == "gate"]
    assert step["env"] == {name: "${{ inputs." + name.lower() + " }}" for name in VARIABLES}
    assert {name.upper() for name in action["inputs"]} == set(VARIABLES)
    for each in action["runs"]["steps"]:
        assert each["shell"] == "bash"
        assert "${{" not in each["run"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_script_judges_and_writes_the_summary(
    demo_gguf: Callable[[str], Path], demo_text: Path, tmp_path: Path
) -> None:
    limits, odd = tmp_path / "limits.toml", tmp_path / "a $(touch x) name.txt"
    odd.write_text(demo_text.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    limits.write_text("[absolute]\nkld_mean = 0.05\n")
    first = run_script(tmp_path, MODEL=demo_gguf("q8_0"), REFERENCE=demo_gguf("f32"), TEXT=f"{odd}\n", LIMITS=limits)
    assert first.returncode == 0, first.stderr
    assert not (tmp_path / "x").exists()
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["windows"], len(report["tensors"])) == (6, 55)
    assert "✅ demo-q8_0.gguf" in (tmp_path / "summary").read_text(encoding="utf-8")
    assert (tmp_path / "output").read_text() == "report=out/report.json\njunit=out/gate.xml\n"

    (tmp_path / "out/report.json").rename(tmp_path / "accepted.json")
    limits.write_text("[baseline]\nkld_mean_ratio = 1.05\ntensor_rmse_ratio = 1.25\n")
    options = {"REFERENCE": demo_gguf("f32"), "TEXT": odd, "LIMITS": limits, "BASELINE": "accepted.json"}
    second = run_script(tmp_path, MODEL=demo_gguf("q4_0"), **options)
    assert second.returncode == 1, second.stderr
    assert "role ffn_up: relative error" in (tmp_path / "summary").read_text(encoding="utf-8")
    (tmp_path / "summary").unlink()
    broken = run_script(tmp_path, MODEL=tmp_path / "absent.gguf", **options)
    assert broken.returncode == 2
    assert "absent.gguf" in broken.stderr
    assert not (tmp_path / "summary").exists()


def run_script(folder: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    (step,) = [each for each in read_action()["runs"]["steps"] if each.get("id") == "gate"]
    defaults = {"BASELINE": "", "CONTEXT": 128, "CHUNKS": 6, "WEIGHTS": "true", "STRICT": "false", "OUT": "out"}
    environment = {name: str(value) for name, value in (defaults | variables).items()}
    environment |= {"GITHUB_STEP_SUMMARY": str(folder / "summary"), "GITHUB_OUTPUT": str(folder / "output")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]]
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment | {"PATH": path}, capture_output=True, text=True
    )

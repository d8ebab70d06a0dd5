"""Dry runs of long commands: time, memory and disk, tried on this machine, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.cli.app import app
from pocketquant.cli.cost import MOST_TRIAL_BYTES, can_try, duration
from pocketquant.cli.options import Talk
from pocketquant.demo import checkpoint_dir, text_path

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write(plan(open_model(checkpoint_dir()), open_recipe("f32")), folder / "f32.gguf")
    return folder / "f32.gguf"


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (("imatrix", "MODEL", "--text", "TEXT", "--chunks", "9", "--out", "x.gguf"), 9),
        (("eval", "MODEL", "--reference", "MODEL", "--text", "TEXT", "--chunks", "9"), 9),
        (("reference", "MODEL", "--text", "TEXT", "--chunks", "9", "--out", "x.pqref"), 9),
        (("calibrate", "MODEL", "--text", "TEXT", "--chunks", "9", "--out", "x.stats"), 9),
        (("calibrate", "CHECKPOINT", "--text", "TEXT", "--chunks", "9", "--out", "x.stats"), 9),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_a_dry_run_tells_the_time_and_leaves_nothing(
    words: tuple[str, ...], steps: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(model), "CHECKPOINT": str(checkpoint_dir()), "TEXT": str(text_path("calibration"))}
    asked = [names.get(word, word) for word in words]
    result = CliRunner().invoke(app, [*asked, "--context", "64", "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["schema"] == f"pocketquant.{words[0]}-plan/1"
    assert (found["steps"], found["unit"]) == (steps, "windows")
    assert 2 < found["tried"] < steps
    assert found["seconds"] > found["seconds_per_step"] > 0
    assert f"about {duration(found['seconds'])} on this machine" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_release_is_told_step_by_step(tmp_path: Path) -> None:
    words = ["make", str(checkpoint_dir()), "--out", str(tmp_path / "out"), "-r", "q8_0", "--context", "64"]
    result = CliRunner().invoke(app, [*words, "--chunks", "9", "--calibrate-chunks", "9", "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found["seconds_by_step"]) == [
        "reference",
        "calibrate",
        "pocket-demo-3.8M-Q8_0.gguf",
        "evaluate q8_0",
    ]
    assert all(seconds > 0 for seconds in found["seconds_by_step"].values())
    assert found["seconds"] == pytest.approx(sum(found["seconds_by_step"].values()), abs=0.001)
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_would_take_too_much_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert can_try(MOST_TRIAL_BYTES, ["text.txt"], Talk())
    assert not can_try(MOST_TRIAL_BYTES + 1, ["text.txt"], Talk())
    assert not can_try(0, ["self"], Talk())
    told = capsys.readouterr().err
    assert "a trial would write 4 GB" in told
    assert "the model would have to write the text" in told


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(seconds) for seconds in (0.4, 89, 90, 5399, 5400, 90000)] == [
        "0 s", "89 s", "2 min", "90 min", "1.5 h", "25.0 h",
    ]  # fmt: skip

"""What a log shows of a long run, and the documents that --json prints."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pocketquant import __version__
from pocketquant.cli import screen
from pocketquant.cli.app import app
from pocketquant.cli.screen import byte_progress, step_progress
from pocketquant.errors import SourceError


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_long_run_writes_lines_where_it_draws_no_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(screen, "LINE_SECONDS", 0.05)
    with step_progress("model.gguf", quiet=False, unit="windows", step=(1, 2)) as advance:
        time.sleep(0.12)  # a first step that takes long
        advance(1, 4)
        time.sleep(0.12)
    with byte_progress("out.gguf", 200, quiet=False) as write:
        write(40)
        write(60)
        time.sleep(0.12)
    lines = lines_of(capsys)
    assert lines[0] == "step 1 of 2, model.gguf: 0 min so far"
    assert "step 1 of 2, model.gguf: 25 % (1 of 4 windows) after 0 min, about 0 min left" in lines
    assert "out.gguf: 50 % (100 B of 200 B) after 0 min, about 0 min left" in lines
    time.sleep(0.12)
    assert lines_of(capsys) == []


def test_what_an_interrupted_run_did_is_no_part_of_the_pace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(screen, "LINE_SECONDS", 0.05)
    with step_progress("inputs", quiet=False, unit="windows") as advance:
        advance(90, 100)
        time.sleep(0.12)
        advance(91, 100)
        time.sleep(0.07)
    lines = lines_of(capsys)
    assert lines[0] == "inputs: 90 % (90 of 100 windows) after 0 min"  # nothing to tell the pace from yet
    assert "inputs: 91 % (91 of 100 windows) after 0 min, about 0 min left" in lines


def test_a_short_or_quiet_run_writes_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with step_progress("model.gguf", quiet=False) as advance:
        advance(1, 1)
    monkeypatch.setattr(screen, "LINE_SECONDS", 0.01)
    with step_progress("model.gguf", quiet=True) as advance:
        time.sleep(0.05)
    assert lines_of(capsys) == []


def document(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    found = json.loads(result.stdout)
    assert list(found)[:2] == ["schema", "version"]
    assert found["version"] == __version__
    return result.exit_code, found


@pytest.mark.parametrize(
    ("arguments", "schema"),
    [
        (("recipe", "list"), "recipe-list"),
        (("inspect", "CHECKPOINT"), "inspect"),
        (("check", "CHECKPOINT"), "check"),
        (("convert", "CHECKPOINT", "--dry-run"), "convert"),
        (("quantize", "CHECKPOINT", "--dry-run"), "quantize"),
        (("weights", "CHECKPOINT", "--reference", "CHECKPOINT"), "weights"),
        (("make", "CHECKPOINT", "--out", "OUT", "--dry-run"), "make-plan"),
        (("sweep", "CHECKPOINT", "--recipe", "q8_0", "--out", "OUT", "--dry-run"), "sweep-plan"),
    ],
)
def test_every_document_says_what_it_is(
    arguments: tuple[str, ...], schema: str, checkpoint: Path, tmp_path: Path
) -> None:
    words = {"CHECKPOINT": str(checkpoint), "OUT": str(tmp_path / "out")}
    code, found = document(*(words.get(word, word) for word in arguments))
    assert (code, found["schema"]) == (0, f"pocketquant.{schema}/1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gate",), "Missing argument"),
        (("gat",), "No such command"),
        (("convert", "x", "--type", "q4"), "bf16, f16 or f32"),
        (("recipe", "list", "--nope"), "No such option"),
    ],
)
def test_a_mistake_in_the_command_line_is_a_document_too(arguments: tuple[str, ...], message: str) -> None:
    code, found = document(*arguments)
    assert (code, found["schema"], found["error"]["exit_code"]) == (2, "pocketquant.error/1", 2)
    assert found["error"]["kind"] == "UsageError"
    assert message in found["error"]["message"]


def test_an_error_is_a_document_too(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "absent"), "--json"])
    assert isinstance(result.exception, SourceError)
    found = json.loads(result.stdout)
    assert found["command"] == "inspect"
    assert found["error"] == {"kind": "SourceError", "message": str(result.exception), "exit_code": 2}


def test_without_json_stdout_stays_empty(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["inspect", str(tmp_path / "absent")]).stdout == ""
    assert CliRunner().invoke(app, ["gate"]).stdout == ""


def test_help_keeps_words_in_brackets_and_gives_flags_no_type() -> None:
    text = CliRunner().invoke(app, ["gate", "--help"]).stdout
    assert "[absolute] and [baseline]" in text
    assert "bool" not in text.lower()

"""The command line itself: one screen of commands, help in panels, modes, old names, and completion by a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from pocketquant import __version__
from pocketquant.cli.app import PANELS, app
from pocketquant.cli.group import OTHER, panels_of, spellings

FIRST_SCREEN = {
    "Make a file": ["make", "quantize", "convert", "demo"],
    "Prepare": ["imatrix", "calibrate", "reference", "recipe"],
    "Measure": ["eval", "compare", "gate", "check"],
    "Ship": ["report", "inspect", "split", "doctor"],
}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def shown(*words: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == exit_code, result.output
    return result.output


def test_the_first_help_is_one_screen_of_plain_text() -> None:
    for words in (("--help",), ("-h",), ("help",)):
        lines = shown(*words).splitlines()
        assert len(lines) < 24
        assert max(map(len, lines)) <= 80
        assert all(character.isprintable() for line in lines for character in line)
        found: dict[str, list[str]] = {}
        panel = ""
        for line in lines[2:-1]:
            if line.startswith("  "):
                found[panel].append(line.split()[0])
            else:
                panel = line
                found[panel] = []
        assert found == FIRST_SCREEN


def test_the_other_commands_are_listed_by_help_all() -> None:
    text = shown("help", "--all")
    assert max(map(len, text.splitlines())) <= 80
    for name in COMMANDS:
        assert f"\n  {name} " in text
    for name in PANELS[OTHER]:
        assert COMMANDS[name].hidden
        assert f"\n  {name} " not in shown("--help")
    assert "--install-completion" in text


@pytest.mark.parametrize("words", [("eval",), ("recipe", "show"), ("eval-vision",)])
def test_help_explains_a_command_as_its_own_help_does(words: tuple[str, ...]) -> None:
    assert shown("help", *words).splitlines() == shown(*words, "--help").splitlines()


def test_help_of_what_is_no_command() -> None:
    assert "Did you mean 'eval'" in shown("help", "evl", exit_code=2)
    assert "has no commands of its own" in shown("help", "eval", "x", exit_code=2)
    assert "leave out" in shown("help", "eval", "--all", exit_code=2)


def test_an_unknown_command_is_answered_with_the_nearest() -> None:
    assert "Did you mean 'quantize'" in shown("quantise", exit_code=2)
    assert "Did you mean 'show'" in shown("recipe", "shwo", exit_code=2)


def test_the_version() -> None:
    for words in (("-V",), ("--version",), ("version",)):
        assert shown(*words) == f"pocketquant {__version__}\n"


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"recipe"}))
def test_a_command_shows_at_most_twelve_options_before_the_rest(name: str) -> None:
    panels = dict(panels_of(COMMANDS[name], COMMANDS[name].params))
    assert len(panels.get("Options", ())) <= 12


def test_an_option_is_called_the_same_in_every_command() -> None:
    """`--device` is what a file is for, `--mtp` what becomes of a block; what a file or torch needs is called else."""
    meant = {"--device": ("phone|any", "NAME"), "--mtp": ("sidecar|embed|drop",)}
    for command in COMMANDS.values():
        for parameter in command.params:
            name = spellings(parameter)[-1] if parameter.param_type_name == "option" else ""
            assert parameter.metavar in meant.get(name, (parameter.metavar,)), command.name


@pytest.mark.parametrize(
    ("words", "old", "new"),
    [
        (("calibrate", "x", "--out", "y"), "--device", "--torch-device"),
        (("tune", "x", "--out", "y", "--reference", "z"), "--device", "--torch-device"),
        (("imatrix", "x", "--out", "y"), "--mtp", "--mtp-file"),
    ],
)
def test_old_names_are_taken_and_not_shown(words: tuple[str, ...], old: str, new: str) -> None:
    command = COMMANDS[words[0]]
    for name in (old, new):
        context = command.make_context(words[0], [*words[1:], name, "value"])
        assert str(context.params[new[2:].replace("-", "_")]) == "value"
    text = shown(words[0], "--help")
    assert f"{new} " in text
    assert f"{old} " not in text.replace(new, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eval", "x"), "name what to compare on"),
        (("eval", "x", "--text", "t"), "name the full precision"),
        (("eval", "x", "--text", "t", "--tasks", "a"), "--text and --tasks are different comparisons"),
        (("eval", "x", "--weights", "--chats"), "--chats and --weights are different comparisons"),
        (("eval", "x", "--tasks", "a", "--positions"), "is used only with --text"),
        (("eval", "x", "--text", "t", "--limit", "3"), "is used only with --tasks"),
        (("eval", "x", "--text", "t", "--max-tokens", "256"), "is used only with --chats"),
        (("eval", "x", "--weights", "--reference", "y", "--context", "64"), "has no effect with --weights"),
        (("eval", "x", "--image", "i.png"), "name both vision towers"),
        (("eval", "x", "--chats", "--reference", "y", "--chunks", "2"), "has no effect with --chats"),
        (("calibrate", "x", "--out", "y", "--groups", "2"), "is used only with --sensitivity"),
        (("calibrate", "x", "--out", "y", "--sensitivity", "--memory", "1GB"), "has no effect with --sensitivity"),
        (("calibrate", "x", "--out", "y", "--merge", "--chunks", "2"), "has no effect with --merge"),
        (("imatrix", "x", "--out", "y", "--text", "self", "--seed", "-1"), "greater than or equal to 0"),
        (("eval", "x", "--text", "t", "--threads", "1" + 22 * "0"), "less than or equal to 512"),
        (("split", "x", "--out", "y"), "or --join"),
        (("split", "x", "--out", "y", "--join", "--split-max-size", "1MB"), "whatever its size"),
    ],
)
def test_options_that_say_nothing_together_are_refused(words: tuple[str, ...], message: str) -> None:
    output = shown(*words, exit_code=2)
    assert message in " ".join(output.split())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("quantize", "x", "--dry-run", "--recipe", ""), "--recipe"),
        (("quantize", "x", "--dry-run", "--mmproj="), "--mmproj"),
        (("make", "x", "--out", "y", "--calibrate", ""), "--calibrate"),
        (("convert", "x", "-o", ""), "-o"),
        (("inspect", ""), ""),
    ],
)
def test_a_word_with_nothing_in_it_is_refused(words: tuple[str, ...], named: str) -> None:
    output = " ".join(shown(*words, exit_code=2).split())
    assert f"Invalid value{f' for {named}' if named else ''}: nothing is given" in output


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["pocketquant", "quan"], {"quantize"}),
        (["pocketquant", "e"], {"eval"}),
        (["pocketquant", "eval", "--pos"], {"--positions"}),
        (["pocketquant", "recipe", "s"], {"show"}),
    ],
)
def test_a_shell_completes_commands_and_options(typed: list[str], expected: set[str]) -> None:
    words = {"COMP_WORDS": " ".join(typed), "COMP_CWORD": str(len(typed) - 1)}
    result = subprocess.run(
        [Path(sys.executable).with_name("pocketquant")],
        env=os.environ | words | {"_POCKETQUANT_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, set(result.stdout.split())) == (0, expected)


def test_the_script_for_a_shell_is_shown() -> None:
    result = subprocess.run(
        [Path(sys.executable).with_name("pocketquant"), "--show-completion", "bash"],
        env=os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "_POCKETQUANT_COMPLETE=complete_bash" in result.stdout

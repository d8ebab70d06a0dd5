"""Foreign names on terminals, in tables, in Markdown and in JUnit XML: text, whatever they hold."""

from __future__ import annotations

import io
import json
import re
from xml.etree import ElementTree

import pytest
from rich.console import Console

from pocketquant.cli import screen
from pocketquant.errors import SourceError, listing
from pocketquant.escaping import LONGEST_LINE, as_code, as_lines, for_markdown, one_line
from pocketquant.eval.gate.output import to_junit, verdict_to_markdown
from pocketquant.eval.gate.verdict import FAILED, PASS, Decision, Verdict

HOSTILE = "x\n\n# @all ![t](u) <img src=x>|`\x1b[2J\0\u202e\ud800\ufffe\r"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Qwen3.5-4B ü 模型 😀", "Qwen3.5-4B ü 模型 😀"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x1b[31m\0\x9b", r"\x1b[31m\x00\x9b"),
        ("\u202egnp\u2066\u200e\u2028", r"\u202egnp\u2066\u200e\u2028"),
        ("\udcff", r"\udcff"),
    ],
)
def test_one_line(text: str, line: str) -> None:
    assert one_line(text) == line


def test_a_long_line_keeps_its_ends() -> None:
    assert one_line("a" * 50 + "b" * 50, 12) == "aaaaaaaa … bbbb"
    assert as_lines("x" * 5000 + "\nend").endswith("x\nend")
    assert len(as_lines("x" * 5000 + "\nend").split("\n")[0]) == LONGEST_LINE + 3


def test_an_error_quotes_at_most_a_line() -> None:
    error = SourceError(f"{'p' * 3000}: cannot be read\n{listing(['a: ' + HOSTILE, 'b' * 5000])}")
    lines = str(error).split("\n")
    assert len(lines) == 3
    assert all(line.isprintable() and len(line) <= LONGEST_LINE + 10 for line in lines)
    assert lines[0].endswith(": cannot be read")


def test_markdown_and_code() -> None:
    assert for_markdown("a_b") == "a_b"
    assert for_markdown("@all") == "@<!-- -->all"
    assert for_markdown(HOSTILE).startswith(r"x\\n\\n\# @<!-- -->all !\[t\](u) &lt;img src=x&gt;\|\`\\x1b\[2J\\x00")
    assert as_code("a`b``c") == "```a`b``c```"
    assert as_code("`a") == "`` `a ``"
    assert as_code("") == ""


def test_a_verdict_on_a_model_of_a_hostile_name() -> None:
    decisions = tuple(
        Decision(f"absolute.domain_kld_mean[{HOSTILE}]", outcome, 0.1, False, 0.2, 0.1, 0.3, 5, None, HOSTILE)
        for outcome in (FAILED, PASS)
    )
    verdict = Verdict(decisions, 0.999, False, (HOSTILE, HOSTILE), (HOSTILE, "0" * 64), "yes")
    suite = ElementTree.fromstring(to_junit(verdict, None).encode())
    assert suite.get("name", "").startswith(r"pocketquant gate x\n\n# @all")
    page = verdict_to_markdown(verdict, None)
    page.encode()
    assert all(line.isprintable() for line in page.split("\n"))
    assert [line for line in page.split("\n") if line.startswith("#")] == [page.split("\n")[0]]
    outside_code = re.sub(r"`{2,} ?.*? ?`{2,}", "", page)
    assert "![" not in outside_code
    assert "@all" not in outside_code
    assert "<img" not in outside_code
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in page.split("\n") if line.startswith("|")}
    assert widths == {7}


def test_a_terminal_gets_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = io.StringIO()
    monkeypatch.setattr(screen, "_talk", Console(file=talk, highlight=False))
    screen.print_error(f"{HOSTILE}: cannot be read")
    screen.say(HOSTILE, quiet=False)
    screen.print_table([HOSTILE, "[bold]b"], [[HOSTILE, "[/]"], ["1", "2"]], title=HOSTILE)
    screen.print_lines(f"note: {HOSTILE}")
    out = capsys.readouterr().out + talk.getvalue()
    out.encode()
    assert all(line.isprintable() for line in out.split("\n"))
    assert "[bold]b" in out
    assert "[/]" in out


def test_json_of_a_name_that_is_no_utf_8(capsys: pytest.CaptureFixture[str]) -> None:
    screen.print_json({"name": "c\udcff.txt", "other": "ü"})
    out = capsys.readouterr().out
    out.encode()
    assert json.loads(out)["name"] == "c\udcff.txt"

"""`pocketquant report`, and the page that `make` writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from report_maker import make_evaluation

from pocketquant.cli.report import command_words
from pocketquant.demo import checkpoint_dir

COMMAND = str(Path(sys.executable).with_name("pocketquant"))


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result


def test_reports_become_a_page_and_a_card(tmp_path: Path) -> None:
    for name, kld in (("A", 0.02), ("B", 0.01)):
        (tmp_path / f"{name}.json").write_text(json.dumps(make_evaluation(f"Tiny-{name}", kld=kld)))
    pages = tmp_path / "report.html", tmp_path / "card.md"
    run("report", tmp_path / "A.json", tmp_path / "B.json", "--out", pages[0], "--markdown", pages[1])
    assert pages[0].read_text().startswith("<!DOCTYPE html>")
    assert "| Tiny-B.gguf | 2.4 MB |" in pages[1].read_text()


@pytest.mark.parametrize(("content", "said"), [("{", "broken JSON"), ("{}", "no report"), (None, "cannot be read")])
def test_bad_reports_change_nothing(content: str | None, said: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("good")
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    result = run("report", tmp_path / "a.json", "--out", tmp_path / "report.html", code=2)
    assert said in " ".join(result.stderr.split())
    assert (tmp_path / "report.html").read_text() == "good"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no folder in which nobody may make a file")
def test_where_one_page_cannot_be_written_neither_is(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(make_evaluation("Tiny", kld=0.01)))
    said = run("report", tmp_path / "a.json", "--out", tmp_path / "a.html", "--markdown", "/proc/a.md", code=2).stderr
    assert "/proc/a.md: cannot be written" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_make_writes_the_page(tmp_path: Path) -> None:
    options = [
        "--recipe",
        "q8_0",
        "--imatrix",
        "none",
        "--context",
        64,
        "--chunks",
        2,
        "--text",
        "domains",
        "--positions",
    ]
    run("make", checkpoint_dir(), "--out", tmp_path / "out", *options, "--threads", 2, "--quiet")
    page, result = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.json"))
    assert "By place in the window" in page
    assert "By kind of text" in page
    repeated = (
        "pocketquant make checkpoint --recipe q8_0 --imatrix none --context 64 --chunks 2 --text domains --positions"
    )
    assert f"{repeated} --out out" in page
    assert str(tmp_path) not in page + result
    assert "report.html" in (tmp_path / "out/SHA256SUMS").read_text()


def test_a_command_line_is_repeated_without_folders(tmp_path: Path) -> None:
    text = tmp_path / "a b.txt"
    text.write_text("x")
    words = [
        "make",
        str(tmp_path),
        "-o",
        "x",
        f"--text={text}",
        "--text",
        f"prose={text}",
        "--threads=2",
        "-q",
        "-r",
        "q8_0",
    ]
    assert command_words(words) == [
        *(
            "pocketquant",
            "make",
            tmp_path.name,
            "--text=a b.txt",
            "--text",
            "prose=a b.txt",
            "-r",
            "q8_0",
            "--out",
            "out",
        )
    ]

"""`report`: measurements as a page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pocketquant.cli.options import Quiet, option
from pocketquant.cli.screen import say

_NOT_REPEATED = {
    "--out": 1,
    "-o": 1,
    "--threads": 1,
    "--scheduler": 1,
    "--quiet": 0,
    "-q": 0,
    "--json": 0,
    "--debug": 0,
}
"""Options that change no byte of a result, with how many words follow each."""


def report(
    reports: Annotated[
        list[Path],
        typer.Argument(
            metavar="REPORT.json", help="Report that `eval --json`, `make`, `sweep` or `tasks --json` wrote."
        ),
    ],
    out: Annotated[Path, option("--out -o", "FILE", "The HTML page to write.")],
    markdown: Annotated[Path | None, option("--markdown", "FILE", "Also write Markdown for a model card.")] = None,
    quiet: Quiet = False,
) -> None:
    """Write an HTML page that shows measurements.

    The page shows loss over size, by domain, position and tensor, and the command that measures it again.
    """
    from pocketquant.eval.report.html import read_sheet, to_card, to_html
    from pocketquant.files.replacing import refuse_overwriting, replacing_together

    refuse_overwriting([out, *([markdown] if markdown else [])], reports)
    sheet = read_sheet(reports)
    pages = [(out, to_html(sheet)), *([(markdown, to_card(sheet))] if markdown else [])]
    with replacing_together([path for path, _ in pages]) as temporaries:
        for temporary, (_, page) in zip(temporaries, pages, strict=True):
            temporary.write_text(page, encoding="utf-8")
    for path, page in pages:
        say(f"written: {path}, {len(page.encode()):,} bytes", quiet=quiet)


def command_words(arguments: Sequence[str] | None = None) -> list[str]:
    """The command line that is running, for a report: without folders, and without what changes no result."""
    kept, skip = ["pocketquant"], 0
    for word in sys.argv[1:] if arguments is None else arguments:
        name, is_joined, value = word.partition("=")
        if skip:
            skip -= 1
        elif name in _NOT_REPEATED:
            skip = 0 if is_joined else _NOT_REPEATED[name]
        elif is_joined and Path(value).exists():
            kept.append(f"{name}={Path(value).name}")
        else:
            kept.append(Path(word).name if Path(word).exists() else word)
    return [*kept, "--out", "out"]

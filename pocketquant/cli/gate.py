"""`gate`: fails a build when a file lost more than its limits allow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketquant.cli.screen import print_json, print_lines, print_table, say
from pocketquant.escaping import one_line


def gate(
    report: Annotated[Path, typer.Argument(metavar="REPORT.json", help="What `eval --json` printed.")],
    limits: Annotated[Path, typer.Option("--limits", metavar="FILE", help="TOML: [absolute] and [baseline] limits.")],
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="OLD.json", help="Report of the last accepted file.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A limit that the text is too short to decide fails, too.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Name the tensors, roles and domains that moved since the baseline.")
    ] = False,
    junit: Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML.")] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write a summary for people.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No talk on stderr.")] = False,
) -> None:
    """Hold a report against limits: exit 0 if none is broken for certain, 1 if one is, 2 for bad input."""
    from pocketquant.eval.gate import decide, read_report
    from pocketquant.eval.limits import read_limits
    from pocketquant.eval.moved import find_moved
    from pocketquant.eval.verdict import describe_moved, table, to_json, to_junit, to_markdown
    from pocketquant.files import refuse_overwriting, replacing

    if explain and baseline is None:
        raise typer.BadParameter("says what moved since a baseline; give --baseline OLD.json", param_hint="--explain")
    refuse_overwriting([path for path in (junit, markdown) if path is not None], [report, limits, baseline])
    candidate = read_report(report)
    accepted = None if baseline is None else read_report(baseline)
    verdict = decide(candidate, read_limits(limits), accepted, strict=strict)
    moved = find_moved(candidate, accepted) if explain and accepted is not None else None
    for path, text in ((junit, to_junit(verdict, moved)), (markdown, to_markdown(verdict, moved))):
        if path is not None:
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    if json:
        print_json(to_json(verdict, moved))
    else:
        print_table(["limit", "outcome", "found", "interval", "limit is", "note"], table(verdict))
        for line in describe_moved(moved):
            print_lines(one_line(line))
    say(one_line(verdict.summary), quiet=quiet)
    if not verdict.is_accepted:
        raise typer.Exit(1)

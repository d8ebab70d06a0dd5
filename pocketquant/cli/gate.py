"""`gate`: fails a build when a file lost more than its limits allow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketquant.cli.screen import print_json, print_lines, print_table, say
from pocketquant.escaping import one_line

if TYPE_CHECKING:
    from pocketquant.eval.report.reading import Evidence


def gate(
    report: Annotated[
        Path, typer.Argument(metavar="REPORT.json", help="What `eval --json` printed, or `make` and `sweep` wrote.")
    ],
    limits: Annotated[
        Path | None, typer.Option("--limits", metavar="FILE", help="TOML: [absolute] and [baseline] limits.")
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option("--init", metavar="FILE", help="Write limits that this report keeps, to start with, and stop."),
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", metavar="NAME", help="Which file of a report of `make` or `sweep`.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="OLD.json", help="Report of the last accepted file.")
    ] = None,
    first: Annotated[
        bool, typer.Option("--first", help="Nothing was accepted yet: leave the limits in [baseline] out.")
    ] = False,
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
    from pocketquant.eval.gate.decide import decide, read_report
    from pocketquant.eval.gate.limits import read_limits
    from pocketquant.eval.gate.output import describe_moved, table, to_json, to_junit, verdict_to_markdown
    from pocketquant.eval.gate.report_diff import find_moved
    from pocketquant.files.replacing import refuse_overwriting, replacing

    if explain and baseline is None:
        raise typer.BadParameter("says what moved since a baseline; give --baseline OLD.json", param_hint="--explain")
    if first and baseline is not None:
        raise typer.BadParameter("there is a baseline; give one of the two", param_hint="--first")
    outputs = [path for path in (junit, markdown, init) if path is not None]
    refuse_overwriting(outputs, [report, limits, baseline])
    candidate = read_report(report, file)
    if init is not None:
        _write_starter(init, candidate, json=json, quiet=quiet)
        return
    if limits is None:
        raise typer.BadParameter("name a file of limits; --init FILE writes one to start with", param_hint="--limits")
    accepted = None if baseline is None else _read_baseline(baseline, file)
    verdict = decide(candidate, read_limits(limits), accepted, strict=strict, first=first)
    moved = find_moved(candidate, accepted) if explain and accepted is not None else None
    for path, text in ((junit, to_junit(verdict, moved)), (markdown, verdict_to_markdown(verdict, moved))):
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


def _read_baseline(path: Path, file: str | None) -> Evidence:
    """The accepted report; of one file, or with the same file in it as the candidate's."""
    from pocketquant.eval.gate.decide import read_report
    from pocketquant.eval.report.reading import RELEASES
    from pocketquant.files.small import read_json

    document = read_json(path)
    is_release = isinstance(document, dict) and document.get("schema") in RELEASES
    return read_report(path, file if is_release else None)


def _write_starter(path: Path, report: Evidence, *, json: bool, quiet: bool) -> None:
    from pocketquant.errors import OutputError
    from pocketquant.eval.gate.starter import starter_limits
    from pocketquant.files.replacing import replacing

    if path.exists():
        raise OutputError(f"{path}: exists; limits are edited by people, so they are not written over")
    with replacing(path) as temporary:
        temporary.write_text(starter_limits(report), encoding="utf-8")
    say(f"written: {path}; look at the limits and tighten them", quiet=quiet)
    if json:
        print_json({"out": str(path)}, of="init")

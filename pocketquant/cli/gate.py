"""`gate`: fails a build when a file lost more than its limits allow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketquant.cli.options import Talk, option
from pocketquant.cli.screen import print_json, print_lines, print_table
from pocketquant.escaping import one_line

if TYPE_CHECKING:
    from pocketquant.eval.report.reading import Evidence


@dataclass(frozen=True)
class GateOptions:
    """What the report is held against, and where the verdict goes."""

    limits: Annotated[
        Path | None, option("--limits", "FILE", "TOML file with limits in [absolute] and [baseline].")
    ] = None
    init: Annotated[
        Path | None, option("--init", "FILE", "Write a file of limits that this report keeps, to start from, and stop.")
    ] = None
    file: Annotated[
        str | None, option("--file", "NAME", "File to judge, by its name in a report of `make` or `sweep`.")
    ] = None
    baseline: Annotated[Path | None, option("--baseline", "OLD.json", "Report of the last accepted file.")] = None
    first: Annotated[
        bool, option("--first", "", "Leave out the limits in [baseline], since no file was accepted yet.")
    ] = False
    strict: Annotated[bool, option("--strict", "", "Fail also where the text is too short to decide a limit.")] = False
    explain: Annotated[
        bool, option("--explain", "", "Name the tensors, roles and domains that moved since the baseline.")
    ] = False
    junit: Annotated[Path | None, option("--junit", "FILE", "Also write the result as JUnit XML.")] = None
    markdown: Annotated[Path | None, option("--markdown", "FILE", "Also write the result as Markdown.")] = None

    def check(self) -> None:
        """Refuses what does not go together."""
        if self.explain and self.baseline is None:
            advice = "says what moved since a baseline; give --baseline OLD.json"
            raise typer.BadParameter(advice, param_hint="--explain")
        if self.first and self.baseline is not None:
            raise typer.BadParameter(
                "means that there is no baseline yet; give one of --first and --baseline", param_hint="--first"
            )


def gate(
    report: Annotated[
        Path,
        typer.Argument(metavar="REPORT.json", help="Report that `eval --json` printed, or `make` or `sweep` wrote."),
    ],
    *,
    options: GateOptions,
    talk: Talk,
) -> None:
    """Hold a report against limits, and fail if a limit is broken.

    The exit code is 0 if no limit is broken for certain, 1 if one is, 2 for bad input.
    """
    from pocketquant.eval.gate.decide import decide, read_report
    from pocketquant.eval.gate.limits import read_limits
    from pocketquant.eval.gate.output import describe_moved, table, to_json, to_junit, verdict_to_markdown
    from pocketquant.eval.gate.report_diff import find_moved
    from pocketquant.files.replacing import refuse_overwriting, replacing

    options.check()
    outputs = [path for path in (options.junit, options.markdown, options.init) if path is not None]
    refuse_overwriting(outputs, [report, options.limits, options.baseline])
    candidate = read_report(report, options.file)
    if options.init is not None:
        _write_starter(options.init, candidate, talk)
        return
    if options.limits is None:
        raise typer.BadParameter("name a file of limits; --init FILE writes one to start with", param_hint="--limits")
    accepted = None if options.baseline is None else _read_baseline(options.baseline, options.file)
    verdict = decide(candidate, read_limits(options.limits), accepted, strict=options.strict, first=options.first)
    moved = find_moved(candidate, accepted) if options.explain and accepted is not None else None
    for path, text in (
        (options.junit, to_junit(verdict, moved)),
        (options.markdown, verdict_to_markdown(verdict, moved)),
    ):
        if path is not None:
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    if talk.json:
        print_json(to_json(verdict, moved))
    else:
        print_table(["limit", "outcome", "found", "interval", "limit is", "note"], table(verdict))
        for line in describe_moved(moved):
            print_lines(one_line(line))
    talk.say(one_line(verdict.summary))
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


def _write_starter(path: Path, report: Evidence, talk: Talk) -> None:
    from pocketquant.errors import OutputError
    from pocketquant.eval.gate.starter import starter_limits
    from pocketquant.files.replacing import replacing

    if path.exists():
        raise OutputError(
            f"{path}: exists already, and limits that people edit are not written over; name another file"
        )
    with replacing(path) as temporary:
        temporary.write_text(starter_limits(report), encoding="utf-8")
    talk.say(f"written: {path}; look at the limits and tighten them")
    if talk.json:
        print_json({"out": str(path)}, of="init")

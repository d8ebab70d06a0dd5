"""`check`: what is wrong with a file or a checkpoint, without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketquant.cli.options import Talk, option
from pocketquant.cli.screen import print_json, print_lines, size
from pocketquant.errors import ArchitectureError, TokenizerError
from pocketquant.escaping import one_line

if TYPE_CHECKING:
    from pocketquant.check import CheckReport

_SHOWN = 8
"""Findings of one kind that are written out; a file without a block misses a dozen tensors for one reason."""


def check(
    file: Annotated[str, typer.Argument(metavar="FILE|SRC", help="GGUF file, or a checkpoint before it is converted.")],
    source: Annotated[
        str | None, option("--source", "SRC", "Compare every tensor with this checkpoint, from which FILE was made.")
    ] = None,
    *,
    talk: Talk,
) -> None:
    """Look for what is wrong with a GGUF or a checkpoint.

    No model is run. The exit code is 1 if something is wrong.
    """
    with talk.steps(Path(file).name) as advance:
        report = check_file_or_source(file, source, advance)
    if talk.json:
        print_json({"file": file, **report.to_json()})
    else:
        print_report(file, report)
    if report.has_errors:
        raise typer.Exit(1)


def check_file_or_source(file: str, source: str | None, progress: Callable[[int, int], None]) -> CheckReport:
    """Checks a GGUF, against a source if one is given, or a checkpoint: one that is refused is a finding."""
    from pocketquant.check import ERROR, CheckReport, Finding, check_gguf, check_model
    from pocketquant.convert import open_model
    from pocketquant.convert.sources import names_gguf, open_counterpart

    if names_gguf(file):
        return check_gguf(Path(file), open_counterpart(file, source) if source else None, progress=progress)
    if source is not None:
        raise typer.BadParameter("only a GGUF file can be compared with a source", param_hint="--source")
    try:
        return check_model(open_model(file), progress=progress)
    except (ArchitectureError, TokenizerError) as error:
        refused = Finding(ERROR, "refused", "", str(error), "this checkpoint cannot be converted as it is")
        return CheckReport((refused,), (), (), {"architecture": None, "tensors": 0, "tensor_bytes": 0})


def print_report(file: str, report: CheckReport) -> None:
    """Findings on stdout, a line or two each, then the notes and how many there are."""
    from pocketquant.check import ERROR

    shown: Counter[str] = Counter()
    totals = Counter(finding.code for finding in report.findings)
    for finding in report.findings:
        shown[finding.code] += 1
        if shown[finding.code] > _SHOWN:
            continue
        place = f" {one_line(finding.tensor)}" if finding.tensor else ""
        print_lines(f"{finding.severity}: {finding.code}{place}: {finding.message}")
        if shown[finding.code] < min(_SHOWN, totals[finding.code]):
            continue
        if totals[finding.code] > _SHOWN:
            print_lines(f"  ... and {totals[finding.code] - _SHOWN} more of {finding.code}; --json lists them all")
        if finding.advice:
            print_lines(f"  -> {finding.advice}")
    for note in report.notes:
        print_lines(f"note: {note}")
    n_errors = sum(finding.severity == ERROR for finding in report.findings)
    print_lines(f"{file}: {n_errors} errors, {len(report.findings) - n_errors} warnings ({_about(report)})")


def _about(report: CheckReport) -> str:
    about = f"{report.described['architecture'] or 'unknown architecture'}, {report.described['tensors']} tensors"
    if nbytes := report.described["tensor_bytes"]:
        about += f", {size(nbytes)}"
    lossy = [(item.snr_db, item) for item in report.comparisons if item.snr_db is not None]
    if lossy:
        snr, least = min(lossy, key=lambda pair: pair[0])
        about += f"; least like the source: {least.tensor} ({least.format}) with {snr:.1f} dB"
    elif report.comparisons:
        about += f"; {len(report.comparisons)} tensors equal the source's"
    return about

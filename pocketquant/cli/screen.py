"""What the commands show: progress and talk on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_talk = Console(stderr=True, highlight=False)


def print_error(message: str) -> None:
    """An error, whatever --quiet says."""
    _talk.print("[bold red]error:[/] ", end="")
    _talk.print(message, markup=False, soft_wrap=True)


def say(message: str, *, quiet: bool) -> None:
    """A line for people, on stderr."""
    if not quiet:
        _talk.print(message, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout; letters that its encoding lacks are escaped as JSON escapes them."""
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    json.dump(value, sys.stdout, indent=2, ensure_ascii=not is_unicode)
    sys.stdout.write("\n")


def print_table(columns: list[str], rows: list[list[str]], *, title: str = "") -> None:
    """A table on stdout; the columns after the first two are right-aligned where they hold numbers."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        numeric = bool(rows) and rows[0][i][:1].isdigit()
        table.add_column(column, justify="right" if numeric else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 200
    Console(highlight=False, width=width).print(table)


@contextmanager
def byte_progress(label: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar that counts bytes; gives the function to call with each piece's size."""
    with _progress(DownloadColumn(), quiet=quiet) as progress:
        task = progress.add_task(label, total=total)
        yield lambda nbytes: progress.advance(task, nbytes)


@contextmanager
def step_progress(label: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that counts steps; gives the function to call with (done, total)."""
    with _progress(MofNCompleteColumn(), quiet=quiet) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _progress(counter: MofNCompleteColumn | DownloadColumn, *, quiet: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), counter, TimeRemainingColumn())
    return Progress(*columns, console=_talk, transient=True, disable=quiet or not _talk.is_terminal)


def size(nbytes: float) -> str:
    """Bytes for people, in powers of ten as file sizes are sold: 2.74 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"

"""What the commands show: progress and talk on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pocketquant import __version__
from pocketquant.escaping import as_lines, is_text, one_line

_talk = Console(stderr=True, highlight=False)
_command = ""
_document = ""

LINE_SECONDS = 60.0
"""How often a long run writes a line where it cannot draw a bar."""


def print_error(message: str) -> None:
    """An error, whatever --quiet says."""
    _talk.print("[bold red]error:[/] ", end="")
    _talk.print(as_lines(message), markup=False, soft_wrap=True)


def say(message: str, *, quiet: bool) -> None:
    """A line for people, on stderr."""
    if not quiet:
        _talk.print(as_lines(message), markup=False, soft_wrap=True)


def print_lines(text: str) -> None:
    """Text for people on stdout: what foreign names hold moves no cursor."""
    print(as_lines(text, None))


def set_command(words: Sequence[str]) -> None:
    """Says which command runs, so that its documents can be named after it."""
    global _command, _document
    _command = _document = "-".join(words)


def set_document(name: str) -> None:
    """Says what the document of this run is called, where it is not called as the command."""
    global _document
    _document = name


def headed(value: Mapping[str, Any], *, of: str = "") -> dict[str, Any]:
    """A document with its schema and the version that wrote it in front; see `print_json`."""
    schema = "-".join(filter(None, (_document, of)))
    return {"schema": f"pocketquant.{schema}/1", "version": __version__, **value}


def print_json(value: Mapping[str, Any], *, of: str = "") -> None:
    """One JSON document on stdout: its schema and the version that wrote it, then what it says.

    Args:
        value: the document; a schema of its own is kept.
        of: what part of the command's work it describes, "plan" for what a dry run prints.
    """
    document = headed(value, of=of)
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    # letters that the encoding lacks are escaped as JSON escapes them
    text = json.dumps(document, indent=2, ensure_ascii=not is_unicode)
    if not is_text(text):  # the name of a file that is no UTF-8
        text = json.dumps(document, indent=2)
    sys.stdout.write(f"{text}\n")


def print_json_error(message: str, kind: str, exit_code: int) -> None:
    """What went wrong as a JSON document on stdout, in place of the one that was asked for."""
    error = {"kind": kind, "message": message, "exit_code": exit_code}
    print_json({"schema": "pocketquant.error/1", "command": _command, "error": error})


def print_table(columns: list[str], rows: list[list[str]], *, title: str = "") -> None:
    """A table on stdout; the columns after the first two are right-aligned where they hold numbers."""
    table = Table(title=Text(one_line(title)) if title else None, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        numeric = bool(rows) and rows[0][i][:1].isdigit()
        table.add_column(Text(one_line(column)), justify="right" if numeric else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    width = None if sys.stdout.isatty() else 200
    Console(highlight=False, width=width).print(table)


@contextmanager
def byte_progress(
    label: str, total: int, *, quiet: bool, step: tuple[int, int] | None = None
) -> Iterator[Callable[[int], None]]:
    """Progress that counts bytes; gives the function to call with each piece's size.

    Args:
        label: what is being done.
        total: bytes in all.
        quiet: show nothing.
        step: which step of how many of the command this is.
    """
    label = _of_steps(label, step)
    with (
        _progress(DownloadColumn(), quiet=quiet) as progress,
        _line_a_minute(label, lambda done, total: f"{size(done)} of {size(total)}", quiet=quiet) as at,
    ):
        task, done = progress.add_task(one_line(label), total=total, unit=""), 0

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress.advance(task, nbytes)
            at(done, total)

        yield advance


@contextmanager
def step_progress(
    label: str, *, quiet: bool, unit: str = "", step: tuple[int, int] | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Progress that counts units, "windows"; gives the function to call with (done, total). The rest is as above."""
    label = _of_steps(label, step)
    with (
        _progress(MofNCompleteColumn(), quiet=quiet) as progress,
        _line_a_minute(label, lambda done, total: f"{done} of {total} {unit}".rstrip(), quiet=quiet) as at,
    ):
        task, begun = progress.add_task(one_line(label), total=None, unit=unit), False

        def advance(done: int, total: int) -> None:
            nonlocal begun
            if not begun and done > 1:  # it goes on where an interrupted run was saved
                at.begin(done)
            begun = True
            progress.update(task, completed=done, total=total)
            at(done, total)

        yield advance


def _of_steps(label: str, step: tuple[int, int] | None) -> str:
    return label if step is None else f"step {step[0]} of {step[1]}, {label}"


class _Pace:
    """How far a run is, and how long the rest will take at its pace."""

    def __init__(self) -> None:
        self.started = self._since = time.monotonic()
        self._before = self.done = self.total = 0

    def begin(self, done: int) -> None:
        """What was done by an earlier run says nothing about the pace of this one."""
        self._since, self._before = time.monotonic(), done

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def minutes_left(self) -> float | None:
        """None as long as nothing was done."""
        if self.done <= self._before:
            return None
        return (time.monotonic() - self._since) / 60 * (self.total - self.done) / (self.done - self._before)


@contextmanager
def _line_a_minute(label: str, count: Callable[[int, int], str], *, quiet: bool) -> Iterator[_Pace]:
    """Where no bar can be drawn, a line a minute that says how far it is, so that a log shows a run that lives."""
    pace, ended = _Pace(), threading.Event()

    def write() -> None:
        while not ended.wait(LINE_SECONDS):
            minutes, left = (time.monotonic() - pace.started) / 60, pace.minutes_left()
            line = f"{label}: {minutes:.0f} min so far"
            if pace.done:
                share = f"{100 * pace.done / pace.total:.0f} % ({count(pace.done, pace.total)})"
                line = f"{label}: {share} after {minutes:.0f} min"
            say(line if left is None else f"{line}, about {left:.0f} min left", quiet=False)

    if quiet or _talk.is_terminal:
        yield pace
        return
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield pace
    finally:
        ended.set()
        writer.join()


def _progress(counter: MofNCompleteColumn | DownloadColumn, *, quiet: bool) -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        counter,
        TextColumn("{task.fields[unit]}", markup=False),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    return Progress(*columns, console=_talk, transient=True, disable=quiet or not _talk.is_terminal)


def size(nbytes: float) -> str:
    """Bytes for people, in powers of ten as file sizes are sold: 2.74 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"

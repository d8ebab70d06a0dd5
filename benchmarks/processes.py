"""Whole processes, measured by the operating system, and the rows of the table that ratios of them make."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("pocketquant"))


@dataclass(frozen=True)
class Cost:
    """What one or more processes took.

    Attributes:
        wall, cpu: seconds.
        peak_bytes: largest resident set of any of them.
        written_bytes: sent towards the disk, as the system accounts them to the process (Linux).
    """

    wall: float
    cpu: float
    peak_bytes: float
    written_bytes: float

    def then(self, after: Cost) -> Cost:
        return Cost(
            self.wall + after.wall,
            self.cpu + after.cpu,
            max(self.peak_bytes, after.peak_bytes),
            self.written_bytes + after.written_bytes,
        )


@dataclass(frozen=True)
class Row:
    """One line of the table: ratios are the peer's cost by ours, None where they say nothing."""

    job: str
    peer: str
    wall: float | None = None
    cpu: float | None = None
    memory: float | None = None
    written: float | None = None
    ours: str = ""


def run(*command: object) -> Cost:
    """Runs a command to its end; SystemExit with its words if it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as talk:
        process = subprocess.Popen([str(part) for part in command], stdout=talk, stderr=talk)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            talk.seek(0)
            raise SystemExit(f"{command[0]} failed:\n{talk.read()[-2000:]}")
    wall = time.perf_counter() - started
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, usage.ru_oublock * 512)


def run_in_turn(repeats: int, *jobs: Callable[[], Cost]) -> list[Cost]:
    """Medians of each job, the jobs taken in turn and every other time in the opposite order."""
    costs: list[list[Cost]] = [[] for _ in jobs]
    for repeat in range(repeats):
        order = range(len(jobs)) if repeat % 2 == 0 else reversed(range(len(jobs)))
        for i in order:
            costs[i].append(jobs[i]())
    return [median(taken) for taken in costs]


def median(costs: Sequence[Cost]) -> Cost:
    """Of each number by itself."""
    return Cost(*(statistics.median(getattr(cost, field.name) for cost in costs) for field in fields(Cost)))


def compare(job: str, peer: str, ours: Cost, theirs: Cost, *, memory: bool = True) -> Row:
    """The row of two costs."""
    own = f"{ours.wall:.1f} s, {ours.cpu:.1f} s CPU" + (f", {ours.peak_bytes / 1e6:.0f} MB" if memory else "")
    return Row(
        job,
        peer,
        theirs.wall / ours.wall,
        theirs.cpu / ours.cpu,
        theirs.peak_bytes / ours.peak_bytes if memory else None,
        theirs.written_bytes / ours.written_bytes if memory and ours.written_bytes else None,
        own,
    )


def to_markdown(rows: Sequence[Row]) -> str:
    """The table; above 1 is better than the peer."""
    lines = [
        "| job | against | wall | CPU | peak memory | bytes written | pocketquant |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        ratios = ["" if ratio is None else f"{ratio:.2f}x" for ratio in (row.wall, row.cpu, row.memory, row.written)]
        lines.append(f"| {' | '.join([row.job, row.peer, *ratios, row.ours])} |")
    return "\n".join(lines) + "\n"

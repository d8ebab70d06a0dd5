"""How long a long run will take: its first steps are run on this machine, and the rest is as many times longer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

Progress = Callable[[int, int], None]
"""What long runs tell how far they are: steps done, steps in all."""

MOST_STEPS = 4
"""Steps after the first that are tried. Runs with two lanes finish two at a time; four show the pace of both."""

ENOUGH_SECONDS = 30.0
"""A trial that took this long ends with two steps after the first."""


@dataclass(frozen=True)
class Pace:
    """What a trial found.

    Attributes:
        steps: of the whole run.
        tried: of these, steps that were run.
        first_seconds: until the first step was done: loading, compiling, reading the text.
        step_seconds: for each step after it.
        peak_bytes: most memory of this process so far, None where the system does not say.
    """

    steps: int
    tried: int
    first_seconds: float
    step_seconds: float
    peak_bytes: int | None

    @property
    def seconds(self) -> float:
        """The whole run."""
        return self.first_seconds + max(self.steps - 1, 0) * self.step_seconds


class _Enough(Exception):
    """Ends a run that is only tried."""


def try_out(run: Callable[[Progress], Any], *, most: int = MOST_STEPS, enough: float = ENOUGH_SECONDS) -> Pace:
    """Runs the first steps of something, and says how long all of them will take.

    Args:
        run: the whole run; it is ended by an exception out of the function that it is given to tell its progress.
        most: steps after the first one.
        enough: seconds after which two steps do.
    """
    started, seen = time.monotonic(), [(0, 0, 0.0)]

    def step(done: int, total: int) -> None:
        now = time.monotonic() - started
        if done:
            seen.append((done, total, now))
        since_first = done - seen[min(1, len(seen) - 1)][0]
        if since_first >= most or (since_first >= 2 and now > enough):
            raise _Enough

    with suppress(_Enough):
        run(step)
    (first, total, until_first), (last, _, until_last) = seen[min(1, len(seen) - 1)], seen[-1]
    each = (until_last - until_first) / (last - first) if last > first else until_first / max(first, 1)
    return Pace(total, last, until_first, each, _peak_bytes())


def _peak_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # in KiB elsewhere

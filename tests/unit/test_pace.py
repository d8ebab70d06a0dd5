"""How long a run will take, told by its first steps."""

from __future__ import annotations

import time

import pytest

from pocketquant.pace import Progress, try_out


def slow(progress: Progress, *, first: float, each: float, steps: int, at_once: int = 1) -> None:
    """A run that needs some time before its first step; of two lanes, two steps are done at the same time."""
    time.sleep(first)
    for done in range(0, steps, at_once):
        time.sleep(each)
        for i in range(at_once):
            progress(done + i + 1, steps)
    raise AssertionError("the whole run was done")


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_trial_tells_the_time_of_the_whole_run(at_once: int) -> None:
    pace = try_out(lambda progress: slow(progress, first=0.3, each=0.05, steps=200, at_once=at_once))
    assert (pace.steps, pace.tried) == (200, 5)
    assert pace.first_seconds >= 0.35
    assert 0.05 / at_once <= pace.step_seconds < 0.1
    assert pace.seconds == pytest.approx(pace.first_seconds + 199 * pace.step_seconds)
    assert pace.peak_bytes is None or pace.peak_bytes > 1 << 20


def test_slow_steps_are_fewer() -> None:
    pace = try_out(lambda progress: slow(progress, first=0, each=0.02, steps=50), enough=0.03)
    assert pace.tried == 3


def test_a_run_that_ends_before_the_trial_is_told_as_it_was() -> None:
    def short(progress: Progress) -> None:
        time.sleep(0.05)
        progress(1, 1)

    pace = try_out(short)
    assert (pace.steps, pace.tried) == (1, 1)
    assert 0.05 <= pace.seconds == pace.first_seconds


def test_what_is_told_before_the_first_step_is_none() -> None:
    def told(progress: Progress) -> None:
        progress(0, 100)
        slow(progress, first=0.05, each=0.01, steps=100)

    assert try_out(told).first_seconds >= 0.06


def test_an_error_of_the_run_is_not_taken_for_the_end_of_the_trial() -> None:
    def broken(progress: Progress) -> None:
        progress(1, 10)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        try_out(broken)

"""The result of a gate: a decision about each limit, and the verdict on all of them.

An estimate from a sample (`Sampled`) can be decided only when the number of all estimates of the run is known, because
they share the probability of being wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pocketquant.eval import intervals

PASS, FAILED, UNDECIDED = "pass", "fail", "undecided"


@dataclass(frozen=True)
class Decision:
    """The decision about one limit.

    Attributes:
        limit: section and key: "baseline.kld_mean_ratio", with the domain in brackets where there is one.
        outcome: `PASS`, `FAILED` or `UNDECIDED`.
        bound: the limit; None where there is no number.
        is_least: whether the bound is the least that is allowed, rather than the most.
        found: the estimate.
        low, high: the ends of its interval; None for no end. An exact number is its own interval.
        tokens: scored positions behind the estimate; 0 where it is exact.
        tokens_needed: about how many tokens would decide it; None where it is decided, or where no number would.
        note: a remark for the reader.
    """

    limit: str
    outcome: str
    bound: float | None
    is_least: bool
    found: float | None
    low: float | None
    high: float | None
    tokens: int = 0
    tokens_needed: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """All decisions of one run.

    Attributes:
        confidence: the probability that no failure among the estimates is chance.
        is_strict: whether undecided limits count as failures.
        model: name and digest of the judged file.
        baseline: name and digest of the last accepted file; None without one.
        is_paired: "yes", "no" or "in part": whether both were measured on the same tokens; None without a baseline.
        left_out: limits against a baseline that were not decided because there is none yet.
    """

    decisions: tuple[Decision, ...]
    confidence: float
    is_strict: bool
    model: tuple[str, str]
    baseline: tuple[str, str] | None
    is_paired: str | None
    left_out: int = 0

    def count(self, outcome: str) -> int:
        return sum(decision.outcome == outcome for decision in self.decisions)

    @property
    def is_accepted(self) -> bool:
        return not self.count(FAILED) and not (self.is_strict and self.count(UNDECIDED))

    @property
    def summary(self) -> str:
        text = f"{self.model[0]}: {self.count(PASS)} limits kept, {self.count(FAILED)} broken"
        if undecided := self.count(UNDECIDED):
            text += f", {undecided} undecided ({'counted as broken' if self.is_strict else 'not counted as broken'})"
        if self.left_out:
            text += f", {self.left_out} against a baseline left out: there is none yet"
        return text


class Estimate(NamedTuple):
    """A figure, its standard error, and the degrees of freedom of that."""

    value: float
    error: float
    degrees: int


@dataclass(frozen=True)
class Sampled:
    """An estimate from a sample; it is decided when the number of all estimates is known.

    Attributes:
        degrees: degrees of freedom of its variance.
        interval: number of standard errors on either side -> the ends of the interval.
        factor: number of standard errors on either side -> how many times as much text would decide it.
        slack: a width added on either side for differences that more text does not average out.
    """

    limit: str
    bound: float
    is_least: bool
    found: float
    tokens: int
    degrees: int
    interval: Callable[[float], tuple[float, float]]
    factor: Callable[[float], float]
    note: str = ""
    slack: float = 0.0

    def decide(self, tail: float) -> Decision:
        """The decision at a probability `tail` of being wrong on either side."""
        t = intervals.student_quantile(tail, self.degrees)
        low, high = self.interval(t)
        is_decided = not low < self.bound < high
        low, high = low - self.slack, high + self.slack
        if self.is_least:
            outcome = PASS if low >= self.bound else FAILED if high < self.bound else UNDECIDED
        else:
            outcome = PASS if high <= self.bound else FAILED if low > self.bound else UNDECIDED
        needed = None
        if outcome == UNDECIDED:
            factor = self.factor(t)
            # a factor near 1 is what is left between an interval and its approximation
            needed = _round_up(self.tokens * max(factor, 1.1)) if factor < 1e6 and not is_decided else None
        return Decision(
            limit=self.limit,
            outcome=outcome,
            bound=self.bound,
            is_least=self.is_least,
            found=self.found,
            low=None if math.isinf(low) else low,
            high=None if math.isinf(high) else high,
            tokens=self.tokens,
            tokens_needed=needed,
            note=self.note,
        )


def from_error(
    name: str, bound: float, estimate: Estimate, tokens: int, note: str = "", *, is_least: bool = False
) -> Sampled:
    """The estimate whose interval is its standard error times a quantile, on either side."""
    found, error, degrees = estimate
    return Sampled(
        limit=name,
        bound=bound,
        is_least=is_least,
        found=found,
        tokens=tokens,
        degrees=max(degrees, 1),
        interval=lambda t: (found - t * error, found + t * error),
        factor=lambda t: intervals.value_factor(found, error * error, t, bound),
        note=note,
    )


def _round_up(value: float) -> int:
    """To two digits."""
    step = 10 ** max(math.floor(math.log10(max(value, 1.0))) - 1, 0)
    return math.ceil(value / step) * step

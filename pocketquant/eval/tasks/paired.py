"""Compares two models on the same items: whether one got more of them right, and whether so few items could show it.

Only the items on which the two differ carry information. If the models are equally good, each of these is lost or
gained with probability 1/2, so the test is exact for any number of them.

Source: Q. McNemar, Note on the sampling error of the difference between correlated proportions (1947); the exact form
is the two-sided sign test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, lgamma, log

import numpy as np

ALPHA = 0.05
POWER = 0.8


@dataclass(frozen=True)
class Paired:
    """A yes-or-no measure of the same items under two models.

    Attributes:
        items: how many.
        model: share of yes under the model judged.
        reference: share of yes under the reference.
        difference: model - reference.
        standard_error: of the difference, from the items' own differences.
        lost: yes under the reference, no under the model.
        gained: the other way round.
        p_value: two-sided exact McNemar.
        smallest_effect: the smallest true difference (as a share of all items) that a test at 5 % finds in 80 of 100
            such runs, if as many items differ as did here; None if no difference of so few items would be found.
    """

    items: int
    model: float
    reference: float
    difference: float
    standard_error: float
    lost: int
    gained: int
    p_value: float
    smallest_effect: float | None


def pair_answers(model: Sequence[bool], reference: Sequence[bool]) -> Paired:
    """Compares two lists of yes and no, item by item; at least one item."""
    ours, theirs = np.array(model, np.float64), np.array(reference, np.float64)
    lost, gained = int((theirs > ours).sum()), int((ours > theirs).sum())
    difference, standard_error = mean_difference(model, reference)
    return Paired(
        items=len(ours),
        model=float(ours.mean()),
        reference=float(theirs.mean()),
        difference=difference,
        standard_error=standard_error,
        lost=lost,
        gained=gained,
        p_value=mcnemar(lost, gained),
        smallest_effect=smallest_effect(len(ours), lost + gained),
    )


def mean_difference(model: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Mean of model - reference over the items, and its standard error; 0 for a single item."""
    differences = np.array(model, np.float64) - np.array(reference, np.float64)
    n = len(differences)
    return float(differences.mean()), float(differences.std(ddof=1) / n**0.5) if n > 1 else 0.0


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p-value that as many items are lost as gained by chance."""
    n = lost + gained
    tail = sum(comb(n, i) for i in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**n)


def smallest_effect(items: int, differing: int) -> float | None:
    """What share of all items the difference must be for the exact test to find it with a power of 80 %.

    Of `differing` items all on one side may still be too few for the test (5 give p = 0.06); then it is the fewest
    that it can find.
    """
    while mcnemar(0, differing) > ALPHA:
        differing += 1
    if differing > items:
        return None
    needed = _fewest_on_one_side(differing)
    low, high = 0.5, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _tail(differing, needed, middle) >= POWER else (middle, high)
    return (2 * high - 1) * differing / items


def _fewest_on_one_side(n: int) -> int:
    tail, side = 1, n
    while side > n // 2 and 2 * (tail + comb(n, side - 1)) <= ALPHA * 2**n:
        side -= 1
        tail += comb(n, side)
    return side


def _tail(n: int, least: int, p: float) -> float:
    """Probability of `least` or more of n, each with probability 0 < p <= 1."""
    if p >= 1:
        return 1.0
    logs = [
        lgamma(n + 1) - lgamma(i + 1) - lgamma(n - i + 1) + i * log(p) + (n - i) * log(1 - p)
        for i in range(least, n + 1)
    ]
    return float(np.exp(logs).sum())

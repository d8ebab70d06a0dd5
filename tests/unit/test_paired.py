"""Paired comparison of yes-and-no answers: exact probabilities against counting by hand."""

from __future__ import annotations

from itertools import product

import pytest

from pocketquant.eval.tasks.paired import ALPHA, POWER, mcnemar, mean_difference, pair_answers, smallest_effect


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 0), (0, 6), (3, 3), (2, 9), (8, 1)])
def test_mcnemar_equals_counting_all_outcomes(lost: int, gained: int) -> None:
    n = lost + gained
    outcomes = [sum(each) for each in product((0, 1), repeat=n)]
    extreme = sum(abs(2 * losses - n) >= abs(lost - gained) for losses in outcomes)
    assert mcnemar(lost, gained) == pytest.approx(extreme / len(outcomes))
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


def test_mcnemar_of_many_items_neither_overflows_nor_vanishes() -> None:
    assert mcnemar(3000, 3000) == 1
    assert 0 < mcnemar(2700, 3300) < 1e-13


def test_pairs_are_counted_both_ways() -> None:
    reference = [True, True, True, False, False, True, False, True]
    model = [True, False, False, True, False, True, False, False]
    paired = pair_answers(model, reference)
    assert (paired.items, paired.lost, paired.gained) == (8, 3, 1)
    assert (paired.model, paired.reference) == (3 / 8, 5 / 8)
    assert paired.difference == pytest.approx(-0.25)
    # differences: -1 three times, +1 once, 0 four times
    assert paired.standard_error == pytest.approx(((4 - 8 * 0.25**2) / 7 / 8) ** 0.5)
    assert paired.p_value == pytest.approx(10 / 16)


def test_means_of_numbers_are_compared_item_by_item() -> None:
    difference, error = mean_difference([-2.0, -3.0, -7.0], [-1.0, -3.5, -6.0])
    assert difference == pytest.approx(-0.5)
    assert error == pytest.approx((0.75 / 3) ** 0.5)
    assert mean_difference([1.0], [3.0]) == (-2.0, 0.0)


def test_the_smallest_effect_has_the_power_that_it_states() -> None:
    """Counted exactly: the chance that the two-sided test finds it, were it true."""
    from math import comb

    for differing in (6, 20, 75):
        effect = smallest_effect(500, differing)
        assert effect is not None
        p = (1 + effect * 500 / differing) / 2
        found = sum(
            comb(differing, lost) * p**lost * (1 - p) ** (differing - lost)
            for lost in range(differing // 2, differing + 1)
            if mcnemar(lost, differing - lost) <= ALPHA
        )
        assert found == pytest.approx(POWER, abs=1e-6)


def test_few_items_can_show_nothing_and_more_can_show_less() -> None:
    assert smallest_effect(5, 0) is None
    assert smallest_effect(5, 5) is None
    none_differ = smallest_effect(100, 0)
    assert none_differ is not None
    assert 0.05 < none_differ <= 0.06  # of six that differ, nearly all on one side
    effects = [smallest_effect(1000, differing) for differing in (10, 50, 200)]
    assert None not in effects
    assert effects == sorted(effects, key=float)

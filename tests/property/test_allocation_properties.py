"""The selection under a budget: equal to a full dynamic programme, never over it, never worse with more bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketquant.quant.knapsack import MOST_LOSS, Selection, select

Problem = tuple[list[list[int]], list[list[int]]]


@st.composite
def problems(draw: st.DrawFn, most_items: int = 7, most_bytes: int = 40, most_loss: int = 40) -> Problem:
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=most_items))
    nbytes = [draw(st.lists(st.integers(0, most_bytes), min_size=n, max_size=n)) for n in lengths]
    loss = [draw(st.lists(st.integers(0, most_loss), min_size=n, max_size=n)) for n in lengths]
    return nbytes, loss


def least_loss(nbytes: list[list[int]], loss: list[list[int]], budget: int) -> int | None:
    """The definition: a table over every reachable number of bytes."""
    table = {0: 0}
    for sizes, losses in zip(nbytes, loss, strict=True):
        grown: dict[int, int] = {}
        for used, lost in table.items():
            for size, more in zip(sizes, losses, strict=True):
                if used + size <= budget:
                    grown[used + size] = min(lost + more, grown.get(used + size, lost + more))
        table = grown
    return min(table.values()) if table else None


def check_sums(found: Selection, nbytes: list[list[int]], loss: list[list[int]], budget: int) -> None:
    assert found.nbytes == sum(sizes[i] for sizes, i in zip(nbytes, found.choices, strict=True)) <= budget
    assert found.loss == sum(losses[i] for losses, i in zip(loss, found.choices, strict=True))


@settings(max_examples=400, deadline=None)
@given(problems(), st.integers(0, 250))
def test_small_problems_equal_the_table(problem: Problem, budget: int) -> None:
    nbytes, loss = problem
    expected = least_loss(nbytes, loss, budget)
    if expected is None:
        with pytest.raises(ValueError, match="smallest choices"):
            select(nbytes, loss, budget)
        return
    found = select(nbytes, loss, budget)
    check_sums(found, nbytes, loss, budget)
    assert found.loss == found.lower_bound == expected


def like_a_model(seed: int, n_items: int, n_large: int) -> Problem:
    """Few shapes, formats of fixed bytes per block, sensitivities over two orders; `n_large` items like embeddings."""
    rng = np.random.default_rng(seed)
    blocks, error = np.array([11, 14, 18, 21, 27]), np.array([4500, 1000, 320, 63, 7])
    sizes = rng.choice([1, 3, 4, 12, 16], n_items)
    sizes[:n_large] = 40 * n_items // 10 + rng.integers(0, 9, n_large)
    weights = rng.lognormal(0, 1.2, n_items) * sizes
    return [(blocks * size).tolist() for size in sizes], [(error * weight).astype(int).tolist() for weight in weights]


@pytest.mark.parametrize("n_large", [0, 1, 2])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 20), part=st.floats(0, 1))
def test_problems_like_models_equal_the_table(n_large: int, seed: int, part: float) -> None:
    nbytes, loss = like_a_model(seed, 30, n_large)
    least, most = sum(min(sizes) for sizes in nbytes), sum(max(sizes) for sizes in nbytes)
    budget = int(least + part * (most - least))
    found = select(nbytes, loss, budget)
    check_sums(found, nbytes, loss, budget)
    assert found.loss == found.lower_bound == least_loss(nbytes, loss, budget)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 20), st.lists(st.integers(0, 20_000), min_size=2, max_size=6))
def test_more_bytes_never_lose_more(seed: int, budgets: list[int]) -> None:
    nbytes, loss = like_a_model(seed, 60, 1)
    least = sum(min(sizes) for sizes in nbytes)
    losses = [select(nbytes, loss, least + budget).loss for budget in sorted(budgets)]
    assert losses == sorted(losses, reverse=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 20), st.floats(0, 1))
def test_a_search_cut_short_is_honest_about_its_gap(seed: int, part: float) -> None:
    """Loss that follows from the bytes: every selection of one size is as good as the next, the hardest kind."""
    rng = np.random.default_rng(seed)
    nbytes = [sorted(rng.integers(1, 400, 4).tolist()) for _ in range(12)]
    loss = [[1000 - size for size in sizes] for sizes in nbytes]
    least, most = sum(sizes[0] for sizes in nbytes), sum(sizes[-1] for sizes in nbytes)
    budget = int(least + part * (most - least))
    found = select(nbytes, loss, budget, max_states=1)
    check_sums(found, nbytes, loss, budget)
    expected = least_loss(nbytes, loss, budget)
    assert expected is not None
    assert found.lower_bound <= expected <= found.loss


def test_a_thousand_tensors_are_solved_to_the_end() -> None:
    for seed in range(5):
        nbytes, loss = like_a_model(seed, 1000, 2)
        least, most = sum(min(sizes) for sizes in nbytes), sum(max(sizes) for sizes in nbytes)
        found = select(nbytes, loss, (least + most) // 2)
        check_sums(found, nbytes, loss, (least + most) // 2)
        assert found.loss == found.lower_bound


def test_losses_too_large_to_add_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to more"):
        select([[1], [1]], [[MOST_LOSS], [1]], 10)

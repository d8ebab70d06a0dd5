"""One choice for each item, least loss within a budget of bytes: the multiple-choice knapsack problem, exactly.

After the idea of D. Pisinger, "A minimal algorithm for the multiple-choice knapsack problem" (European Journal of
Operational Research 83, 1995): the linear relaxation is solved first, and the exact search is a dynamic programme that
takes up items only as long as they can matter. Here the bounds are Lagrangian. With a price per byte from the
relaxation, every choice has a reduced cost, which is 0 for the choices of the relaxed solution. A selection's loss
exceeds the lower bound by its reduced costs and the price of its unused bytes, so a choice whose reduced cost alone
reaches the gap between the bound and the best selection known is out, whatever the rest does. Items whose every other
choice is out are never taken up.

The gap is wide where one item is large beside the budget (an embedding). So the few largest items are decided first,
by branch and bound; the programme fills up the rest, for which the gap is narrow.

All sums are of integers, so equal problems have equal answers on every machine; floating point only prunes, with a
margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from math import ceil

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

MAX_STATES = 1 << 21
"""States to look at. A problem that needs more gets the best selection found, and how far from the best it can be."""

MOST_LOSS = 1 << 40
"""Upper limit of the sum of the items' largest losses: the rounding of a bound stays far below one unit of it."""

_LESS = 0.5
"""A selection that is better is better by one unit; half of one is left for rounding."""

_WIDEST, _NARROW = 1 << 17, 1 << 9
"""States kept after an item, while there are states left to look at and afterwards."""

_N_LARGE, _LARGE = 4, 1 / 32
"""How many items are decided by branching, and from which part of the bytes at stake."""

_PRICES = np.array([0.5, 0.8, 0.9, 0.96, 0.99, 1.0, 1.01, 1.04, 1.1, 1.25, 2.0])
"""Multiples of the relaxation's price that bound as well; the far ones catch states far from the budget."""


@dataclass(frozen=True)
class Selection:
    """One choice for each item.

    Attributes:
        choices: index into each item's choices.
        nbytes: sum of the chosen sizes.
        loss: sum of the chosen losses.
        lower_bound: no selection within the budget loses less; equal to `loss` where the search was completed.
        n_states: states the search looked at.
    """

    choices: tuple[int, ...]
    nbytes: int
    loss: int
    lower_bound: int
    n_states: int = 0


@dataclass(frozen=True)
class _Item:
    """An item's undominated choices: `nbytes` ascending, `loss` descending, `original` their indices."""

    nbytes: IntArray
    loss: IntArray
    original: IntArray


@dataclass(frozen=True)
class _Step:
    """From one choice of an item to the next on its convex hull: the loss that each of its bytes saves."""

    price: float
    item: int
    choice: int
    nbytes: int


@dataclass(frozen=True)
class _Start:
    """The relaxed problem's solution without its fractional step: choices, their sums, the price of a byte."""

    choices: tuple[int, ...]
    nbytes: int
    loss: int
    price: float

    def lower_bound(self, budget: int) -> float:
        return self.loss - self.price * (budget - self.nbytes)


def select(
    nbytes: Sequence[Sequence[int]], loss: Sequence[Sequence[int]], budget: int, max_states: int = MAX_STATES
) -> Selection:
    """Finds one choice for each item so that the losses' sum is least and the sizes' sum is at most `budget`.

    Args:
        nbytes: for each item, the size of each choice, not negative.
        loss: for each item, the loss of each choice, not negative; the items' largest ones sum to `MOST_LOSS` at most.
        budget: bytes.
        max_states: how many to look at before the search narrows. Where they do not suffice, the answer is the best
            one found, and `lower_bound` tells how far from the best possible it can be at most.

    Raises:
        ValueError: the smallest choices are too large together, or the losses are too large to add.
    """
    items = [_undominated(np.asarray(b, np.int64), np.asarray(v, np.int64)) for b, v in zip(nbytes, loss, strict=True)]
    if sum(int(item.loss[0]) for item in items) > MOST_LOSS:
        raise ValueError(f"losses add up to more than {MOST_LOSS}")
    smallest = sum(int(item.nbytes[0]) for item in items)
    if smallest > budget:
        raise ValueError(f"the smallest choices take {smallest} bytes, the budget is {budget}")

    steps, large = _steps(items), _largest(items)
    start = _relax(items, steps, {}, budget)
    best, best_loss, lower_bound, n_states = start.choices, start.loss, float("inf"), 0
    queue: list[tuple[float, tuple[int, ...], _Start]] = [(start.lower_bound(budget), (), start)]
    while queue:
        bound, fixed, start = heappop(queue)
        if bound > best_loss - _LESS:
            break
        if len(fixed) < len(large):
            item = large[len(fixed)]
            for choice in range(len(items[item].loss)):
                deeper = (*fixed, choice)
                found = _relax(items, steps, dict(zip(large, deeper, strict=False)), budget)
                if found.nbytes <= budget:
                    if found.loss < best_loss:
                        best, best_loss = found.choices, found.loss
                    heappush(queue, (found.lower_bound(budget), deeper, found))
            continue
        moves, dropped, seen = _search(items, start, set(large), budget, best_loss, max_states - n_states)
        n_states += seen
        lower_bound = min(lower_bound, dropped)
        if moves is not None:
            best = tuple(moves.get(i, choice) for i, choice in enumerate(start.choices))
            best_loss = sum(int(item.loss[i]) for item, i in zip(items, best, strict=True))
    return Selection(
        tuple(int(item.original[i]) for item, i in zip(items, best, strict=True)),
        sum(int(item.nbytes[i]) for item, i in zip(items, best, strict=True)),
        best_loss,
        best_loss if lower_bound > best_loss - 1 + _LESS else max(0, ceil(lower_bound - _LESS)),
        n_states,
    )


def _undominated(nbytes: IntArray, loss: IntArray) -> _Item:
    order = np.lexsort((loss, nbytes))
    kept, least = [], None
    for i in order:
        if least is None or loss[i] < least:
            kept.append(i)
            least = loss[i]
    index = np.array(kept, np.int64)
    return _Item(nbytes[index], loss[index], index)


def _largest(items: Sequence[_Item]) -> list[int]:
    """The few items that move a large part of all the bytes at stake, the largest first."""
    stakes = [int(item.nbytes[-1] - item.nbytes[0]) for item in items]
    order = sorted(range(len(items)), key=lambda i: -stakes[i])
    return [i for i in order[:_N_LARGE] if stakes[i] > _LARGE * sum(stakes)] if len(items) > 2 * _N_LARGE else []


def _steps(items: Sequence[_Item]) -> list[_Step]:
    """The steps along the items' lower convex hulls, those that save most loss per byte first."""
    steps = []
    for i, item in enumerate(items):
        size, loss = item.nbytes.tolist(), item.loss.tolist()
        hull: list[int] = []
        for c in range(len(size)):
            while len(hull) > 1:
                a, b = hull[-2], hull[-1]
                if (loss[a] - loss[b]) * (size[c] - size[b]) > (loss[b] - loss[c]) * (size[b] - size[a]):
                    break
                hull.pop()
            hull.append(c)
        for a, b in pairwise(hull):
            steps.append(_Step((loss[a] - loss[b]) / (size[b] - size[a]), i, b, size[b] - size[a]))
    return sorted(steps, key=lambda step: (-step.price, step.item))


def _relax(items: Sequence[_Item], steps: Sequence[_Step], fixed: dict[int, int], budget: int) -> _Start:
    """Takes the steps in order until one does not fit; the items in `fixed` stay at their choice."""
    chosen = [fixed.get(i, 0) for i in range(len(items))]
    used = sum(int(item.nbytes[c]) for item, c in zip(items, chosen, strict=True))
    price = 0.0
    for step in steps:
        if step.item in fixed:
            continue
        if used + step.nbytes > budget:
            price = step.price
            break
        chosen[step.item] = step.choice
        used += step.nbytes
    loss = sum(int(item.loss[c]) for item, c in zip(items, chosen, strict=True))
    return _Start(tuple(chosen), used, loss, price)


@dataclass(frozen=True)
class _Stage:
    """What the search knows after an item: which state each state came from, and the choice it made."""

    item: int
    parent: npt.NDArray[np.int32]
    choice: npt.NDArray[np.int8]


def _search(
    items: Sequence[_Item], start: _Start, fixed: set[int], budget: int, best_loss: int, max_states: int
) -> tuple[dict[int, int] | None, float, int]:
    """Searches the selections around `start` for one that loses less than `best_loss`.

    A state is a whole selection: what was decided for the items taken up, and `start` for all others.

    Returns:
        Item -> choice for items that were taken up, None if nothing better was found; a lower bound of what was not
        looked at; the number of states.
    """
    free = [i for i in range(len(items)) if i not in fixed]
    slack, price = budget - start.nbytes, start.price
    sizes = [items[i].nbytes - items[i].nbytes[start.choices[i]] for i in free]
    losses = [items[i].loss - items[i].loss[start.choices[i]] for i in free]
    costs = [loss + price * size for size, loss in zip(sizes, losses, strict=True)]  # the reduced costs
    nearest = np.array(
        [np.delete(cost, start.choices[i]).min(initial=np.inf) for i, cost in zip(free, costs, strict=True)]
    )
    order = np.argsort(nearest, kind="stable")
    prices = price * _PRICES
    ahead = _least_ahead(order, sizes, losses, prices)

    used, lost = np.zeros(1, np.int64), np.zeros(1, np.int64)  # the states, relative to `start`
    best, best_at = best_loss - start.loss, None  # after how many stages and in which state it was found
    stages: list[_Stage] = []
    dropped, n_states = float("inf"), 1
    for k, i in enumerate(order):
        limit = best + price * slack - _LESS
        if nearest[i] > limit:
            break
        moves = np.flatnonzero(costs[i] <= limit)
        used = (used + sizes[i][moves][:, None]).reshape(-1)
        lost = (lost + losses[i][moves][:, None]).reshape(-1)
        bounds = np.full(len(used), -np.inf)
        for price_here, rest in zip(prices, ahead[k + 1], strict=True):
            np.maximum(bounds, lost + price_here * (used - slack) + rest, out=bounds)
        fitting = np.flatnonzero(used <= slack)
        found = fitting[np.lexsort((used[fitting], lost[fitting]))[:1]]
        is_better = len(found) > 0 and int(lost[found[0]]) < best
        if is_better:
            best = int(lost[found[0]])
            bounds[found] = -np.inf
        kept = np.flatnonzero(bounds <= best - _LESS)
        if not len(kept):
            break
        kept = kept[_undominated_states(used[kept], lost[kept])]
        kept, least_dropped = _likeliest(kept, bounds, _WIDEST if n_states < max_states else _NARROW)
        dropped = min(dropped, least_dropped)
        move, parent = np.divmod(kept, len(used) // len(moves))
        stages.append(_Stage(free[i], parent.astype(np.int32), moves[move].astype(np.int8)))
        n_states += len(used)
        used, lost = used[kept], lost[kept]
        if is_better:
            best_at = len(stages), int(np.searchsorted(used, slack, side="right")) - 1

    if best_at is None:
        return None, start.loss + dropped, n_states
    return _choices_of(stages[: best_at[0]], best_at[1]), start.loss + dropped, n_states


def _likeliest(kept: IntArray, bounds: npt.NDArray[np.float64], most: int) -> tuple[IntArray, float]:
    """The states with the lowest bounds, `most` of them, in their order; and the lowest bound of those left out."""
    if len(kept) <= most:
        return kept, float("inf")
    likely = np.sort(np.argsort(bounds[kept], kind="stable")[:most])
    return kept[likely], float(np.delete(bounds[kept], likely).min())


def _least_ahead(
    order: npt.NDArray[np.intp], sizes: Sequence[IntArray], losses: Sequence[IntArray], prices: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """f64[n_item + 1, n_price]: the least that the items from the k-th on can add to loss + price * bytes."""
    ahead = np.zeros((len(order) + 1, len(prices)))
    for k in range(len(order) - 1, -1, -1):
        ahead[k] = ahead[k + 1] + (losses[order[k]][:, None] + prices * sizes[order[k]][:, None]).min(axis=0)
    return ahead


def _choices_of(stages: Sequence[_Stage], state: int) -> dict[int, int]:
    """Item -> choice along the way to a state of the last stage."""
    chosen: dict[int, int] = {}
    for stage in reversed(stages):
        chosen[stage.item] = int(stage.choice[state])
        state = int(stage.parent[state])
    return chosen


def _undominated_states(used: IntArray, lost: IntArray) -> IntArray:
    """Indices of the states that no other one beats in bytes and loss at once, by ascending bytes."""
    order = np.argsort(used, kind="stable")
    used, lost = used[order], lost[order]
    better = np.flatnonzero(np.concatenate([[True], lost[1:] < np.minimum.accumulate(lost)[:-1]]))
    last_of_its_size = np.concatenate([used[better][1:] != used[better][:-1], [True]])
    return order[better[last_of_its_size]]

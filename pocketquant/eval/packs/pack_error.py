"""The loss of a reference pack, measured while it is made, on a share of its positions.

Two things are measured: the divergence of the pack's logits from the live ones, and its effect on the divergence of a
slightly worse model. That model is the reference with equal noise on all its logits. The share of its divergence that
the pack misses is about the share that the pack misses of a quantized file's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.errors import EvalError
from pocketquant.eval.metrics import Positions, score_rows
from pocketquant.eval.packs.pack import Floor
from pocketquant.formats import F32Array

_NOISE = 0.05
"""Standard deviation, in nats, of the worse model's noise: a divergence of 0.00125."""


class FloorMeter:
    """Sums up the loss of a pack over groups of rows; the same groups give the same floor."""

    def __init__(self) -> None:
        self._own: list[npt.NDArray[np.float64]] = []
        self._whole: list[npt.NDArray[np.float64]] = []
        self._seen: list[npt.NDArray[np.float64]] = []
        self._n_group = 0
        self._is_misleading = False

    def add(self, live: F32Array, give: Callable[[F32Array], F32Array]) -> None:
        """Measures at f32[n, n_vocab] positions.

        Args:
            live: the reference's logits.
            give: the pack's logits in their place, as they are when a model's logits f32[n, n_vocab] are judged.
        """
        noise = np.random.default_rng(self._n_group).standard_normal(live.shape, dtype=np.float32)
        worse = live + np.float32(_NOISE) * noise
        self._n_group += 1
        own, whole, seen = (_score(*pair) for pair in ((live, give(live)), (worse, live), (worse, give(worse))))
        is_finite = own["is_finite_model"] & own["is_finite_reference"]
        self._is_misleading |= bool((own["is_finite_model"] != own["is_finite_reference"]).any())
        for kept, scored in ((self._own, own), (self._whole, whole), (self._seen, seen)):
            kept.append(np.maximum(scored["kld_nats"][is_finite], 0.0))

    def state(self) -> dict[str, Any]:
        """All that was measured, for JSON; `take_up` goes on from it, to the same floor."""
        lists = {name: np.concatenate([*kept, np.zeros(0)]).tolist() for name, kept in self._lists().items()}
        return {**lists, "groups": self._n_group, "is_misleading": self._is_misleading}

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Goes on from what another one had measured.

        Raises:
            EvalError: it is none of that.
        """
        try:
            for name, kept in self._lists().items():
                kept[:] = [np.array(state[name], np.float64).reshape(-1)]
            self._n_group, self._is_misleading = int(state["groups"]), bool(state["is_misleading"])
        except (KeyError, TypeError, ValueError) as error:
            raise EvalError(f"what was saved of the pack's floor cannot be read ({error}); begin anew") from error

    def _lists(self) -> dict[str, list[npt.NDArray[np.float64]]]:
        return {"own": self._own, "whole": self._whole, "seen": self._seen}

    def floor(self) -> Floor:
        """What was found; infinitely far where the pack and the reference differ in which positions are finite."""
        own, whole, seen = (np.concatenate([*kept, np.zeros(0)]) for kept in (self._own, self._whole, self._seen))
        if self._is_misleading or not own.size:
            return Floor(np.inf, np.inf, np.inf, 0.0, 0)
        return Floor(
            kld_mean=_rounded_up(float(own.mean())),
            kld_max=_rounded_up(float(own.max())),
            shift=_rounded_up(float(np.abs(seen - whole).mean())),
            captured=round(float(seen.mean() / whole.mean()), 3),
            positions=own.size,
        )


def mean_divergence(live: F32Array, given: F32Array) -> float:
    """Mean KL divergence of the finite rows; inf if there are none, or if the two differ in which rows are finite."""
    scored = _score(given, live)
    is_finite = scored["is_finite_reference"]
    if not is_finite.any() or (is_finite != scored["is_finite_model"]).any():
        return float("inf")
    return float(scored["kld_nats"][is_finite].mean())


def _score(model: F32Array, reference: F32Array) -> Positions:
    return score_rows(model, reference, np.zeros(len(reference), np.int32))


def _rounded_up(value: float) -> float:
    """To one digit: the others depend on the order in which the library at hand sums up."""
    if value <= 0:
        return 0.0
    power = int(np.floor(np.log10(value)))
    return float(f"{int(np.ceil(round(value / 10.0**power, 6)))}e{power}")

"""Why a plan is as it is: what each role takes and is predicted to lose, and what the next change would do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from pocketquant.formats import FORMATS
from pocketquant.model import Model, Plan, PlannedTensor, padded
from pocketquant.quant.allocation import Options, list_options
from pocketquant.quant.loss_table import LossTable
from pocketquant.quant.recipe_text import Place
from pocketquant.quant.sensitivity import Sensitivity


@dataclass(frozen=True)
class Change:
    """One place in another format: bytes and predicted loss relative to the plan.

    Attributes:
        file_bytes: size of the whole file after it.
    """

    layer: int | None
    before: str
    after: str
    nbytes: int
    loss: float
    file_bytes: int


@dataclass(frozen=True)
class RoleShare:
    """What one role takes of the file and of the predicted loss.

    Attributes:
        loss_share: part of the plan's predicted loss, 0 to 1.
        formats: format -> number of tensors.
        cheaper: the one step down that loses least per byte saved; None where there is none.
        dearer: the one step up that saves most loss per byte.
    """

    role: str
    n_weights: int
    nbytes: int
    bits_per_weight: float
    loss: float
    loss_share: float
    formats: dict[str, int]
    cheaper: Change | None
    dearer: Change | None


@dataclass(frozen=True)
class Explanation:
    """A plan's size and predicted loss (nats a token, of the weights alone), role by role, the largest loss first."""

    file_bytes: int
    bits_per_weight: float
    predicted_loss: float
    sensitivity: str
    roles: tuple[RoleShare, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def explain(plan: Plan, model: Model, sensitivity: Sensitivity | LossTable, device: str = "phone") -> Explanation:
    """Explains any plan of a model, whether it was made to a target or by a recipe.

    Raises:
        RecipeError: roles that the table has no sensitivity for, or formats that it has no error for.
    """
    prediction = sensitivity.predict(model)
    options = {option.place: option for option in list_options(model, prediction, device)}
    places: dict[Place, list[PlannedTensor]] = {}
    for item in plan.tensors:
        if (item.tensor.role, item.tensor.layer) in options and not item.tensor.keep_f32:
            places.setdefault((item.tensor.role, item.tensor.layer), []).append(item)
    losses = {
        item.tensor.name: prediction.loss(item.tensor, item.format.name) for items in places.values() for item in items
    }
    total = sum(losses.values())
    shares = []
    for role in dict.fromkeys(role for role, _ in places):
        own = {place: items for place, items in places.items() if place[0] is role}
        items = [item for group in own.values() for item in group]
        n_weights, nbytes = sum(prod(i.tensor.shape) for i in items), sum(i.nbytes for i in items)
        loss = sum(losses[item.tensor.name] for item in items)
        steps = [
            step
            for place, group in own.items()
            for step in _steps(options[place], group, sum(losses[i.tensor.name] for i in group), plan.file_bytes)
        ]
        down = [step for step in steps if step.nbytes < 0]
        up = [step for step in steps if step.nbytes > 0]
        shares.append(
            RoleShare(
                role.value,
                n_weights,
                nbytes,
                8 * nbytes / n_weights,
                loss,
                loss / total if total else 0.0,
                {name: n for name in FORMATS if (n := sum(item.format.name == name for item in items))},
                min(down, key=lambda step: step.loss / -step.nbytes, default=None),
                min(up, key=lambda step: step.loss / step.nbytes, default=None),
            )
        )
    shares.sort(key=lambda share: -share.loss)
    return Explanation(plan.file_bytes, plan.bits_per_weight, total, sensitivity.source, tuple(shares))


def _steps(option: Options, items: list[PlannedTensor], loss: float, file_bytes: int) -> list[Change]:
    """The next smaller and the next larger format on offer for one place."""
    now = sum(padded(item.nbytes) for item in items)
    before = "+".join(sorted({item.format.name for item in items}))
    changes = [
        Change(option.place[1], before, name, nbytes - now, lost - loss, file_bytes + nbytes - now)
        for name, nbytes, lost in zip(option.formats, option.nbytes, option.loss, strict=True)
    ]
    smaller = [change for change in changes if change.nbytes < 0]
    larger = [change for change in changes if change.nbytes > 0]
    return smaller[-1:] + larger[:1]

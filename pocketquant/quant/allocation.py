"""A target size as the input: every tensor gets the format, of those that suit a phone or any device, by which the
whole file fits and the predicted loss is least.

What a choice costs comes from `prediction` (statistics of this model) or `sensitivity` (figures of others), the best of
all choices from `knapsack`, and the result is an ordinary recipe, planned like any other. The table of formats
(`QuantFormat.offered`, `fast_on`) says which may be chosen for a device: for phones those that ARM CPUs have fast
kernels for, and F16, which pays for the few weights that steer DeltaNet and above 8.5 bits per weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from pocketquant.architectures.qwen35_mtp import MTP_LEAST
from pocketquant.errors import RecipeError
from pocketquant.formats import FORMATS, offered_formats
from pocketquant.model import Allocation, Model, Plan, Role, Tensor, Value, padded
from pocketquant.quant.applying import apply_recipe
from pocketquant.quant.choosing import Choice, Target
from pocketquant.quant.knapsack import MOST_LOSS, select
from pocketquant.quant.loss_table import LossTable
from pocketquant.quant.recipe import Recipe
from pocketquant.quant.recipe_text import Place, check_types, recipe_of_types
from pocketquant.quant.sensitivity import LossByRole, read_sensitivity

FORMATS_ON_OFFER = tuple(item.name for item in offered_formats())
"""By ascending size. By figures of other models, IQ4_NL is offered only where a row does not fit the others."""

_SMALLEST = FORMATS_ON_OFFER[0]

DEVICES = {
    "phone": frozenset({_SMALLEST} | {item.name for item in offered_formats() if "arm" in item.fast_on}),
    "any": frozenset(FORMATS_ON_OFFER),
}
"""What a file is for -> formats that run fast there, and for phones the smallest one, which need not."""

SMALL_TARGET = 4.75
"""Below so many bits per weight, or where nothing else fits, phones are offered the smallest format (Q3_K) although it
is slow there. On the published figures it saves nothing above: 0.1 % of the predicted loss at 4.7 bits for 4B, nothing
for 0.8B. Below it saves up to a tenth."""

CLOSE_ENOUGH = 0.005
"""A target above the largest file by more than this part of it cannot be reached."""


@dataclass(frozen=True)
class Options:
    """The formats that one place can have, by ascending size, with the bytes and the predicted loss of each."""

    place: Place
    formats: tuple[str, ...]
    nbytes: tuple[int, ...]
    loss: tuple[float, ...]


def list_options(model: Model, prediction: LossByRole | LossTable, device: str = "phone") -> list[Options]:
    """What each place of a model can be; the tensors kept in F32 are no places."""
    if device not in DEVICES:
        raise RecipeError(f"unknown device {device!r}; there is: {', '.join(DEVICES)}")
    places: dict[Place, list[Tensor]] = {}
    for tensor in model.tensors:
        if not tensor.keep_f32:
            places.setdefault((tensor.role, tensor.layer), []).append(tensor)
    options = []
    for place, tensors in places.items():
        n_layer = model.sizes["n_layer"]
        formats = tuple(
            name
            for name in FORMATS_ON_OFFER
            if name in DEVICES[device]
            and all(prediction.has(tensor, name) and _can_be(tensor, name, n_layer) for tensor in tensors)
            and not (name == "IQ4_NL" and isinstance(prediction, LossByRole) and _has_superblocks(tensors))
        )
        options.append(
            Options(
                place,
                formats,
                tuple(sum(_bytes(tensor, name) for tensor in tensors) for name in formats),
                tuple(sum(prediction.loss(tensor, name) for tensor in tensors) for name in formats),
            )
        )
    return options


def _can_be(tensor: Tensor, name: str, n_layer: int) -> bool:
    chosen = FORMATS[name]
    if tensor.role is Role.VISION_PATCH:
        return chosen.convolves
    if tensor.layer is not None and tensor.layer >= n_layer:
        return chosen.fits(tensor.n_cols) and chosen.bits_per_weight >= FORMATS[MTP_LEAST].bits_per_weight
    return chosen.fits(tensor.n_cols)


def _has_superblocks(tensors: list[Tensor]) -> bool:
    return all(FORMATS["Q4_K"].fits(tensor.n_cols) for tensor in tensors)


def _bytes(tensor: Tensor, name: str) -> int:
    return padded(tensor.n_rows * FORMATS[name].row_bytes(tensor.n_cols))


def plan_to_target(
    model: Model, choice: Choice, metadata_extra: Mapping[str, Value] | None = None, recipe_name: str | None = None
) -> Plan:
    """Plans the file that loses least, by prediction, among those that are not larger than the choice's target.

    Args:
        model: the opened source.
        choice: its target is bytes of the whole file, header and alignment included, or bits per weight, counting the
            alignment; its figures are what is predicted with, None for the table that comes with the package.
        metadata_extra: keys to add to the model's own. What the file's rounding adds
            (`rounding.encoding.rounding_metadata`) belongs here, so that the size is decided with it.
        recipe_name: what the file says it was made by; None for one that says the target.

    Returns:
        The plan, which says in `allocation` how near it comes; its weights are not yet rounded by statistics.

    Raises:
        RecipeError: the target is beyond what the formats reach (the range is named), roles without a sensitivity, or
            what `apply_recipe` raises.
    """
    target, importance = choice.target, choice.importance
    if target is None:
        raise RecipeError("the choice names no size to plan for")
    name = recipe_name or target.recipe_name
    prediction = (choice.figures or read_sensitivity()).predict(model)
    options = list_options(model, prediction, choice.device)
    if not options:
        raise RecipeError("the model has no tensor whose type could be chosen")
    # All plans have one name and so one length of header, but for the keys of an importance matrix, which nothing
    # uses where no tensor is quantized; the smallest plan has them.
    least = _recipe(model, name, target, options, [0] * len(options))
    smallest = apply_recipe(model, least, importance, metadata_extra)
    kept = sum(padded(item.nbytes) for item in smallest.tensors if item.tensor.keep_f32)
    budget = _budget(model, target, len(smallest.header), kept, options)
    if "arm" not in FORMATS[_SMALLEST].fast_on and choice.device == "phone":
        options = _without_smallest(model, options, budget)

    total = sum(max(option.loss) for option in options)
    unit = total / (MOST_LOSS - 2 * len(options)) or 1.0
    found = select([o.nbytes for o in options], [[round(x / unit) for x in o.loss] for o in options], budget)
    recipe = _recipe(model, name, target, options, found.choices)
    planned = apply_recipe(model, recipe, importance, metadata_extra)
    loss = sum(option.loss[i] for option, i in zip(options, found.choices, strict=True))
    least_loss = loss * (found.lower_bound / found.loss if found.loss else 1.0)
    return replace(planned, allocation=Allocation(str(target), _fill(planned, target), loss, least_loss))


def _fill(planned: Plan, target: Target) -> float:
    """The part of the target that a plan uses."""
    if target.file_bytes is not None:
        return planned.file_bytes / target.file_bytes
    return planned.bits_per_weight / (target.bits_per_weight or 1)


def _without_smallest(model: Model, options: list[Options], budget: int) -> list[Options]:
    """The options without the smallest format, unless the budget is small."""
    n_weights = sum(prod(tensor.shape) for tensor in model.tensors if not tensor.keep_f32)
    fast = [
        replace(option, formats=option.formats[1:], nbytes=option.nbytes[1:], loss=option.loss[1:])
        if option.formats[0] == _SMALLEST
        else option
        for option in options
    ]
    is_small = 8 * budget < SMALL_TARGET * n_weights or sum(option.nbytes[0] for option in fast) > budget
    return options if is_small else fast


def _recipe(
    model: Model, name: str, target: Target, options: list[Options], choices: list[int] | tuple[int, ...]
) -> Recipe:
    types = {option.place: FORMATS[option.formats[i]] for option, i in zip(options, choices, strict=True)}
    description = f"the least predicted loss within {target}"
    recipe = recipe_of_types(name, description, types, description)
    check_types(model, recipe, types)
    return recipe


def _budget(model: Model, target: Target, header: int, kept: int, options: list[Options]) -> int:
    """Bytes for the tensors that have a choice, each one padded; `header` and `kept` are the bytes of the rest."""
    n_weights = model.n_weights
    least, most = (sum(option.nbytes[i] for option in options) for i in (0, -1))
    if target.file_bytes is not None:
        budget = target.file_bytes - header - kept
    else:
        budget = int((target.bits_per_weight or 0) * n_weights / 8) - kept
    if budget < least or budget > most + CLOSE_ENOUGH * (header + kept + most):
        names = [name for name in FORMATS_ON_OFFER if any(name in option.formats for option in options)]
        raise RecipeError(
            f"a target of {target} cannot be reached: with {', '.join(names)} this model's files are from "
            f"{header + kept + least:,} to {header + kept + most:,} bytes "
            f"({8 * (kept + least) / n_weights:.2f} to {8 * (kept + most) / n_weights:.2f} bits per weight)"
        )
    return budget

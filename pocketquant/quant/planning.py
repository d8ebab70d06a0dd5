"""Model + Choice -> Plan: the whole output file, decided and checked before a byte of it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from pocketquant.calibration.importance import Importance
from pocketquant.model import Model, Plan, Value
from pocketquant.quant.allocation import plan_to_target
from pocketquant.quant.applying import apply_recipe
from pocketquant.quant.choosing import Choice, Target, as_choice
from pocketquant.quant.loss_table import LossTable
from pocketquant.quant.prediction import PredictSettings, predict_losses
from pocketquant.quant.recipe import Recipe
from pocketquant.quant.rounding.encoding import rounding_metadata, with_rounding
from pocketquant.quant.sensitivity import read_sensitivity


def plan(
    model: Model,
    choice: Choice | Recipe,
    importance: Importance | None = None,
    metadata_extra: Mapping[str, Value] | None = None,
) -> Plan:
    """Decides an output file.

    Args:
        model: the opened source.
        choice: what decides the types and the rounding; a recipe is the short form of one that says nothing else.
        importance: weights of the squared rounding error, from `read_importance`, in place of the choice's own.
        metadata_extra: keys to add to the model's own, or to put in their place.

    Returns:
        Every tensor's format, size, offset and reason, and the finished header. Where a size decided the types, its
        `allocation` says how near it was met, what the file is predicted to lose, and what is not certain of that.

    Raises:
        RecipeError: the importance matrix, the statistics or the figures are of another model, the recipe asks for
            formats that are only read, the source is quantized already and would have to be rounded a second time, or
            the target is beyond what the formats reach.
    """
    choice = as_choice(choice, importance)
    extra = metadata_extra or {}
    if choice.is_allocated:
        planned = _allocated(model, choice, extra)
    else:
        planned = apply_recipe(model, choice.recipe, choice.importance, extra)
    if choice.rounding is None or choice.statistics is None:
        return planned
    return with_rounding(planned, choice.statistics, choice.rounding)


def _allocated(model: Model, choice: Choice, extra: Mapping[str, Value]) -> Plan:
    """The plan that is predicted to lose least within the target, or within the bytes of the recipe."""
    if choice.rounding is not None and choice.statistics is not None:
        extra = {**rounding_metadata(choice.statistics, choice.rounding), **extra}  # so that the size counts it
    name = None
    if choice.target is None:
        nbytes = apply_recipe(model, choice.recipe, choice.importance, extra).file_bytes
        choice, name = replace(choice, target=Target(file_bytes=nbytes)), choice.recipe.name
    return plan_to_target(model, with_figures(model, choice), extra, recipe_name=name)


def with_figures(model: Model, choice: Choice, progress: Callable[[int, int], None] | None = None) -> Choice:
    """The same choice with all that it predicts losses with, which takes hours where statistics of a large model do.

    A plan and its explanation, and choices that differ in their sizes alone, can share the figures.

    Args:
        model: the one that is planned.
        choice: what decides the file.
        progress: called with tensors done and tensors in all, where statistics predict.

    Raises:
        RecipeError: the statistics are of another model.
    """
    if isinstance(choice.figures, LossTable):
        return choice
    if choice.statistics is None:
        return replace(choice, figures=choice.figures or read_sensitivity())
    settings = PredictSettings(choice.rounding, choice.figures, activations=True)
    table = predict_losses(model, choice.statistics, settings, progress)
    return replace(choice, figures=table)


def importance_gaps(planned: Plan) -> tuple[str, ...]:
    """What to tell people whose matrix says nothing about some matrices of the blocks; () where it covers them all.

    The embedding and the head are not counted: llama-imatrix leaves them out of every matrix.
    """
    weighted = [item for item in planned.tensors if item.format.block_len > 1 and item.tensor.layer is not None]
    blind = [item for item in weighted if item.tensor.name not in planned.importance]
    if not blind or planned.rounding:
        return ()
    seen = {item.tensor.layer for item in weighted if item.tensor.name in planned.importance}
    unseen = sorted({int(item.tensor.layer or 0) for item in blind} - seen)
    where = f", all of block {', '.join(map(str, unseen))} among them" if unseen else ""
    names = ", ".join(item.tensor.name for item in blind[:3]) + (" ..." if len(blind) > 3 else "")
    return (
        f"the importance matrix has no entries for {len(blind)} of {len(weighted)} matrices of the blocks{where}: they "
        f"are rounded without importance ({names})",
    )

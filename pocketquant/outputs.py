"""Everything that one source becomes: the model's file, and beside it `mmproj-NAME` and `mtp-NAME`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketquant.convert.mtp import sidecar_path
from pocketquant.convert.sources import Parts
from pocketquant.model import Model, Plan
from pocketquant.quant import Recipe, open_recipe, plan
from pocketquant.splits import split_plan

PlanModel = Callable[[Model], Plan]


@dataclass(frozen=True)
class Output:
    """One file, or the shards of one: what it holds ("model", "mmproj", "mtp"), its plan, and plans with paths."""

    kind: str
    plan: Plan
    files: tuple[tuple[Plan, Path], ...]


def mmproj_path(out: Path) -> Path:
    """`mmproj-NAME` beside NAME."""
    return out.with_name(f"mmproj-{out.name}")


def default_mmproj_recipe(recipe: str) -> str:
    """The vision tower's recipe where none is asked for: the small mix beside `pocket_*`, the same for plain types."""
    if recipe.startswith("pocket_"):
        return "pocket_mmproj"
    return recipe if recipe in ("f32", "f16", "bf16") else "f16"


def plan_outputs(
    parts: Parts, out: Path, recipe: Recipe, plan_model: PlanModel, mmproj: str, split_bytes: int | None
) -> tuple[Output, ...]:
    """Plans the model's file and those beside it.

    Args:
        parts: the opened source.
        out: path of the model's file.
        recipe: the model's, for the block in the sidecar as well.
        plan_model: plans the model itself, with whatever importance or target size there is.
        mmproj: recipe of the vision tower.
        split_bytes: largest file of the model; None for one file.

    Raises:
        RecipeError: a recipe is unknown or cannot be applied.
    """
    planned = plan_model(parts.model)
    outputs = [Output("model", planned, tuple(split_plan(planned, out, split_bytes)))]
    if parts.vision is not None:
        tower = plan(parts.vision, open_recipe(mmproj))
        outputs.append(Output("mmproj", tower, ((tower, mmproj_path(out)),)))
    if parts.mtp is not None:  # no importance: matrices have no entries for the block
        block = plan(parts.mtp, recipe)
        outputs.append(Output("mtp", block, ((block, sidecar_path(out)),)))
    return tuple(outputs)


def all_files(outputs: Sequence[Output]) -> list[tuple[Plan, Path]]:
    """Every plan with its path, the model's first."""
    return [file for output in outputs for file in output.files]

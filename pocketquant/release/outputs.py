"""Everything that one source becomes: the model's file, and beside it `mmproj-NAME` and `mtp-NAME`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketquant.calibration.importance import importance_of_block
from pocketquant.convert.mtp import sidecar_path
from pocketquant.convert.sources import Parts
from pocketquant.gguf_file.shards import check_whole, split_plan
from pocketquant.model import Plan
from pocketquant.quant import Choice, open_recipe, plan


@dataclass(frozen=True)
class Output:
    """One file, or the shards of one: what it holds ("model", "mmproj", "mtp"), its plan, and plans with paths.

    `path` is that of the whole; shards are named after it.
    """

    kind: str
    path: Path
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
    parts: Parts, out: Path, choice: Choice, mmproj: str | None = None, split_bytes: int | None = None
) -> tuple[Output, ...]:
    """Plans the model's file and those beside it.

    Args:
        parts: the opened source.
        out: path of the model's file.
        choice: what decides the model's file.
        mmproj: recipe of the vision tower; None for the one that goes with the choice's recipe, "none" for no tower.
        split_bytes: largest file; None for no limit. llama.cpp reads the vision tower from one file alone.

    Raises:
        OutputError: a tensor, or the whole vision tower, is larger than `split_bytes`.
        RecipeError: a recipe is unknown or cannot be applied.
    """
    planned = plan(parts.model, choice)
    model = Output("model", out, planned, tuple(split_plan(planned, out, split_bytes)))
    return (model, *plan_sidecars(parts, out, choice, mmproj, split_bytes))


def plan_sidecars(
    parts: Parts, out: Path, choice: Choice, mmproj: str | None = None, split_bytes: int | None = None
) -> tuple[Output, ...]:
    """Plans the files beside the model's: `mmproj-NAME` and `mtp-NAME`, the latter by the choice's recipe, and by its
    importance where that has entries for the block. Arguments and errors as `plan_outputs`.
    """
    wanted = mmproj or default_mmproj_recipe(choice.recipe.name)
    tower_recipe = None if wanted == "none" else open_recipe(wanted)  # a wrong name is one for a text-only model, too
    outputs = []
    if parts.vision is not None and tower_recipe is not None:
        tower, path = plan(parts.vision, tower_recipe), mmproj_path(out)
        check_whole("vision tower", path, tower.file_bytes, split_bytes)
        outputs.append(Output("mmproj", path, tower, ((tower, path),)))
    if parts.mtp is not None:
        known = None if choice.importance is None else importance_of_block(choice.importance, parts.mtp)
        block, path = plan(parts.mtp, choice.recipe, known), sidecar_path(out)
        outputs.append(Output("mtp", path, block, tuple(split_plan(block, path, split_bytes))))
    return tuple(outputs)


def all_files(outputs: Sequence[Output]) -> list[tuple[Plan, Path]]:
    """Every plan with its path, the model's first."""
    return [file for output in outputs for file in output.files]

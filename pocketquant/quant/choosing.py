"""What decides a file, as one value: the command line parses its options into a `Choice`, Python users write one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pocketquant.calibration.importance import Importance
from pocketquant.calibration.statistics import Statistics
from pocketquant.errors import RecipeError
from pocketquant.quant.loss_table import LossTable
from pocketquant.quant.recipe import Recipe
from pocketquant.quant.recipe_text import open_recipe
from pocketquant.quant.rounding.encoding import STEPS
from pocketquant.quant.rounding.rows import Rounding
from pocketquant.quant.sensitivity import Sensitivity

DEFAULT_RECIPE = "pocket_4bit"
POCKET = ("pocket_4bit", "pocket_5bit", "pocket_8bit")
"""Recipes that stand for a size: statistics choose better types within their bytes."""

NO_STEPS = "none"
"""In place of one of `STEPS`: statistics choose the types, and every format's own encoder rounds."""


_NO_SIZE = 2**63
"""No file and no number is as large."""


@dataclass(frozen=True)
class Target:
    """The size that is asked for, one of the two: bytes of the whole file, or bits per weight of its tensors."""

    file_bytes: int | None = None
    bits_per_weight: float | None = None

    def __post_init__(self) -> None:
        if (self.file_bytes is None) == (self.bits_per_weight is None):
            raise RecipeError("give one target: a size or bits per weight")
        if not 0 < (self.file_bytes or self.bits_per_weight or 0) < _NO_SIZE:  # NaN is neither
            raise RecipeError(f"a target of {self}: must be above 0 and below 2^63")

    def __str__(self) -> str:
        return f"{self.bits_per_weight:g} bits per weight" if self.file_bytes is None else f"{self.file_bytes:,} bytes"

    @property
    def recipe_name(self) -> str:
        """What a file made to this target calls its recipe."""
        return f"target-{self.bits_per_weight:g}bpw" if self.file_bytes is None else f"target-{self.file_bytes}"


@dataclass(frozen=True)
class Choice:
    """What decides a file's types and how its weights are rounded.

    Attributes:
        recipe: which format each tensor gets; with a target, only the files beside the model get theirs from it.
        target: a size in place of the recipe: the types that are predicted to lose least within it.
        importance: weights of the squared rounding error, from `read_importance`.
        statistics: what to round by, from `open_statistics`. They also choose better types within the bytes of a recipe
            that stands for a size (`POCKET`).
        steps: how far to go with the statistics: one of `STEPS`, or "none".
        figures: what to predict losses with, from `read_figures`; None for the statistics, and without them for the
            table that comes with the package.
        device: what the file is for, one of `DEVICES`: the types that a target may choose from.
        keep_types: take the recipe's types as they are, though the statistics could choose better ones.

    Raises:
        RecipeError: there are no such steps.
    """

    recipe: Recipe = field(default_factory=lambda: open_recipe(DEFAULT_RECIPE))
    target: Target | None = None
    importance: Importance | None = None
    statistics: Statistics | None = None
    steps: str = "two-sided"
    figures: Sensitivity | LossTable | None = None
    device: str = "phone"
    keep_types: bool = False

    def __post_init__(self) -> None:
        if self.steps not in (NO_STEPS, *STEPS):
            raise RecipeError(f"{self.steps}: no steps of rounding; there are {', '.join((NO_STEPS, *STEPS))}")

    @property
    def rounding(self) -> Rounding | None:
        """How the weights are rounded by the statistics; None where every format's own encoder rounds."""
        return None if self.statistics is None or self.steps == NO_STEPS else STEPS[self.steps]

    @property
    def is_allocated(self) -> bool:
        """Whether the types are those that are predicted to lose least within a size, not the recipe's own."""
        if self.target is not None:
            return True
        # an edited copy may still have the name, and is meant as it is
        is_size = self.recipe.name in POCKET and self.recipe == open_recipe(self.recipe.name)
        return is_size and self.statistics is not None and not self.keep_types


def as_choice(given: Choice | Recipe | str, importance: Importance | None = None) -> Choice:
    """The choice that is meant: itself, or a recipe, or the name of one, with nothing else decided.

    Args:
        given: what decides the file.
        importance: takes the place of the choice's own.

    Raises:
        RecipeError: there is no recipe of that name.
    """
    if not isinstance(given, Choice):
        given = Choice(open_recipe(given) if isinstance(given, str) else given)
    return given if importance is None else replace(given, importance=importance)

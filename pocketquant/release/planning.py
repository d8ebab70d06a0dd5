"""What a source will become, decided: files in several recipes, those beside them, and what they are measured against.

`make` and `sweep` both begin here. Nothing is written, no weights are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pocketquant.calibration.imatrix import SELF
from pocketquant.convert.sources import Parts, open_parts
from pocketquant.demo import text_path
from pocketquant.errors import EvalError, RecipeError
from pocketquant.gguf_file.header import file_name
from pocketquant.gguf_file.shards import check_whole, split_plan
from pocketquant.llama.library import require_runtime
from pocketquant.model import Model, Plan
from pocketquant.quant import Importance, Recipe, open_recipe, plan, read_importance
from pocketquant.quant.planning import importance_gaps
from pocketquant.release.outputs import default_mmproj_recipe, plan_outputs
from pocketquant.texts.corpus import Text, read_text

DEFAULT_RECIPES = ("pocket_4bit", "q8_0")

Rounder = Callable[[Plan], Plan]


@dataclass(frozen=True)
class Choice:
    """One output that is asked for.

    Attributes:
        recipe: of the files beside it; and of itself, where nothing else decides its types.
        plan: model and importance -> its plan.
    """

    recipe: Recipe
    plan: Callable[[Model, Importance | None], Plan]


@dataclass(frozen=True)
class Variant:
    """One file to make."""

    recipe: str
    name: str
    plan: Plan
    choice: Choice


@dataclass(frozen=True)
class Calibrating:
    """The importance matrix that a release makes for itself, from its own reference.

    Attributes:
        text: a file, or "self" for a text that the model writes.
        chunks: most windows; None for the default.
        name: of the matrix, which is kept beside the quantized files.
    """

    text: Path | str
    chunks: int | None
    name: str


@dataclass(frozen=True)
class Release:
    """What will be made.

    Attributes:
        variants: the files to keep.
        sidecars: the vision tower's and the multi-token-prediction block's file, where the source has them.
        reference: full precision, for the evaluation; made and deleted again.
        reference_block: the block beside it, for the importance matrix; None where none is made or the source has none.
        texts: what to measure on.
        positions: measure whole windows, for the numbers by position.
        importance: a matrix that was given; None if one is made, or none used.
        calibrating: how to make one; the variants are then planned for a stand-in, which costs the same bytes.
        mmproj: the vision tower's recipe; None for the one that goes with the first file.
    """

    source: str
    parts: Parts
    variants: tuple[Variant, ...]
    sidecars: tuple[Variant, ...]
    reference: Variant
    reference_block: Variant | None
    texts: tuple[Text, ...]
    context: int
    chunks: int | None
    positions: bool = False
    importance: Importance | None = None
    calibrating: Calibrating | None = None
    mmproj: str | None = None
    split_bytes: int | None = None

    @property
    def model(self) -> Model:
        return self.parts.model

    @property
    def kept_bytes(self) -> int:
        return sum(variant.plan.file_bytes for variant in (*self.variants, *self.sidecars))

    @property
    def reference_bytes(self) -> int:
        """Disk for what is made only to be measured against."""
        return self.reference.plan.file_bytes + (self.reference_block.plan.file_bytes if self.reference_block else 0)

    @property
    def disk_bytes(self) -> int:
        """Free disk that making everything at once needs."""
        shards = (
            0
            if self.split_bytes is None
            else max(variant.plan.file_bytes for variant in (*self.variants, *self.sidecars))
        )
        return self.kept_bytes + self.reference_bytes + shards

    @property
    def memory_bytes(self) -> int:
        """Memory the evaluation needs: two models at once, without their caches."""
        return self.reference.plan.file_bytes + max(variant.plan.file_bytes for variant in self.variants)

    @property
    def name(self) -> str:
        """The model's."""
        name = self.model.metadata.get("general.name")
        return str(name.value) if name else Path(self.source).name


def plan_release(
    source: Path | str,
    *,
    recipes: Sequence[str | Choice] = DEFAULT_RECIPES,
    text: Path | Sequence[Text] | None = None,
    context: int = 512,
    chunks: int | None = None,
    positions: bool = False,
    imatrix: Path | None = None,
    calibrate: Path | str | None = None,
    calibrate_chunks: int | None = None,
    reference_type: str = "f32",
    parts: Parts | None = None,
    mmproj: str | None = None,
    split_bytes: int | None = None,
) -> Release:
    """Opens the source and plans every file; reads no weights, writes nothing.

    Args:
        source: as `open_model`.
        recipes: names or TOML files, or what plans a file otherwise; one output each.
        text: what to measure on, a file or several texts; None for the embedded evaluation text.
        context: tokens in a window.
        chunks: most windows of each text to score; None for all.
        positions: measure whole windows, for the numbers by position.
        imatrix: importance matrix for the quantized files.
        calibrate: without one, the text to make one from: a file, or "self" for a text that the model writes. None for
            no importance; `calibration_text()` is what the command takes.
        calibrate_chunks: most windows of it.
        reference_type: recipe of the reference: f32, or bf16 where memory is short.
        parts: the source, opened otherwise than `open_parts(source)` does: with an adapter, say. The weights are read
            several times, so open a repository on a hub with `keep_source`.
        mmproj: recipe of the vision tower; None for the first recipe's companion.
        split_bytes: largest file to keep; None for no limit. Files are measured whole and split afterwards.

    Raises:
        EvalError: a text cannot be read, or the same one is to calibrate and to measure on.
        OutputError: a tensor, or a file that runtimes do not read in shards, is larger than `split_bytes`.
        RecipeError: two of the files would have one name.
    """
    require_runtime()
    texts = _texts(text)
    for path in (*(each.path for each in texts), *([calibrate] if calibrate not in (None, SELF) else [])):
        read_text(path)  # before hours of work
    parts = parts or open_parts(source)
    model = parts.model
    importance, calibrating = read_importance(imatrix) if imatrix else None, None
    planned_for = importance
    if imatrix is None and calibrate is not None:
        if calibrate != SELF and (same := [each.path for each in texts if _is_same(each.path, Path(calibrate))]):
            raise EvalError(f"{same[0]}: measured on the text it is calibrated on, a file looks better than it is")
        name = file_name(model.metadata, "imatrix").replace("-IMATRIX.gguf", "-imatrix.gguf")  # no type of numbers
        calibrating = Calibrating(calibrate, calibrate_chunks, name)
        planned_for = _stand_in(parts, calibrating)
    choices = [each if isinstance(each, Choice) else choose(open_recipe(each)) for each in recipes]
    variants = tuple(plan_variant(model, choice, planned_for) for choice in choices)
    _refuse_one_name(variants)
    sidecars = _sidecars(parts, variants[0], mmproj, split_bytes, planned_for)
    if calibrating and not any(variant.plan.importance for variant in (*variants, *sidecars)):
        calibrating = planned_for = None  # nothing is rounded in blocks, or all of it by statistics
        variants = tuple(plan_variant(model, choice, None) for choice in choices)
        sidecars = _sidecars(parts, variants[0], mmproj, split_bytes, None)
    if calibrating and planned_for:
        check_whole("importance matrix", Path(calibrating.name), _least_bytes(planned_for), split_bytes)
    for variant in variants:
        split_plan(variant.plan, Path(variant.name), split_bytes)  # refuses what cannot be split
    if importance:
        gaps = dict.fromkeys(gap for variant in variants for gap in importance_gaps(variant.plan))
        parts = replace(parts, model=replace(model, notes=(*model.notes, *gaps)))
    full = choose(open_recipe(reference_type))
    reference = plan_variant(model, full, None)
    block = None
    if calibrating and parts.mtp is not None:
        block = replace(plan_variant(parts.mtp, full, None), name=f"mtp-{reference.name}")
    return Release(
        source=str(source),
        parts=parts,
        variants=variants,
        sidecars=sidecars,
        reference=reference,
        reference_block=block,
        texts=texts,
        context=context,
        chunks=chunks,
        positions=positions,
        importance=importance,
        calibrating=calibrating,
        mmproj=mmproj,
        split_bytes=split_bytes,
    )


def plan_again(release: Release, importance: Importance) -> Release:
    """The same with the importance matrix that was made meanwhile."""
    variants = tuple(plan_variant(release.model, variant.choice, importance) for variant in release.variants)
    sidecars = _sidecars(release.parts, variants[0], release.mmproj, release.split_bytes, importance)
    return replace(release, variants=variants, sidecars=sidecars, importance=importance)


def choose(recipe: Recipe) -> Choice:
    """The output that a recipe decides."""
    return Choice(recipe, lambda model, importance: plan(model, recipe, importance))


def plan_variant(model: Model, choice: Choice, importance: Importance | None) -> Variant:
    """Plans one file; it is named after the recipe that its metadata states."""
    planned = choice.plan(model, importance)
    name = str(planned.metadata["pocketquant.recipe"].value)
    return Variant(name, file_name(model.metadata, name), planned, choice)


def calibration_text() -> Path:
    """The embedded text that is calibrated on by default."""
    return text_path("calibration")


def _texts(given: Path | Sequence[Text] | None) -> tuple[Text, ...]:
    if given is None or isinstance(given, Path):
        path = given or text_path("evaluation")
        return (Text(path.stem, path),)
    return tuple(given)


def _is_same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _refuse_one_name(variants: Sequence[Variant]) -> None:
    names = [variant.name for variant in variants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"several files would be called {', '.join(twice)}; name each recipe once")


def _sidecars(
    parts: Parts, first: Variant, mmproj: str | None, split_bytes: int | None, importance: Importance | None
) -> tuple[Variant, ...]:
    """What lies beside the model, after the first variant: `mmproj-NAME` and `mtp-NAME`."""
    recipe = first.choice.recipe
    outputs = plan_outputs(
        parts,
        Path(first.name),
        recipe,
        lambda model: first.plan,
        mmproj or default_mmproj_recipe(recipe.name),
        split_bytes,
        importance,
    )
    return tuple(
        Variant(str(output.plan.metadata["pocketquant.recipe"].value), output.path.name, output.plan, first.choice)
        for output in outputs[1:]
    )


def _stand_in(parts: Parts, calibrating: Calibrating) -> Importance:
    """Importance with the names and numbers' sizes of the matrix to come, for plans that cost what theirs will."""
    weights = {
        tensor.name: np.broadcast_to(np.float32(1), (*tensor.shape[:-2], tensor.n_cols))
        for part in (parts.model, parts.mtp)
        if part is not None
        for tensor in part.tensors
        if len(tensor.shape) > 1 and tensor.layer is not None
    }
    text = calibrating.text
    return Importance(weights, calibrating.name, (SELF if text == SELF else Path(text).name,), 1)


def _least_bytes(importance: Importance) -> int:
    """What the numbers of a matrix take in its file: for each expert as many as it has columns, and a count."""
    return sum(4 * (weights.size + weights.size // weights.shape[-1]) for weights in importance.weights.values())

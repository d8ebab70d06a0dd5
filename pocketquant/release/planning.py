"""What a source will become, decided: files in several recipes, those beside them, and what they are measured against.

`make` and `sweep` both begin here. Nothing is written, no weights are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pocketquant.convert.sources import Parts, names_gguf, open_parts
from pocketquant.demo import text_path
from pocketquant.errors import EvalError, RecipeError
from pocketquant.gguf_file.header import file_name
from pocketquant.gguf_file.shards import check_whole, split_plan
from pocketquant.llama.library import check_loadable, require_runtime
from pocketquant.model import Model, Plan
from pocketquant.quant import Choice, Importance, Recipe, plan, with_figures
from pocketquant.quant.choosing import as_choice
from pocketquant.quant.planning import importance_gaps
from pocketquant.release.outputs import plan_sidecars
from pocketquant.texts.calibration import SELF
from pocketquant.texts.corpus import Text, read_text
from pocketquant.texts.embedded import PACKAGE, read_texts

DEFAULT_RECIPES = ("pocket_4bit", "q8_0")
CALIBRATION = f"{PACKAGE}calibration"
"""The embedded text that an importance matrix is made from by default."""


@dataclass(frozen=True)
class ReleaseSettings:
    """What a release is asked to be, besides the choices that decide its files.

    Attributes:
        texts: what to measure on; empty for the embedded evaluation text.
        context: tokens in a window.
        chunks: most windows of each text to score; None for all.
        positions: measure whole windows, for the numbers by position.
        calibrate: the text to make an importance matrix from, where the choices name none: a file,
            "package:calibration" for the one that comes with the package, or "self" for one that the model writes;
            None makes none.
        calibrate_chunks: most windows of it; None for the default.
        reference_type: recipe of the reference: f32, or bf16 where memory is short.
        mmproj: recipe of the vision tower; None for the one that goes with the first file.
        split_bytes: largest file to keep; None for no limit. Files are measured whole and split afterwards.
    """

    texts: tuple[Text, ...] = ()
    context: int = 512
    chunks: int | None = None
    positions: bool = False
    calibrate: Path | str | None = CALIBRATION
    calibrate_chunks: int | None = None
    reference_type: str = "f32"
    mmproj: str | None = None
    split_bytes: int | None = None


@dataclass(frozen=True)
class Variant:
    """One file to make: its recipe's name, its own name, its plan, and what decided that."""

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
        settings: what was asked for; with its texts, embedded ones too.
        importance: the matrix that the choices name; None if one is made, or none used.
        calibrating: how to make one; the variants are then planned for a stand-in, which costs the same bytes.
    """

    source: str
    parts: Parts
    variants: tuple[Variant, ...]
    sidecars: tuple[Variant, ...]
    reference: Variant
    reference_block: Variant | None
    settings: ReleaseSettings
    importance: Importance | None = None
    calibrating: Calibrating | None = None

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
            if self.settings.split_bytes is None
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
    choices: Sequence[Choice | Recipe | str] = DEFAULT_RECIPES,
    settings: ReleaseSettings | None = None,
    *,
    parts: Parts | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Release:
    """Opens the source and plans every file; reads no weights but for predictions, writes nothing.

    Args:
        source: as `open_model`.
        choices: what decides each file; a recipe or its name is the short form of a choice.
        settings: what else is asked for.
        parts: the source, opened otherwise than `open_parts(source)` does: with an adapter, say. The weights are read
            several times, so open a repository on a hub with `keep_source`.
        progress: called with tensors done and tensors in all, where losses are predicted from statistics.

    Raises:
        EvalError: a text cannot be read, or the same one is to calibrate and to measure on.
        OutputError: a tensor, or a file that runtimes do not read in shards, is larger than `split_bytes`.
        RecipeError: two of the files would have one name, or the choices name several importance matrices.
    """
    require_runtime()
    if parts is None and names_gguf(source):
        check_loadable(Path(source))  # by its own name, not by that of the reference that would be made of it
    asked = [as_choice(each) for each in choices]
    settings = settings or ReleaseSettings()
    importance = _common_importance(asked, settings)
    settings = _with_texts(settings, is_calibrating=importance is None)
    parts = parts or open_parts(source)
    wanted, calibrating = _with_shared_figures(parts.model, asked, progress), _calibrating(parts.model, settings)
    planned_for = _stand_in(parts, calibrating) if calibrating else importance
    variants, sidecars = _plan_files(parts, wanted, settings, planned_for)
    if calibrating and not any(variant.plan.importance for variant in (*variants, *sidecars)):
        calibrating = planned_for = None  # nothing is rounded in blocks, or all of it by statistics
        variants, sidecars = _plan_files(parts, wanted, settings, None)
    if calibrating and planned_for:
        check_whole("importance matrix", Path(calibrating.name), _least_bytes(planned_for), settings.split_bytes)
    for variant in variants:
        split_plan(variant.plan, Path(variant.name), settings.split_bytes)  # refuses what cannot be split
    if importance:
        gaps = dict.fromkeys(gap for variant in variants for gap in importance_gaps(variant.plan))
        parts = replace(parts, model=replace(parts.model, notes=(*parts.model.notes, *gaps)))
    full = as_choice(settings.reference_type)
    reference = plan_variant(parts.model, full)
    block = None
    if calibrating and parts.mtp is not None:
        block = replace(plan_variant(parts.mtp, full), name=f"mtp-{reference.name}")
    return Release(str(source), parts, variants, sidecars, reference, block, settings, importance, calibrating)


def plan_again(release: Release, importance: Importance) -> Release:
    """The same with the importance matrix that was made meanwhile."""
    choices = [variant.choice for variant in release.variants]
    variants, sidecars = _plan_files(release.parts, choices, release.settings, importance)
    return replace(release, variants=variants, sidecars=sidecars, importance=importance)


def plan_variant(model: Model, choice: Choice) -> Variant:
    """Plans one file; it is named after the recipe that its metadata states."""
    planned = plan(model, choice)
    name = str(planned.metadata["pocketquant.recipe"].value)
    return Variant(name, file_name(model.metadata, name), planned, choice)


def _plan_files(
    parts: Parts, choices: Sequence[Choice], settings: ReleaseSettings, importance: Importance | None
) -> tuple[tuple[Variant, ...], tuple[Variant, ...]]:
    """The models' files and, after the first of them, those beside it, all with one importance matrix."""
    variants = tuple(plan_variant(parts.model, replace(choice, importance=importance)) for choice in choices)
    _refuse_one_name(variants)
    first = variants[0]
    outputs = plan_sidecars(parts, Path(first.name), first.choice, settings.mmproj, settings.split_bytes)
    sidecars = tuple(
        Variant(str(output.plan.metadata["pocketquant.recipe"].value), output.path.name, output.plan, first.choice)
        for output in outputs
    )
    return variants, sidecars


def _with_shared_figures(
    model: Model, choices: Sequence[Choice], progress: Callable[[int, int], None] | None
) -> list[Choice]:
    """The choices with what they predict with; one prediction, which can take hours, for all that want the same."""
    ready: list[tuple[Choice, Choice]] = []
    for choice in choices:
        same = [done for asked, done in ready if _predicts_alike(asked, choice)]
        if not choice.is_allocated:
            done = choice
        elif same:
            done = replace(choice, figures=same[0].figures)
        else:
            done = with_figures(model, choice, progress)
        ready.append((choice, done))
    return [done for _, done in ready]


def _predicts_alike(one: Choice, other: Choice) -> bool:
    return one.is_allocated and all(
        getattr(one, name) == getattr(other, name) for name in ("statistics", "rounding", "figures")
    )


def _common_importance(choices: Sequence[Choice], settings: ReleaseSettings) -> Importance | None:
    """The matrix of all choices; reports say one for all files."""
    if not choices:
        raise RecipeError("nothing to make: name a recipe or a size")
    given = choices[0].importance
    if any(choice.importance is not given for choice in choices):
        raise RecipeError("the files of a release are rounded with one importance matrix; give every choice the same")
    if given is not None and settings.calibrate not in (None, CALIBRATION):
        raise RecipeError("the choices have an importance matrix: leave it out, or the text to make one from")
    return given


def _calibrating(model: Model, settings: ReleaseSettings) -> Calibrating | None:
    if settings.calibrate is None:
        return None
    name = file_name(model.metadata, "imatrix").replace("-IMATRIX.gguf", "-imatrix.gguf")  # no type of numbers
    return Calibrating(settings.calibrate, settings.calibrate_chunks, name)


def _with_texts(settings: ReleaseSettings, *, is_calibrating: bool) -> ReleaseSettings:
    """The settings with the files of the texts that they name, all read once, before hours of work."""
    texts = settings.texts or (Text("evaluation", text_path("evaluation")),)
    for text in texts:
        read_text(text.path)
    made_from = settings.calibrate if is_calibrating else None
    if made_from is not None and made_from != SELF:
        name = str(made_from)
        made_from = read_texts([name])[0].path if name.startswith(PACKAGE) else Path(name)
        read_text(made_from)
        if same := [text.path for text in texts if text.path.resolve() == made_from.resolve()]:
            raise EvalError(
                f"{same[0]}: measured on the text it is calibrated on, a file looks better than it is; "
                "give another --text"
            )
    return replace(settings, texts=texts, calibrate=made_from)


def _refuse_one_name(variants: Sequence[Variant]) -> None:
    names = [variant.name for variant in variants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"several files would be called {', '.join(twice)}; name each recipe once")


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

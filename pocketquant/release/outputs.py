"""All files that are made from one source: the model's, and beside it `mmproj-NAME` and `mtp-NAME`.

The module opens the source, plans the files and writes them. `as_gguf` gives a source as a full-precision GGUF.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pocketquant.calibration.importance import importance_of_block
from pocketquant.convert.mtp import MtpMode, sidecar_path
from pocketquant.convert.sources import Parts, names_gguf, open_model, open_parts
from pocketquant.files.leftovers import work_folder
from pocketquant.files.replacing import check_target
from pocketquant.gguf_file.shards import check_whole, split_plan
from pocketquant.gguf_file.writing import write, write_together
from pocketquant.model import Plan
from pocketquant.quant import Choice, open_recipe, plan
from pocketquant.release.means import Means


@dataclass(frozen=True)
class Opening:
    """How a source is opened.

    Attributes:
        chat_template: a file to take in place of the source's chat templates.
        keep_source: a folder to download a hub's repository into; None reads only what is needed.
        adapter: the folder of a PEFT LoRA adapter to merge into a checkpoint.
        mtp: where a multi-token-prediction block goes: beside the model ("sidecar"), inside it ("embed"), or
            nowhere ("drop").
        with_vision: open the vision tower.
    """

    chat_template: Path | str | None = None
    keep_source: Path | str | None = None
    adapter: Path | str | None = None
    mtp: MtpMode = "sidecar"
    with_vision: bool = True

    def open(self, source: Path | str) -> Parts:
        """Opens everything that a source holds; errors are those of `open_model`."""
        return open_parts(
            source,
            chat_template=self.chat_template,
            keep_source=self.keep_source,
            adapter=self.adapter,
            mtp=self.mtp,
            with_vision=self.with_vision,
        )


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
    """The vision tower's recipe where none is named: `pocket_mmproj` beside `pocket_*`, f32 or bf16 beside the same,
    f16 beside all others.
    """
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
    beside = plan_sidecars(parts, out, choice, mmproj, split_bytes)
    planned = plan(parts.model, choice)
    return (Output("model", out, planned, tuple(split_plan(planned, out, split_bytes))), *beside)


def plan_sidecars(
    parts: Parts, out: Path, choice: Choice, mmproj: str | None = None, split_bytes: int | None = None
) -> tuple[Output, ...]:
    """Plans the files beside the model's: `mmproj-NAME` and `mtp-NAME`. The latter gets the choice's recipe, and its
    importance where that has entries for the block. Arguments and errors as `plan_outputs`.
    """
    outputs = []
    named = mmproj or default_mmproj_recipe(choice.recipe.name)
    tower_recipe = None if named == "none" else open_recipe(named)  # a wrong name is refused for a text-only model, too
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


def write_outputs(outputs: Sequence[Output], means: Means) -> None:
    """Writes all files, with a bar; no target is replaced before all of them are finished and checked."""
    files = all_files(outputs)
    total = sum(item.nbytes for part, _ in files for item in part.tensors)
    with means.bars.bytes(outputs[0].path.name, total) as advance:
        write_together(files, threads=means.threads, on_bytes=advance, run=means.run)


@contextmanager
def as_gguf(source: Path | str, out: Path, reference_type: str, means: Means) -> Iterator[Path]:
    """A source as a GGUF in full precision: itself, or converted, beside `out`, for as long as the block runs."""
    if names_gguf(source):
        yield Path(source)
        return
    planned = plan(open_model(source), open_recipe(reference_type))
    with work_folder(check_target(out)) as folder:
        converted = folder / "source.gguf"
        with means.bars.bytes("converting", planned.file_bytes) as advance:
            write(planned, converted, threads=means.threads, on_bytes=advance, is_result=False)
        yield converted

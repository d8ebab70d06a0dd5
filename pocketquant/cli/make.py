"""`make`, `demo`, and what `sweep` does like them: files, measured against full precision, with a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketquant.cli.choice import Deciding, read_choices
from pocketquant.cli.cost import can_try, duration
from pocketquant.cli.options import (
    ADVANCED,
    Chunks,
    Context,
    DryRun,
    EvalTexts,
    GpuLayers,
    OutFolder,
    Positions,
    ReferenceType,
    RoundingSteps,
    Scheduler,
    Source,
    SplitMaxSize,
    Stats,
    Talk,
    Threads,
    option,
)
from pocketquant.cli.planning import Opened, working_with
from pocketquant.cli.report import command_words
from pocketquant.cli.screen import print_json, size

if TYPE_CHECKING:
    from pocketquant.convert.sources import Parts
    from pocketquant.release.planning import Release, ReleaseSettings, Variant

Recipes = Annotated[
    list[str] | None,
    option("--recipe -r", "NAME|FILE", "Recipe of a file; may be repeated; default of `make`: pocket_4bit and q8_0."),
]


@dataclass(frozen=True)
class ReleaseOptions:
    """How files are rounded and measured, and what does the work."""

    text: EvalTexts = None
    imatrix: Annotated[
        str | None,
        option("--imatrix", "FILE|none", "Importance matrix to round by, or none; default: one is made and kept."),
    ] = None
    stats: Stats = None
    chunks: Chunks = None
    dry_run: DryRun = False
    context: Context = 512
    positions: Positions = False
    rounding: RoundingSteps = None
    calibrate: Annotated[
        str | None,
        option(
            "--calibrate", "FILE|self", "Text to make the importance matrix from; self: the model writes it.", ADVANCED
        ),
    ] = None
    calibrate_chunks: Annotated[
        int | None,
        option(
            "--calibrate-chunks",
            "N",
            "Windows to make the importance matrix from; default: 128, of self 16.",
            ADVANCED,
            min=1,
        ),
    ] = None
    reference_type: ReferenceType = "f32"
    threads: Threads = None
    gpu_layers: GpuLayers = 0
    scheduler: Scheduler = None

    @property
    def files(self) -> list[Path | str | None]:
        """What must not be written over."""
        return [self.imatrix, self.stats, self.calibrate]

    @property
    def deciding(self) -> Deciding:
        """What all files' choices have in common."""
        matrix = None if self.imatrix in (None, "none") else Path(self.imatrix)
        return Deciding(imatrix=matrix, stats=self.stats, rounding=self.rounding)

    @property
    def settings(self) -> ReleaseSettings:
        """What is asked of a release; refuses what does not go together."""
        from pocketquant.release.planning import CALIBRATION, ReleaseSettings
        from pocketquant.texts.embedded import read_texts

        if self.imatrix is not None and (self.calibrate is not None or self.calibrate_chunks is not None):
            raise typer.BadParameter("give a matrix, or a text to make one from, not both", param_hint="--calibrate")
        if self.reference_type not in ("f32", "bf16"):
            raise typer.BadParameter("must be f32 or bf16", param_hint="--reference-type")
        return ReleaseSettings(
            texts=tuple(read_texts(self.text)) if self.text else (),
            context=self.context,
            chunks=self.chunks,
            positions=self.positions,
            calibrate=(self.calibrate or CALIBRATION) if self.imatrix is None else None,
            calibrate_chunks=self.calibrate_chunks,
            reference_type=self.reference_type,
        )


def make(
    source: Source,
    out: OutFolder,
    *,
    recipe: Recipes = None,
    measured: ReleaseOptions,
    opened: Opened,
    split_max_size: SplitMaxSize = None,
    talk: Talk,
) -> None:
    """Make quantized files, measure them, write a report and checksums."""
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.gguf_file.shards import parse_size
    from pocketquant.release.make import list_outputs, make_release
    from pocketquant.release.measuring import step_labels
    from pocketquant.release.planning import DEFAULT_RECIPES

    split_bytes = parse_size(split_max_size) if split_max_size else None
    settings = replace(measured.settings, mmproj=opened.mmproj, split_bytes=split_bytes)
    wanted = [replace(measured.deciding, recipe=name) for name in recipe or DEFAULT_RECIPES]
    release = plan_files(source, wanted, settings, opened.open(source, talk), talk)
    read = [source, *measured.files, *opened.files, *(recipe or []), *(each.path for each in release.settings.texts)]
    refuse_overwriting(list_outputs(release, out), read, makes_folder=True)
    files = (*release.variants, *release.sidecars)
    for note in release.model.notes:
        talk.say(f"note: {note}")
    for file in files:
        bits = f"{file.plan.bits_per_weight:.2f} bits per weight"
        talk.say(f"will write {file.name}: {size(file.plan.file_bytes)}, {bits}")
    talk.say(
        f"needs {size(release.disk_bytes)} of disk while it runs ({size(release.kept_bytes)} stay) and about "
        f"{size(release.memory_bytes)} of memory for the evaluation"
    )
    if measured.dry_run:
        seconds = _try_out(release, out, measured, talk)
        print_cost(map(describe_file, files), release, talk, seconds)
        return
    labels = step_labels(release)
    with working_with(
        measured.threads, measured.gpu_layers, measured.scheduler, quiet=talk.quiet, labels=labels
    ) as means:
        result = make_release(release, out, **vars(means), command=command_words())
    show_result(result, out, talk)


def _try_out(release: Release, out: Path, measured: ReleaseOptions, talk: Talk) -> dict[str, float] | None:
    """Seconds of each step, tried; None, with a note, where a trial would take too much."""
    from pocketquant.release.means import Means
    from pocketquant.release.timing import try_release

    if not can_try(release.reference.plan.file_bytes, [measured.calibrate], talk):
        return None
    seconds = try_release(release, out, Means(measured.threads, measured.gpu_layers))
    longest = ", ".join(
        f"{label} {duration(seconds[label])}" for label in sorted(seconds, key=seconds.__getitem__)[:-4:-1]
    )
    talk.say(f"about {duration(sum(seconds.values()))} on this machine; the longest steps: {longest}")
    return seconds


def plan_files(source: str, wanted: Sequence[Deciding], settings: ReleaseSettings, parts: Parts, talk: Talk) -> Release:
    """Plans a release; predicting from statistics, which can take hours, has a bar."""
    from pocketquant.release.planning import plan_release

    choices = read_choices(wanted)
    with talk.steps("predicting") as advance:
        return plan_release(source, choices, settings, parts=parts, progress=advance)


def describe_file(file: Variant) -> dict[str, Any]:
    """A planned file as `--json` shows it."""
    return {"file": file.name, "file_bytes": file.plan.file_bytes}


def print_cost(
    files: Iterable[dict[str, Any]], needs: Any, talk: Talk, seconds: dict[str, float] | None = None
) -> None:
    """What a dry run says as JSON; `needs` has `disk_bytes` and `memory_bytes`, `seconds` are those of each step."""
    if talk.json:
        cost = {"files": list(files), "disk_bytes": needs.disk_bytes, "memory_bytes": needs.memory_bytes}
        if seconds is not None:
            cost |= {"seconds": round(sum(seconds.values()), 3), "seconds_by_step": seconds}
        print_json(cost, of="plan")


def show_result(result: dict[str, Any], out: Path, talk: Talk) -> None:
    """The report, as JSON or in short."""
    from pocketquant.release.measuring import to_markdown

    if talk.json:
        print_json(result)
    else:
        print(to_markdown(result), end="")
    talk.say(f"written to {out}")


def demo(
    *, out: Annotated[Path, option("--out -o", "DIR", "Folder for the files.")] = Path("demo-out"), talk: Talk
) -> None:
    """Run `make` on the small checkpoint that comes with the package."""
    from pocketquant.demo import checkpoint_dir

    # seconds; the whole texts take minutes
    make(
        str(checkpoint_dir()), out, measured=ReleaseOptions(calibrate_chunks=32, chunks=64), opened=Opened(), talk=talk
    )

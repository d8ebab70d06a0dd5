"""`calibrate`: statistics for rounding and for the choice of types, with or without gradients; or sensitivities."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketquant.cli.cost import can_try, say_pace
from pocketquant.cli.group import refuse_given
from pocketquant.cli.options import (
    ADVANCED,
    Chunks,
    Compute,
    CostOnly,
    OutFile,
    Resume,
    Seed,
    Talk,
    TextFiles,
    TorchDevice,
    option,
)
from pocketquant.cli.planning import as_gguf
from pocketquant.cli.screen import print_json, set_document, size
from pocketquant.cli.sensitivity import RunOptions, SensitivityOptions, TrainingContext, sensitivity

if TYPE_CHECKING:
    from pocketquant.calibration.collecting import Collection, Steps
    from pocketquant.model import Model
    from pocketquant.pace import Pace

_SETTINGS = {"memory", "reference_type", "seed", "torch_device"}


@dataclass(frozen=True)
class Collecting:
    """What is collected from which texts."""

    text: TextFiles = None
    curvature: Annotated[
        bool, option("--curvature", "", "Collect gradients too; needs the extra `curvature` (torch, transformers).")
    ] = False
    resume: Resume = False
    context: TrainingContext = 512
    chunks: Chunks = None
    dry_run: CostOnly = False
    memory: Annotated[
        str,
        option(
            "--memory", "SIZE", "Most memory for the sums; with less, more passes over the text are made.", ADVANCED
        ),
    ] = "2GB"
    reference_type: Annotated[
        str, option("--reference-type", "f32|bf16", "Type in which a checkpoint is run.", ADVANCED)
    ] = "f32"
    seed: Seed = 0
    torch_device: TorchDevice = "cpu"


@dataclass(frozen=True)
class OtherModes:
    """What else the command does than collect statistics, and what goes with it."""

    options: SensitivityOptions
    merge: Annotated[bool, option("--merge", "", "Add up several statistics of one model, and run nothing.")] = False
    sensitivity: Annotated[
        bool, option("--sensitivity", "", "Measure what rounding each role and layer costs, in place of statistics.")
    ] = False


def calibrate(
    command_line: typer.Context,
    sources: Annotated[
        list[str], typer.Argument(metavar="SRC", help="Checkpoint, or GGUF in F32 or BF16; with --merge, statistics.")
    ],
    out: OutFile,
    options: Collecting,
    modes: OtherModes,
    compute: Compute,
    talk: Talk,
) -> None:
    """Collect statistics: what a rounding error of each weight costs.

    The model is run over texts. `quantize --stats` rounds and chooses types by the statistics.
    """
    from pocketquant.calibration.statistics_writing import merge_statistics
    from pocketquant.demo import text_path
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.gguf_file.shards import parse_size

    if modes.merge:
        others = _SETTINGS | {"text", "context", "chunks", "resume", "curvature", "dry_run", "sensitivity"}
        refuse_given(command_line, others, "has no effect with --merge, which runs no model")
        refuse_overwriting([out], sources)
        merge_statistics(sources, out)
        _say_kernels(sources, talk)
        _report(out, talk)
        return
    if len(sources) != 1:
        raise typer.BadParameter("only one model can be run; to add statistics up, give --merge", param_hint="SRC")
    if modes.sensitivity:
        refuse_given(command_line, {*_SETTINGS, "curvature"}, "has no effect with --sensitivity")
        set_document("sensitivity")
        runs = RunOptions(options.text, options.context, options.chunks or 32, options.resume, options.dry_run)
        sensitivity(sources[0], out, runs, modes.options, compute, talk)
        return
    refuse_overwriting([out], [*sources, *(options.text or [])])
    if options.reference_type not in ("f32", "bf16"):
        raise typer.BadParameter("must be f32 or bf16", param_hint="--reference-type")
    texts = options.text or [str(text_path("calibration"))]
    _collect(sources[0], _Task(out, texts, parse_size(options.memory), options, compute, talk))


@dataclass(frozen=True)
class _Task:
    out: Path
    texts: list[str]
    memory_bytes: int
    options: Collecting
    compute: Compute
    talk: Talk

    def collection(self, gguf: Path, steps: Steps) -> Collection:
        """The run over a GGUF in full precision."""
        from pocketquant.calibration.collecting import Collection, CollectSettings

        options = self.options
        how = CollectSettings(
            options.context,
            options.chunks,
            options.seed,
            options.resume,
            options.reference_type,
            self.memory_bytes,
            options.curvature,
            options.torch_device,
        )
        return Collection(gguf, self.texts, how, steps, self.compute.threads, self.compute.gpu_layers)


def _collect(source: str, task: _Task) -> None:
    from pocketquant.files.leftovers import holding
    from pocketquant.files.replacing import check_target

    options, threads = task.options, task.compute.threads
    if options.curvature:
        from pocketquant.calibration.torch_layers import require_torch

        require_torch()  # before hours of work
    if options.dry_run:
        _say_cost(source, task)
        return
    numbers = {"inputs": (1, 2), "gradients": (2, 2)} if options.curvature else {}

    def steps(label: str) -> AbstractContextManager[Callable[[int, int], None]]:
        return task.talk.steps(label, "windows", numbers.get(label))

    with (
        holding(check_target(task.out)),
        as_gguf(source, task.out, options.reference_type, threads=threads, quiet=task.talk.quiet) as gguf,
    ):
        task.collection(gguf, steps).write(task.out)
    _report(task.out, task.talk)


def _try_out(source: str, task: _Task, model: Model) -> Pace | None:
    """The pace of the runs that collect inputs; None for a checkpoint that is too large to be converted for a trial."""
    from pocketquant.convert.sources import names_gguf
    from pocketquant.files.leftovers import work_folder
    from pocketquant.files.replacing import check_target
    from pocketquant.pace import try_out
    from pocketquant.quant import open_recipe, plan

    nbytes = 0 if names_gguf(source) else plan(model, open_recipe(task.options.reference_type)).file_bytes
    if not can_try(nbytes, task.texts, task.talk):
        return None
    plain = replace(task, options=replace(task.options, curvature=False, resume=False))
    with work_folder(check_target(task.out)) as folder, as_gguf(source, folder / "trial", quiet=True) as gguf:
        return try_out(
            lambda progress: plain.collection(gguf, lambda _: nullcontext(progress)).write(folder / "trial.stats")
        )


def _say_cost(source: str, task: _Task) -> None:
    from pocketquant.calibration.statistics_run import plan_statistics
    from pocketquant.convert.sources import open_model

    model = open_model(source)
    calibration = plan_statistics(model, memory_bytes=task.memory_bytes)
    cost: dict[str, Any] = {
        "passes": len(calibration.passes),
        "memory_bytes": max(one.sum_bytes for one in calibration.passes),
        "file_bytes": calibration.file_bytes,
    }
    if task.options.curvature:
        from pocketquant.calibration.fisher import cost_of_gradients

        outputs, largest = cost_of_gradients(model, set(calibration.shared))
        cost |= {
            "gradient_memory_bytes": largest,
            "file_bytes": cost["file_bytes"] + outputs,
            "disk_bytes": 2 * (cost["file_bytes"] + outputs),
            "disk_bytes_per_1000_tokens": 4000 * (model.sizes["n_layer"] + 2) * model.sizes["n_embd"],
        }
    line = (
        f"{cost['passes']} pass(es), sums of {size(cost['memory_bytes'])} in memory, file of {size(cost['file_bytes'])}"
    )
    if task.options.curvature:
        line += (
            f"; gradients: {size(cost['gradient_memory_bytes'])} of memory for the largest layer, and meanwhile "
            f"{size(cost['disk_bytes'])} of disk and {size(cost['disk_bytes_per_1000_tokens'])} for every 1000 tokens"
        )
    task.talk.say(line)
    pace = _try_out(source, task, model)
    if pace is not None:
        say_pace(pace, "windows", cost["file_bytes"], task.talk, cost)
    elif task.talk.json:
        print_json(cost, of="plan")


def _say_kernels(merged: list[str], talk: Talk) -> None:
    from pocketquant.calibration.statistics import open_statistics
    from pocketquant.llama.kernels import note_on_sum

    opened = {name: open_statistics(name) for name in merged}
    of_inputs = {name: statistics.kernels for name, statistics in opened.items() if statistics.tokens}
    if of_inputs and (note := note_on_sum(of_inputs)):
        talk.say(f"note: {note}")


def _report(out: Path, talk: Talk) -> None:
    from pocketquant.calibration.statistics import open_statistics

    statistics = open_statistics(out)
    summary = {
        "out": str(out),
        "file_bytes": out.stat().st_size,
        "tensors": len(statistics.shared),
        "tokens": statistics.tokens,
        "texts": [{"name": t.name, "tokens": t.tokens, "tokens_sha256": t.sha256} for t in statistics.texts],
        "model_sha256": statistics.model_sha256,
        "kernels": dict(statistics.kernels),
        "curvature": statistics.has_outputs,
        "experts_without_input": statistics.n_unseen_experts,
    }
    talk.say(
        f"written: {out}: statistics of {summary['tensors']} tensors from {summary['tokens']} tokens"
        + (", with gradients" if statistics.has_outputs else "")
        + f", {size(out.stat().st_size)}"
    )
    if without := summary["experts_without_input"]:
        talk.say(f"note: {without} experts' matrices saw no input; they are rounded without statistics")
    if talk.json:
        print_json(summary)

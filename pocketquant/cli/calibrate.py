"""`pocketquant calibrate`: statistics for rounding and for the choice of types, with or without gradients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketquant.cli.planning import as_gguf
from pocketquant.cli.screen import print_json, say, size, step_progress

if TYPE_CHECKING:
    from pocketquant.texts.calibration import CalibrationSettings


def calibrate(
    sources: Annotated[
        list[str], typer.Argument(metavar="SRC", help="Checkpoint or GGUF in F32 or BF16; with --merge, statistics.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The statistics file to write.")],
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="FILE|self", help="UTF-8 text, several times for several; default: embedded."),
    ] = None,
    curvature: Annotated[
        bool, typer.Option("--curvature", help="Gradients too (extra `curvature`: torch, transformers).")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Add statistics of one model up instead of running it.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run was saved.")] = False,
    memory: Annotated[
        str, typer.Option("--memory", metavar="SIZE", help="Bound of the sums in memory; less means more passes.")
    ] = "2GB",
    context: Annotated[int, typer.Option("--context", min=16, metavar="N", help="Tokens in a window.")] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, metavar="N", help="Windows of each text; default: all, self: 16.")
    ] = None,
    reference_type: Annotated[
        str, typer.Option("--reference-type", metavar="f32|bf16", help="Type a checkpoint is run in.")
    ] = "f32",
    seed: Annotated[int, typer.Option("--seed", help="Of the labels, and of a text that the model writes.")] = 0,
    device: Annotated[str, typer.Option("--device", metavar="cpu|cuda", help="Where gradients are computed.")] = "cpu",
    threads: Annotated[int | None, typer.Option("--threads", min=1, metavar="N", help="Threads that compute.")] = None,
    gpu_layers: Annotated[int, typer.Option("--gpu-layers", metavar="N", help="Layers llama.cpp runs on a GPU.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it will cost and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no talk on stderr.")] = False,
) -> None:
    """Collect statistics of a model on texts: what a rounding error of each weight will cost."""
    from pocketquant.calibration.statistics_writing import merge_statistics
    from pocketquant.demo import text_path
    from pocketquant.files.leftovers import holding
    from pocketquant.files.replacing import check_target, refuse_overwriting
    from pocketquant.gguf_file.shards import parse_size

    refuse_overwriting([out], [*sources, *(text or [])])
    if merge:
        if text or resume or curvature or dry_run:
            raise typer.BadParameter("runs no model, so it takes no other options", param_hint="--merge")
        merge_statistics(sources, out)
        _say_kernels(sources, quiet=quiet)
        _report(out, json=json, quiet=quiet)
        return
    if len(sources) != 1:
        raise typer.BadParameter("one model; to add statistics up, say --merge", param_hint="SRC")
    if reference_type not in ("f32", "bf16"):
        raise typer.BadParameter("f32 or bf16", param_hint="--reference-type")
    task = _Task(
        out,
        tuple(text or [str(text_path("calibration"))]),
        parse_size(memory),
        context,
        chunks,
        seed,
        threads,
        gpu_layers,
        device,
        resume,
        quiet,
    )
    if curvature:
        from pocketquant.calibration.torch_layers import require_torch

        require_torch()  # before hours of work
    if dry_run:
        _say_cost(sources[0], task, curvature, json=json)
        return
    with (
        holding(check_target(out)),
        as_gguf(sources[0], out, reference_type, threads=threads, quiet=quiet) as gguf,
    ):
        if curvature:
            _collect_both(gguf, task)
        else:
            _collect_inputs(gguf, task, out)
    _report(out, json=json, quiet=quiet)


@dataclass(frozen=True)
class _Task:
    out: Path
    texts: tuple[str, ...]
    memory_bytes: int
    context: int
    chunks: int | None
    seed: int
    threads: int | None
    gpu_layers: int
    device: str
    resume: bool
    quiet: bool

    @property
    def settings(self) -> CalibrationSettings:
        from pocketquant.texts.calibration import CalibrationSettings

        return CalibrationSettings(self.context, self.chunks, self.threads, self.gpu_layers, self.seed)


def _collect_inputs(gguf: Path, task: _Task, out: Path) -> None:
    from pocketquant.calibration.statistics_run import collect_statistics

    with step_progress("inputs", quiet=task.quiet) as advance:
        collect_statistics(
            gguf,
            task.texts,
            out,
            task.settings,
            memory_bytes=task.memory_bytes,
            resume=task.resume,
            progress=advance,
        )


def _collect_both(gguf: Path, task: _Task) -> None:
    """Inputs and gradients into files of their own, which are then joined."""
    from pocketquant.calibration.fisher import FisherSettings, collect_fisher
    from pocketquant.calibration.statistics import fingerprint, open_statistics
    from pocketquant.calibration.statistics_writing import merge_statistics
    from pocketquant.files.interrupts import resumable
    from pocketquant.files.replacing import hidden_beside
    from pocketquant.gguf_file.opening import open_gguf
    from pocketquant.texts.calibration import cut_texts

    inputs, gradients = hidden_beside(task.out, "inputs"), hidden_beside(task.out, "gradients")
    windows, texts, _ = cut_texts(gguf, task.texts, task.settings)
    model = open_gguf(gguf)
    is_done = False
    if task.resume and inputs.exists():
        made = open_statistics(inputs)
        is_done = (made.texts, made.model_sha256) == (texts, fingerprint(model))
    if not is_done:
        _collect_inputs(gguf, task, inputs)
    how = f"statistics of the inputs are kept in {inputs}; the same command with --resume goes on with the gradients"
    with resumable(inputs, how), step_progress("gradients", quiet=task.quiet) as advance:
        collect_fisher(
            model,
            windows,
            texts,
            gradients,
            FisherSettings(device=task.device, threads=task.threads, seed=task.seed),
            resume=task.resume,
            progress=advance,
        )
    merge_statistics([inputs, gradients], task.out)
    inputs.unlink()
    gradients.unlink()


def _say_cost(source: str, task: _Task, curvature: bool, *, json: bool) -> None:
    from pocketquant.calibration.statistics_run import plan_statistics
    from pocketquant.convert.sources import open_model

    model = open_model(source)
    calibration = plan_statistics(model, memory_bytes=task.memory_bytes)
    cost: dict[str, Any] = {
        "passes": len(calibration.passes),
        "memory_bytes": max(one.sum_bytes for one in calibration.passes),
        "file_bytes": calibration.file_bytes,
    }
    if curvature:
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
    if curvature:
        line += (
            f"; gradients: {size(cost['gradient_memory_bytes'])} of memory for the largest layer, and meanwhile "
            f"{size(cost['disk_bytes'])} of disk and {size(cost['disk_bytes_per_1000_tokens'])} for every 1000 tokens"
        )
    say(line, quiet=task.quiet)
    if json:
        print_json(cost, of="plan")


def _say_kernels(merged: list[str], *, quiet: bool) -> None:
    from pocketquant.calibration.statistics import open_statistics
    from pocketquant.llama.kernels import note_on_sum

    opened = {name: open_statistics(name) for name in merged}
    of_inputs = {name: statistics.kernels for name, statistics in opened.items() if statistics.tokens}
    if of_inputs and (note := note_on_sum(of_inputs)):
        say(f"note: {note}", quiet=quiet)


def _report(out: Path, *, json: bool, quiet: bool) -> None:
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
    say(
        f"written: {out}: statistics of {summary['tensors']} tensors from {summary['tokens']} tokens"
        + (", with gradients" if statistics.has_outputs else "")
        + f", {size(out.stat().st_size)}",
        quiet=quiet,
    )
    if without := summary["experts_without_input"]:
        say(f"note: {without} experts' matrices saw no input; they are rounded without statistics", quiet=quiet)
    if json:
        print_json(summary)

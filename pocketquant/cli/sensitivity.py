"""`pocketquant sensitivity`: what rounding each tensor costs, measured by runs or predicted from statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketquant.cli.screen import byte_progress, print_json, print_table, say, size, step_progress

if TYPE_CHECKING:
    from pocketquant.model import Role
    from pocketquant.quant.measuring import Runs


def sensitivity(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint, or GGUF in F32.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The table to write: for --sensitivity.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text", metavar="FILE", help="UTF-8 text to run on, several times for several; default: embedded."
        ),
    ] = None,
    stats: Annotated[
        Path | None, typer.Option("--stats", metavar="FILE", help="Predict from statistics instead of running.")
    ] = None,
    rounding: Annotated[
        str | None, typer.Option("--rounding", metavar="STEPS", help="With --stats: how the file will be rounded.")
    ] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="With --stats: run the rounder for every type, not for one of seven.")
    ] = False,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="With --stats: correct every role by one run of it.")
    ] = False,
    groups: Annotated[
        int | None,
        typer.Option("--groups", min=1, metavar="N", help="Groups of layers of a role; default: every layer."),
    ] = None,
    context: Annotated[int, typer.Option("--context", min=16, metavar="N", help="Tokens in a window.")] = 512,
    chunks: Annotated[int, typer.Option("--chunks", min=1, metavar="N", help="Windows of each text.")] = 32,
    threads: Annotated[int | None, typer.Option("--threads", min=1, metavar="N", help="Threads that compute.")] = None,
    gpu_layers: Annotated[int, typer.Option("--gpu-layers", metavar="N", help="Layers llama.cpp runs on a GPU.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted series was saved.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it will cost and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no talk on stderr.")] = False,
) -> None:
    """Measure what rounding each role and layer of a model costs, or predict it for every tensor and type."""
    from pocketquant.demo import text_path
    from pocketquant.files.replacing import refuse_overwriting

    refuse_overwriting([out], [source, stats, *(text or [])])
    if recalibrate and stats is None:
        raise typer.BadParameter("corrects predictions: needs --stats", param_hint="--recalibrate")
    if rounding is not None and stats is None:
        raise typer.BadParameter("needs --stats, from `pocketquant calibrate`", param_hint="--rounding")
    if thorough and stats is None:
        raise typer.BadParameter("is about predictions: needs --stats", param_hint="--thorough")
    if groups is not None and stats is not None:
        raise typer.BadParameter("is for measuring; leave out --stats or it", param_hint="--groups")
    texts = tuple(text or [text_path("calibration")])
    task = _Task(source, out, texts, context, chunks, threads, gpu_layers, resume, quiet)
    if dry_run:
        _say_cost(task, groups, stats, recalibrate, json=json)
        return
    if stats is None or recalibrate:  # before hours of work
        from pocketquant.texts.corpus import read_text

        for path in texts:
            read_text(path)
    if stats is None:
        _measure(task, groups, json=json)
    else:
        _predict(task, stats, rounding, thorough, recalibrate, json=json)


@dataclass(frozen=True)
class _Task:
    source: str
    out: Path
    texts: tuple[Path, ...]
    context: int
    chunks: int
    threads: int | None
    gpu_layers: int
    resume: bool
    quiet: bool


@contextmanager
def _running(task: _Task) -> Iterator[Runs]:
    """Runs of the source; what they need on disk is deleted at the end, the results only where all went well."""
    from pocketquant.convert.sources import open_model
    from pocketquant.eval.compare import compare
    from pocketquant.files.interrupts import resumable
    from pocketquant.files.leftovers import holding, work_folder
    from pocketquant.files.reading import sha256_of
    from pocketquant.files.replacing import check_target, hidden_beside
    from pocketquant.gguf_file.writing import write
    from pocketquant.quant import open_recipe, plan
    from pocketquant.quant.measuring import Runs
    from pocketquant.texts.corpus import Text

    state = hidden_beside(task.out, "runs.json")
    texts = [Text(f"{n} {path.stem}", path) for n, path in enumerate(task.texts)]

    def judge(model: Path, original: Path) -> float:
        report = compare(
            model,
            original,
            texts,
            context=task.context,
            chunks=task.chunks,
            threads=task.threads,
            gpu_layers=task.gpu_layers,
        )
        return report.metrics.kld.mean

    conditions = {"texts": [sha256_of(path) for path in task.texts], "context": task.context, "chunks": task.chunks}
    how = f"finished runs are kept in {state}; the same command with --resume goes on from there"
    with holding(check_target(task.out)), work_folder(check_target(task.out)) as folder:
        if not task.resume:
            state.unlink(missing_ok=True)
        with resumable(state, how):
            planned, reference = plan(open_model(task.source), open_recipe("f32")), folder / "reference.gguf"
            with byte_progress("converting", planned.file_bytes, quiet=task.quiet) as advance:
                write(planned, reference, threads=task.threads, on_bytes=advance)
            yield Runs(reference, folder / "work.gguf", judge, state, conditions)
        state.unlink(missing_ok=True)


def _measure(task: _Task, groups: int | None, *, json: bool) -> None:
    from pocketquant.files.replacing import replacing
    from pocketquant.quant.measuring import measure_sensitivity
    from pocketquant.quant.sensitivity import parse_sensitivity

    with _running(task) as runs, step_progress("runs", quiet=task.quiet) as advance:
        source = f"measured: {', '.join(path.name for path in task.texts)}, {task.chunks} windows of {task.context}"
        table = measure_sensitivity(runs, groups, source, advance)
        parse_sensitivity(table, str(task.out))
        with replacing(task.out) as temporary:
            temporary.write_text(table, encoding="utf-8")
    say(f"written: {task.out}: sensitivities by role and layer", quiet=task.quiet)
    if json:
        print_json({"out": str(task.out), "source": source})


def _predict(task: _Task, stats: Path, rounding: str | None, thorough: bool, recalibrated: bool, *, json: bool) -> None:
    from pocketquant.calibration.statistics import open_statistics
    from pocketquant.convert.sources import open_model
    from pocketquant.quant.loss_table import write_losses
    from pocketquant.quant.measuring import PROBE, recalibrate
    from pocketquant.quant.prediction import predict_losses
    from pocketquant.quant.rounding.encoding import STEPS

    if rounding not in (None, "none", *STEPS):
        raise typer.BadParameter(f"none, {', '.join(STEPS)}", param_hint="--rounding")
    model, statistics = open_model(task.source), open_statistics(stats)
    options = None if rounding == "none" else STEPS[rounding or "two-sided"]
    with step_progress("predicting", quiet=task.quiet) as advance:
        table = predict_losses(
            model, statistics, rounding=options, thorough=thorough, activations=True, progress=advance
        )
    found: dict[Role, tuple[float, float]] = {}
    if recalibrated:
        plain = predict_losses(model, statistics, rounding=None, formats=(PROBE, "Q8_0"))
        with _running(task) as runs, step_progress("runs", quiet=task.quiet) as advance:
            table, found = recalibrate(runs, table, plain, advance)
    write_losses(table, task.out)
    say(f"written: {task.out}: predicted losses of {len(table.losses)} tensors, from {table.source}", quiet=task.quiet)
    rows = {
        role.value: {"predicted": a, "measured": b, "ratio": b / a if a else None} for role, (a, b) in found.items()
    }
    if json:
        print_json({"out": str(task.out), "source": table.source, "roles": rows})
    elif rows:
        cells = [
            [role, f"{row['predicted']:.3g}", f"{row['measured']:.3g}", f"{row['ratio'] or 0:.2f}"]
            for role, row in rows.items()
        ]
        print_table([f"role in {PROBE}", "predicted", "measured", "measured / predicted"], cells)


def _say_cost(task: _Task, groups: int | None, stats: Path | None, recalibrated: bool, *, json: bool) -> None:
    from pocketquant.convert.sources import open_model
    from pocketquant.quant import open_recipe, plan
    from pocketquant.quant.measuring import count_runs, list_groups

    model = open_model(task.source)
    runs = count_runs(model, groups) if stats is None else len(list_groups(model, 1)) * recalibrated
    nbytes = 2 * plan(model, open_recipe("f32")).file_bytes if runs else 0
    cost: dict[str, Any] = {"runs": runs, "windows": runs * task.chunks * len(task.texts), "disk_bytes": nbytes}
    say(
        f"{runs} runs of two models, {cost['windows']} windows of {task.context} tokens in all; meanwhile "
        f"{size(nbytes)} of disk",
        quiet=task.quiet,
    )
    if json:
        print_json(cost, of="plan")

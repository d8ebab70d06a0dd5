"""`calibrate --sensitivity`, and `sensitivity`: what rounding each tensor costs, measured or predicted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketquant.cli.options import Compute, CostOnly, OutFile, Resume, Talk, mode_panel, option
from pocketquant.cli.screen import print_json, print_table, size

if TYPE_CHECKING:
    from pocketquant.model import Role
    from pocketquant.quant.measuring import Runs as ModelRuns

TrainingContext = Annotated[int, option("--context", "N", "Tokens in a window.", min=16)]
_PANEL = mode_panel("--sensitivity")


@dataclass(frozen=True)
class RunOptions:
    """The runs that measure."""

    text: Annotated[
        list[str] | None, option("--text", "FILE", "UTF-8 text; may be repeated; default: the embedded text.")
    ] = None
    context: TrainingContext = 512
    chunks: Annotated[int, option("--chunks", "N", "Use at most this many windows of each text.", min=1)] = 32
    resume: Resume = False
    dry_run: CostOnly = False


@dataclass(frozen=True)
class SensitivityOptions:
    """Measured by runs, or predicted from statistics."""

    stats: Annotated[
        Path | None, option("--stats", "FILE", "Predict from these statistics, in place of running the model.", _PANEL)
    ] = None
    rounding: Annotated[
        str | None, option("--rounding", "STEPS", "With --stats: how the file will be rounded.", _PANEL)
    ] = None
    thorough: Annotated[
        bool,
        option(
            "--thorough",
            "",
            "With --stats: round each tensor in every type, in place of estimating most from one.",
            _PANEL,
        ),
    ] = False
    recalibrate: Annotated[
        bool,
        option("--recalibrate", "", "With --stats: correct each role's prediction by one run of the model.", _PANEL),
    ] = False
    groups: Annotated[
        int | None,
        option(
            "--groups", "N", "Measure a role in so many groups of layers; default: each layer by itself.", _PANEL, min=1
        ),
    ] = None

    def check(self) -> None:
        """Refuses what does not go together."""
        from pocketquant.quant.rounding.encoding import STEPS

        if self.rounding not in (None, "none", *STEPS):
            raise typer.BadParameter(f"must be one of none, {', '.join(STEPS)}", param_hint="--rounding")
        if self.groups is not None and self.stats is not None:
            raise typer.BadParameter(
                "is used only without --stats, which predicts and does not measure", param_hint="--groups"
            )
        if self.stats is not None:
            return
        if self.recalibrate:
            raise typer.BadParameter("corrects predictions, so it needs --stats", param_hint="--recalibrate")
        if self.rounding is not None:
            raise typer.BadParameter("needs --stats, from `pocketquant calibrate`", param_hint="--rounding")
        if self.thorough:
            raise typer.BadParameter("is about predictions, so it needs --stats", param_hint="--thorough")


def sensitivity(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint, or GGUF in F32.")],
    out: OutFile,
    runs: RunOptions,
    options: SensitivityOptions,
    compute: Compute,
    talk: Talk,
) -> None:
    """Measure what rounding costs, as `calibrate --sensitivity`.

    With --stats the cost is predicted, for every tensor and type.
    """
    from pocketquant.demo import text_path
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.texts.corpus import read_text

    refuse_overwriting([out], [source, options.stats, *(runs.text or [])])
    options.check()
    texts = tuple(Path(text) for text in runs.text or [str(text_path("calibration"))])
    task = _Task(source, out, texts, runs, options, compute, talk)
    if options.stats is None or options.recalibrate:  # before hours of work
        for path in texts:
            read_text(path)
    if runs.dry_run:
        _say_cost(task)
    elif options.stats is None:
        _measure(task)
    else:
        _predict(task, options.stats)


@dataclass(frozen=True)
class _Task:
    source: str
    out: Path
    texts: tuple[Path, ...]
    runs: RunOptions
    options: SensitivityOptions
    compute: Compute
    talk: Talk


@contextmanager
def _running(task: _Task) -> Iterator[ModelRuns]:
    """Runs of the source; what they need on disk is deleted at the end, the results only where all went well."""
    from pocketquant.convert.sources import names_gguf, open_model
    from pocketquant.eval.compare import compare
    from pocketquant.files.interrupts import resumable
    from pocketquant.files.leftovers import holding, work_folder
    from pocketquant.files.reading import sha256_of
    from pocketquant.files.replacing import check_target, hidden_beside
    from pocketquant.gguf_file.writing import write
    from pocketquant.llama.library import check_loadable
    from pocketquant.quant import open_recipe, plan
    from pocketquant.quant.measuring import Runs as ModelRuns
    from pocketquant.texts.corpus import Text

    if names_gguf(task.source):
        check_loadable(Path(task.source))  # by its own name, not by that of the copy that would be run
    state = hidden_beside(task.out, "runs.json")
    texts = [Text(f"{n} {path.stem}", path) for n, path in enumerate(task.texts)]

    def judge(model: Path, original: Path) -> float:
        report = compare(
            model,
            original,
            texts,
            context=task.runs.context,
            chunks=task.runs.chunks,
            threads=task.compute.threads,
            gpu_layers=task.compute.gpu_layers,
        )
        return report.metrics.kld.mean

    conditions = {
        "texts": [sha256_of(path) for path in task.texts],
        "context": task.runs.context,
        "chunks": task.runs.chunks,
    }
    how = f"finished runs are kept in {state}; the same command with --resume goes on from there"
    with holding(check_target(task.out)), work_folder(check_target(task.out)) as folder:
        if not task.runs.resume:
            state.unlink(missing_ok=True)
        with resumable(state, how):
            planned, reference = plan(open_model(task.source), open_recipe("f32")), folder / "reference.gguf"
            with task.talk.bytes("converting", planned.file_bytes) as advance:
                write(planned, reference, threads=task.compute.threads, on_bytes=advance)
            yield ModelRuns(reference, folder / "work.gguf", judge, state, conditions)
        state.unlink(missing_ok=True)


def _measure(task: _Task) -> None:
    from pocketquant.files.replacing import replacing
    from pocketquant.quant.measuring import measure_sensitivity
    from pocketquant.quant.sensitivity import parse_sensitivity

    with _running(task) as runs, task.talk.steps("runs", "runs") as advance:
        names = ", ".join(path.name for path in task.texts)
        source = f"measured: {names}, {task.runs.chunks} windows of {task.runs.context}"
        table = measure_sensitivity(runs, task.options.groups, source, advance)
        parse_sensitivity(table, str(task.out))
        with replacing(task.out) as temporary:
            temporary.write_text(table, encoding="utf-8")
    task.talk.say(f"written: {task.out}: sensitivities by role and layer")
    if task.talk.json:
        print_json({"out": str(task.out), "source": source})


def _predict(task: _Task, stats: Path) -> None:
    from pocketquant.calibration.statistics import open_statistics
    from pocketquant.convert.sources import open_model
    from pocketquant.quant.loss_table import write_losses
    from pocketquant.quant.measuring import PROBE, recalibrate
    from pocketquant.quant.prediction import PredictSettings, predict_losses
    from pocketquant.quant.rounding.encoding import STEPS

    rounding = task.options.rounding
    model, statistics = open_model(task.source), open_statistics(stats)
    steps = None if rounding == "none" else STEPS[rounding or "two-sided"]
    with task.talk.steps("predicting", "tensors") as advance:
        settings = PredictSettings(steps, thorough=task.options.thorough, activations=True)
        table = predict_losses(model, statistics, settings, advance)
    found: dict[Role, tuple[float, float]] = {}
    if task.options.recalibrate:
        plain = predict_losses(model, statistics, PredictSettings(rounding=None, formats=(PROBE, "Q8_0")))
        with _running(task) as runs, task.talk.steps("runs", "runs") as advance:
            table, found = recalibrate(runs, table, plain, advance)
    write_losses(table, task.out)
    task.talk.say(f"written: {task.out}: predicted losses of {len(table.losses)} tensors, from {table.source}")
    rows = {
        role.value: {"predicted": a, "measured": b, "ratio": b / a if a else None} for role, (a, b) in found.items()
    }
    if task.talk.json:
        print_json({"out": str(task.out), "source": table.source, "roles": rows})
    elif rows:
        cells = [
            [role, f"{row['predicted']:.3g}", f"{row['measured']:.3g}", f"{row['ratio'] or 0:.2f}"]
            for role, row in rows.items()
        ]
        print_table([f"role in {PROBE}", "predicted", "measured", "measured / predicted"], cells)


def _say_cost(task: _Task) -> None:
    from pocketquant.calibration.statistics import open_statistics
    from pocketquant.convert.sources import open_model
    from pocketquant.quant import open_recipe, plan
    from pocketquant.quant.measuring import count_runs, list_groups

    model = open_model(task.source)
    options = task.options
    if options.stats is not None:
        open_statistics(options.stats)
    runs = len(list_groups(model, 1)) * options.recalibrate if options.stats else count_runs(model, options.groups)
    nbytes = 2 * plan(model, open_recipe("f32")).file_bytes if runs else 0
    cost: dict[str, Any] = {"runs": runs, "windows": runs * task.runs.chunks * len(task.texts), "disk_bytes": nbytes}
    task.talk.say(
        f"{runs} runs of two models, {cost['windows']} windows of {task.runs.context} tokens in all; meanwhile "
        f"{size(nbytes)} of disk"
    )
    if task.talk.json:
        print_json(cost, of="plan")

"""`eval --tasks`, and `tasks`: what quantization costs on benchmarks, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pocketquant.cli.options import Compute, CostOnly, Gguf, ReferenceGguf, ReportOut, Talk, mode_panel, option
from pocketquant.cli.screen import headed, print_json, print_table
from pocketquant.cli.streams import keep_elsewhere
from pocketquant.errors import OutputError

if TYPE_CHECKING:
    from pocketquant.eval.tasks.compare import TasksReport
    from pocketquant.eval.tasks.paired import Paired
    from pocketquant.eval.tasks.smoke import SmokeReport

TaskNames = Annotated[
    str, option("--tasks", "NAME,…", "Tasks of lm-evaluation-harness, or your own in --include-path.")
]
TaskContext = Annotated[
    int | None, option("--context", "N", "Tokens of a prompt and its answer; default: 4096.", min=8)
]
_PANEL = mode_panel("--tasks")


@dataclass(frozen=True)
class TaskOptions:
    """Which items of the tasks, and how they are asked."""

    include_path: Annotated[
        Path | None, option("--include-path", "DIR", "Folder with YAML task files of your own.", _PANEL)
    ] = None
    limit: Annotated[int | None, option("--limit", "N", "Ask only the first N items of each task.", _PANEL, min=1)] = (
        None
    )
    num_fewshot: Annotated[
        int | None, option("--num-fewshot", "K", "Solved examples in front of each question.", _PANEL, min=0)
    ] = None
    chat: Annotated[bool, option("--chat", "", "Put each prompt into the model's chat template.", _PANEL)] = False


@dataclass(frozen=True)
class Run:
    """How a comparison is run, and what becomes of the result."""

    compute: Compute
    talk: Talk
    out: ReportOut = None
    dry_run: CostOnly = False

    def refuse_overwriting(self, *read: Path | str) -> None:
        """Refuses a report in the place of what is read."""
        from pocketquant.files import replacing

        replacing.refuse_overwriting([self.out] if self.out else [], read)

    def keep(self, report: Any) -> None:
        """Writes the report where it is wanted, and prints it where JSON is."""
        from pocketquant.eval.tasks.compare import report_text, write_report

        if self.out is not None:
            document = headed(report.to_json())
            try:
                write_report(document, self.out)
            except OutputError as error:  # hours of work are not lost to a disk that filled up meanwhile
                kept = keep_elsewhere(report_text(document))
                where = f"the report is kept in {kept}" if kept else "nor could the report be kept elsewhere"
                raise OutputError(f"{error}; {where}") from error
        if self.talk.json:
            print_json(report.to_json())


def tasks(
    gguf: Gguf,
    reference: ReferenceGguf,
    tasks: TaskNames,
    *,
    options: TaskOptions,
    context: TaskContext = None,
    run: Run,
) -> None:
    """Compare answers to benchmarks, as `eval --tasks`."""
    from pocketquant.eval.tasks.compare import compare_on_tasks, count_cost
    from pocketquant.eval.tasks.loading import TaskSettings

    run.refuse_overwriting(gguf, reference)
    settings = TaskSettings(
        names=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        include_path=options.include_path,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        context=context,
        threads=run.compute.threads,
        gpu_layers=run.compute.gpu_layers,
        uses_chat_template=options.chat,
    )
    if run.dry_run:
        _say_cost(count_cost(Path(reference), settings), run.talk)
        return
    with run.talk.steps(gguf.name, "items") as advance:
        found = compare_on_tasks(gguf, Path(reference), settings, progress=advance)
    run.keep(found)
    if not run.talk.json:
        _print_results(found)
    _say_notes(found, run.talk)


def _say_cost(cost: Any, talk: Talk) -> None:
    talk.say(
        f"{cost.requests} requests; each model decodes at most {cost.decoded_tokens} tokens, "
        f"{cost.asked_tokens} if beginnings were not shared"
    )
    if talk.json:
        numbers = {"requests": cost.requests, "decoded_tokens": cost.decoded_tokens, "asked_tokens": cost.asked_tokens}
        print_json(numbers, of="plan")


def _say_notes(report: Any, talk: Talk) -> None:
    for name, cost in report.cost.items():
        for count, what in (
            (cost.cut_prompts, "prompts lost their beginning; use a larger --context"),
            (cost.cut_answers, "answers had less room than their task allows; use a larger --context"),
            (cost.sampled, "answers were to be drawn at random and are the most likely ones instead"),
            (cost.non_finite, "rows of logits were no finite numbers; the file is damaged"),
        ):
            if count:
                talk.say(f"note: {name}: {count} {what}")
    note_quantized(report, talk)
    for task, metrics in report.left_out.items():
        talk.say(f"note: {task}: not item by item, left out: {', '.join(metrics)}")


def note_quantized(report: TasksReport | SmokeReport, talk: Talk) -> None:
    """Says that a reference is itself quantized."""
    from pocketquant.eval.kinship import quantized_reference

    if report.reference_quantized is not None:
        talk.say(f"note: {quantized_reference(report.reference.name, report.reference_quantized)}")


def _print_results(report: Any) -> None:
    rows, others = [], []
    for result in report.results:
        if result.answers is not None:
            rows.append([result.task, result.metric, *_cells(result.answers)])
        else:
            difference, error = result.mean_difference
            others.append([result.task, result.metric, f"{difference:+.4g} ± {error:.2g}"])
    if rows:
        columns = ["task", "measure", "items", "model %", "reference %", "difference", "lost", "gained", "p"]
        print_table([*columns, "could show"], rows)
    if others:
        print_table(["task", "measure", "mean difference"], others)


def _cells(paired: Paired) -> Sequence[str]:
    effect = "nothing" if paired.smallest_effect is None else f"{100 * paired.smallest_effect:.2g} points"
    return (
        f"{paired.items}",
        f"{100 * paired.model:.2f}",
        f"{100 * paired.reference:.2f}",
        f"{100 * paired.difference:+.2f} ± {100 * paired.standard_error:.2f}",
        f"{paired.lost}",
        f"{paired.gained}",
        f"{paired.p_value:.2g}",
        effect,
    )

"""The cost of quantization on benchmarks: every item of a task under the model and under its reference.

The tasks are those of lm-evaluation-harness, its hundreds and any YAML file of one's own, unchanged; the model is ours
(`answering`). A task is loaded once, so that both models see the same prompts to the letter, and that is checked.

Source: lm-evaluation-harness 0.4.13, lm_eval/evaluator.py (`evaluate`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pocketquant.errors import EvalError
from pocketquant.eval.kinship import describe_quantized
from pocketquant.eval.tasks.answering import AnsweringModel, Cost, Render
from pocketquant.eval.tasks.loading import TaskSettings, describe_failure, load_tasks, quiet_harness
from pocketquant.eval.tasks.paired import Paired, mean_difference, pair_answers
from pocketquant.extras import list_versions
from pocketquant.files.reading import states_of
from pocketquant.files.replacing import replacing
from pocketquant.files.unchanged import check_unchanged
from pocketquant.gguf_file.identity import FileIdentity, identify_model
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.llama.shared_prefix import open_shared_prefix
from pocketquant.texts.chat_template import RENDERED, Rendering, render_conversations, special_tokens

SCHEMA = "pocketquant.tasks/1"
DEFAULT_CONTEXT = 4096
FEWSHOT_SEED = 1234
"""The harness's own default."""

_PERPLEXITIES = {"word_perplexity": "ln p a word", "byte_perplexity": "ln p a byte", "bits_per_byte": "ln p a byte"}
_SHOWN_CHARACTERS = 300

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Flip:
    """An item that one of the two models got right and the other did not.

    Attributes:
        task: its task.
        item: its number there.
        was_lost: the reference got it right.
        question: the end of its prompt.
        target: the right answer, as the task states it.
        model: the answer of the model judged.
        reference: the answer of the reference.
    """

    task: str
    item: int
    was_lost: bool
    question: str
    target: str
    model: str
    reference: str


@dataclass(frozen=True)
class TaskResult:
    """One measure of one task, or of all tasks of a group together.

    Attributes:
        task: its name, or the group's.
        metric: as the task names it; with its filter where it has one.
        answers: for measures that are right or wrong.
        mean_difference: for those that are numbers: model - reference, and its standard error.
        flips: the items behind `answers.lost` and `answers.gained`; empty for groups.
    """

    task: str
    metric: str
    answers: Paired | None
    mean_difference: tuple[float, float] | None
    flips: tuple[Flip, ...]


@dataclass(frozen=True)
class TasksReport:
    """A comparison on tasks, with where it comes from.

    Attributes:
        tasks: name -> digest of all its prompts, items and targets.
        results: task by task, then groups.
        cost: what each model was asked.
        left_out: measures that are not item by item (a corpus's perplexity, an F1), by task.
        reference_quantized: the types that the reference's own matrices are rounded to; None for full precision.
    """

    model: FileIdentity
    reference: FileIdentity
    tasks: Mapping[str, str]
    limit: int | None
    num_fewshot: int | None
    context: int
    threads: int | None
    gpu_layers: int
    uses_chat_template: bool
    versions: Mapping[str, str]
    cost: Mapping[str, Cost]
    results: tuple[TaskResult, ...]
    left_out: Mapping[str, tuple[str, ...]]
    reference_quantized: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {"schema": SCHEMA, **asdict(self)}


def compare_on_tasks(
    model: Path, reference: Path, settings: TaskSettings, *, progress: Progress | None = None
) -> TasksReport:
    """Runs tasks on both files, one after the other, and compares item by item.

    Raises:
        EvalError: a task is unknown, its data cannot be had, it would run code that models wrote, the two models were
            not asked the same, or llama.cpp cannot run a file.
        SourceError: a file was changed meanwhile.
    """
    files = states_of(model, reference)
    identities = identify_model(model), identify_model(reference)
    settings = replace(settings, context=settings.context or min(context_of(model), context_of(reference)))
    with quiet_harness():
        tasks, groups = load_tasks(settings)
        theirs, reference_cost, versions = _run(reference, tasks, settings, progress, 0)
        ours, cost, _ = _run(model, tasks, settings, progress, reference_cost.requests)
    check_unchanged(files)
    results, left_out = _compare(ours, theirs, groups)
    return TasksReport(
        model=identities[0],
        reference=identities[1],
        tasks={task: _digest(samples) for task, samples in ours.items()},
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        context=settings.context or 0,
        threads=settings.threads,
        gpu_layers=settings.gpu_layers,
        uses_chat_template=settings.uses_chat_template,
        versions=list_versions() | versions | {"lm_eval": metadata.version("lm_eval")},
        cost={"model": cost, "reference": reference_cost},
        results=results,
        left_out=left_out,
        reference_quantized=describe_quantized(reference) or None,
    )


def count_cost(reference: Path, settings: TaskSettings) -> Cost:
    """What one run would ask of a model, without asking; errors are those of `compare_on_tasks`."""
    settings = replace(settings, context=settings.context or context_of(reference))
    with quiet_harness():
        tasks, _ = load_tasks(settings)
        return _run(reference, tasks, settings, None, 0, is_dry=True)[1]


def context_of(path: Path) -> int:
    """4,096 tokens, or what a file's model is made for if that is less."""
    values = open_gguf(path).metadata
    architecture = values.get("general.architecture")
    trained = values.get(f"{architecture.value}.context_length") if architecture is not None else None
    return min(DEFAULT_CONTEXT, int(trained.value)) if trained is not None else DEFAULT_CONTEXT


def _run(
    path: Path,
    tasks: Mapping[str, Any],
    settings: TaskSettings,
    progress: Progress | None,
    before: int,
    is_dry: bool = False,
) -> tuple[dict[str, list[dict[str, Any]]], Cost, dict[str, str]]:
    """Every sample that the harness logs, by task."""
    from lm_eval.evaluator import evaluate

    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(before + done, 2 * max(_count_requests(tasks), 1))

    for task in tasks.values():  # each run draws its examples from the start
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    context = settings.context or DEFAULT_CONTEXT
    with open_shared_prefix(path, context=context, threads=settings.threads, gpu_layers=settings.gpu_layers) as runtime:
        render = chat_renderer(path) if settings.uses_chat_template else None
        model = AnsweringModel(runtime, render=render, advance=advance, is_dry=is_dry)
        try:
            results = evaluate(
                lm=model,
                task_dict={"tasks": dict(tasks), "groups": {}, "group_map": {}},
                limit=settings.limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=settings.uses_chat_template,
                fewshot_as_multiturn=settings.uses_chat_template,
            )
        except EvalError:
            raise
        except Exception as error:
            raise EvalError(describe_failure(", ".join(tasks), error)) from error
        return results["samples"], model.cost, dict(runtime.versions)


def chat_renderer(path: Path) -> Render:
    """Renders conversations in a GGUF's chat template; EvalError if it has none."""
    values = open_gguf(path).metadata
    template = values.get("tokenizer.chat_template")
    if template is None or not isinstance(template.value, str):
        raise EvalError(f"{path}: has no chat template; leave out --chat, or convert it with --chat-template FILE")
    source, tokens = template.value, tuple(special_tokens(values).items())

    def render(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        rendering = _render(source, tokens, json.dumps(list(messages)), add_generation_prompt)
        if rendering.outcome != RENDERED:
            raise EvalError(f"{path}: its chat template does not render a prompt: {rendering.message}")
        return rendering.text

    return render


@lru_cache(maxsize=100_000)
def _render(source: str, tokens: tuple[tuple[str, str], ...], messages: str, add_generation_prompt: bool) -> Rendering:
    """Once for both models: it takes a process of its own."""
    variables = {"add_generation_prompt": add_generation_prompt}
    (rendering,) = render_conversations(source, dict(tokens), [json.loads(messages)], variables=variables)
    return rendering


def _compare(
    ours: Mapping[str, list[dict[str, Any]]],
    theirs: Mapping[str, list[dict[str, Any]]],
    groups: Mapping[str, tuple[str, ...]],
) -> tuple[tuple[TaskResult, ...], dict[str, tuple[str, ...]]]:
    results: list[TaskResult] = []
    left_out: dict[str, tuple[str, ...]] = {}
    by_metric: dict[tuple[str, str], tuple[list[bool], list[bool]]] = {}
    for task in ours:
        skipped = []
        for metric, samples in _by_metric(task, ours[task], theirs[task]).items():
            label = _PERPLEXITIES.get(metric[0], metric[0])
            name = label if metric[1] == "none" else f"{label} ({metric[1]})"
            values = tuple([_number(each[side], metric[0]) for each in samples] for side in (0, 1))
            if not all(isinstance(value, int | float) for side in values for value in side):
                skipped.append(name)
            elif all(value in (0, 1) for side in values for value in side):
                right = [bool(value) for value in values[0]], [bool(value) for value in values[1]]
                by_metric[task, name] = right
                flips = [_flip(task, metric[0], *pair) for pair in samples if pair[0][metric[0]] != pair[1][metric[0]]]
                results.append(TaskResult(task, name, pair_answers(*right), None, tuple(flips)))
            else:
                results.append(TaskResult(task, name, None, mean_difference(*values), ()))
        if skipped:
            left_out[task] = tuple(skipped)
    for group, members in groups.items():
        names = dict.fromkeys(name for task, name in by_metric if task in members)
        for name in names:
            pairs = [by_metric[task, name] for task in members if (task, name) in by_metric]
            right = [value for pair in pairs for value in pair[0]], [value for pair in pairs for value in pair[1]]
            results.append(TaskResult(group, name, pair_answers(*right), None, ()))
    return tuple(results), left_out


def _number(sample: Mapping[str, Any], metric: str) -> Any:
    """An item's value; for the perplexity of a text, whose items are (ln p, length), its mean ln p."""
    value = sample[metric]
    if metric in _PERPLEXITIES and isinstance(value, tuple | list) and len(value) == 2 and value[1]:
        return value[0] / value[1]
    return value


def _by_metric(
    task: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]
) -> dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Pairs of samples of the same item, by metric and filter."""
    other = {(sample["filter"], sample["doc_id"]): sample for sample in theirs}
    found: dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for sample in ours:
        partner = other.get((sample["filter"], sample["doc_id"]))
        keys = ("prompt_hash", "target_hash", "doc_hash")
        if partner is None or any(sample[key] != partner[key] for key in keys):
            raise EvalError(
                f"task {task}: item {sample['doc_id']} was not the same for both models; "
                "it draws at random, or --chat met two different chat templates"
            )
        for metric in sample["metrics"]:
            found.setdefault((metric, sample["filter"]), []).append((sample, partner))
    return found


def _flip(task: str, metric: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Flip:
    prompt = str(ours["arguments"][0][0])
    return Flip(
        task=task,
        item=int(ours["doc_id"]),
        was_lost=bool(theirs[metric]),
        question=prompt[-_SHOWN_CHARACTERS:],
        target=str(ours["target"])[:_SHOWN_CHARACTERS],
        model=_answer(ours, metric),
        reference=_answer(theirs, metric),
    )


def _answer(sample: Mapping[str, Any], metric: str) -> str:
    """The choice with the highest score, or the text that was written."""
    answers, arguments = sample["filtered_resps"], sample["arguments"]
    if isinstance(answers[0], tuple | list) and len(answers) > 1:
        choices = [str(argument[1]) for argument in arguments]
        scale = [max(len(choice), 1) if metric.endswith("_norm") else 1 for choice in choices]
        best = max(range(len(answers)), key=lambda i: float(answers[i][0]) / scale[i])
        return choices[best][:_SHOWN_CHARACTERS]
    return str(answers[0])[:_SHOWN_CHARACTERS]


def _digest(samples: Sequence[Mapping[str, Any]]) -> str:
    """Of everything that was asked: items, prompts and targets."""
    lines = sorted(
        f"{each['doc_id']} {each['doc_hash']} {each['prompt_hash']} {each['target_hash']}" for each in samples
    )
    return hashlib.sha256("\n".join(dict.fromkeys(lines)).encode()).hexdigest()


def _count_requests(tasks: Mapping[str, Any]) -> int:
    return sum(len(task.instances or ()) for task in tasks.values())


def write_report(values: Mapping[str, Any], out: Path) -> None:
    """A report's `to_json` in a file, whole or not at all."""
    with replacing(out) as temporary:
        temporary.write_text(report_text(values), encoding="utf-8")


def report_text(values: Mapping[str, Any]) -> str:
    """A report's `to_json` as the text of a file."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

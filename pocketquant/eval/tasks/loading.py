"""Finds benchmark tasks by name and loads them with their data.

Source: lm-evaluation-harness 0.4.13, lm_eval/tasks/manager.py.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketquant.errors import EvalError, listing
from pocketquant.extras import install_command


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run; the same for both models.

    Attributes:
        names: tasks, groups and tags of the harness, or of `include_path`.
        include_path: folder with YAML files of one's own.
        limit: only the first items of each task.
        num_fewshot: examples before each question; None for what each task says.
        context: tokens of the longest prompt and its answer; None for 4,096, or what the model is made for if less.
        uses_chat_template: put each prompt into the model's chat template.
    """

    names: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    context: int | None = None
    threads: int | None = None
    gpu_layers: int = 0
    uses_chat_template: bool = False


def load_tasks(settings: TaskSettings) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Tasks by name with their data, and the tasks of each name that stands for several."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvalError(
            f"tasks need lm-evaluation-harness, which cannot be imported ({error}); {install_command('tasks')}"
        ) from error
    if settings.include_path is not None and not settings.include_path.is_dir():
        raise EvalError(f"{settings.include_path}: no such folder; --include-path is for one with YAML task files")
    manager = TaskManager(include_path=None if settings.include_path is None else str(settings.include_path))
    unknown = [name for name in settings.names if name not in manager.all_tasks]
    if unknown or not settings.names:
        raise EvalError(
            "these are no tasks; see `lm-eval ls tasks`, or add --include-path DIR for files of your own\n"
            + listing(_suggest(name, manager.all_tasks) for name in unknown)
        )
    tasks: dict[str, Any] = {}
    groups = {}
    for name in settings.names:
        try:
            loaded = manager.load([name])["tasks"]
        except Exception as error:
            # the harness, its data library and a task's own code may raise anything
            raise EvalError(describe_failure(name, error)) from error
        if list(loaded) != [name]:
            groups[name] = tuple(loaded)
        tasks |= loaded
    refused = sorted(name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False))
    if refused:
        raise EvalError(f"these tasks run code that the model wrote, which is not done here\n{listing(refused)}")
    for task in tasks.values():
        count = settings.num_fewshot
        # a task that sets 0 means it; the harness keeps to that too
        if task.get_config("num_fewshot") is None or (count is not None and task.get_config("num_fewshot") != 0):
            task.set_config(key="num_fewshot", value=count or 0)
    return tasks, groups


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"{name}: did you mean {', '.join(close)}?" if close else name


def describe_failure(name: str, error: Exception) -> str:
    """What the harness, its data library or a task raised, with advice."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:300]
    kind = type(error).__name__
    said = f"task {name}: {kind}: {text}"
    words = f"{kind} {text}".lower()
    if any(word in words for word in ("connect", "offline", "hub", "couldn't reach", "http", "max retries", "resolve")):
        return (
            f"{said}\nits data is downloaded from a hub, which cannot be reached from here: run it once with a network "
            "(the data is then kept, see HF_HOME), or give a local task with --include-path DIR"
        )
    if isinstance(error, ImportError):
        return f"{said}\nthe task needs a package that is not installed: pip install 'lm-eval[TASK]' names them"
    return f"{said}\nlook at the task's YAML file and its data"


@contextmanager
def quiet_harness() -> Iterator[None]:
    """The harness and its data library talk and draw bars on their own; ours is enough."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it when it is first imported
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

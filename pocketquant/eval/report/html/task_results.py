"""Benchmark results for a page: what `tasks --json` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketquant.eval.kinship import quantized_reference
from pocketquant.eval.report.html.taking import listed, mapping, number, whole, words

MAX_RESULTS = 512

HEAD = (
    "task",
    "items",
    "full precision",
    "quantized",
    "difference",
    "lost",
    "gained",
    "McNemar p",
    "smallest effect",
)
"""What the columns of a table are."""


@dataclass(frozen=True)
class TaskDrift:
    """A run of benchmarks, quantized against full precision, item by item.

    Attributes:
        note: whose, and how to read it.
        rows: cells, one for each of `HEAD`.
    """

    note: str
    rows: tuple[tuple[str, ...], ...]


def is_drift(document: Any) -> bool:
    """Whether a JSON document is one of these."""
    return isinstance(document, Mapping) and str(document.get("schema")).startswith("pocketquant.tasks/")


def read_drift(document: Mapping[str, Any], where: str) -> TaskDrift:
    """Takes the measures that are right or wrong, and those that are numbers.

    Raises:
        EvalError: more results than a page shows.
    """
    results = listed(document.get("results"), MAX_RESULTS, where, "results")
    model, reference = (words(mapping(document.get(name)).get("name")) for name in ("model", "reference"))
    note = (
        f"{model} against {reference}. Lost: right in full precision, wrong after quantizing; gained: the other way "
        "round. Of equally good files as many are lost as gained; p says how often chance alone does as much. Smallest "
        "effect: what so many items find in 80 of 100 runs; a smaller difference says nothing."
    )
    if types := words(document.get("reference_quantized")):
        note += f" {quantized_reference(reference, types)}"
    return TaskDrift(note, tuple(_row(result) for result in results))


def _row(result: Mapping[str, Any]) -> tuple[str, ...]:
    name = f"{words(result.get('task'))} ({words(result.get('metric'))})"
    answers = result.get("answers")
    if not isinstance(answers, Mapping):
        pair = result.get("mean_difference")
        mean, error = (number(each) for each in pair) if isinstance(pair, list) and len(pair) == 2 else (None, None)
        return (name, "", "", "", _signed(mean, error, 1, ""), "", "", "", "")
    items, lost, gained = (whole(answers.get(key)) for key in ("items", "lost", "gained"))
    p_value, effect = number(answers.get("p_value")), number(answers.get("smallest_effect"))
    return (
        name,
        "" if items is None else f"{items:,}",
        _percent(number(answers.get("reference"))),
        _percent(number(answers.get("model"))),
        _signed(number(answers.get("difference")), number(answers.get("standard_error")), 100, " points"),
        "" if lost is None else f"{lost:,}",
        "" if gained is None else f"{gained:,}",
        "" if p_value is None else f"{p_value:.2g}",
        "none" if effect is None else f"{100 * effect:.1f} points",
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _signed(mean: float | None, error: float | None, factor: float, unit: str) -> str:
    if mean is None:
        return ""
    return f"{factor * mean:+.2g}" + ("" if error is None else f" ± {factor * error:.1g}") + unit

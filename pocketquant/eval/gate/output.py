"""A verdict for machines and people: JSON, JUnit XML, Markdown, a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from pocketquant.escaping import as_code, for_markdown, one_line
from pocketquant.eval.gate.report_diff import Moved, MovedTensor
from pocketquant.eval.gate.verdict import FAILED, UNDECIDED, Decision, Verdict

SCHEMA = "pocketquant.gate/1"
_SHOWN = 10
_MARK = {"pass": "✅ pass", "fail": "❌ fail", "undecided": "⚠️ undecided"}


def to_json(verdict: Verdict, moved: Moved | None) -> dict[str, Any]:
    """Plain values for `json.dumps`; None stands for a number without end."""
    data = {
        "schema": SCHEMA,
        "is_accepted": verdict.is_accepted,
        "summary": verdict.summary,
        "confidence": verdict.confidence,
        "is_strict": verdict.is_strict,
        "is_paired": verdict.is_paired,
        "model": _identity(verdict.model),
        "baseline": None if verdict.baseline is None else _identity(verdict.baseline),
        "decisions": [asdict(decision) for decision in verdict.decisions],
        "moved": None if moved is None else asdict(moved),
    }
    found: dict[str, Any] = _plain(data)
    return found


def to_junit(verdict: Verdict, moved: Moved | None) -> str:
    """JUnit XML: a case for each limit; undecided ones are skipped, or fail where the verdict is strict."""
    cases = verdict.decisions
    n_undecided = verdict.count(UNDECIDED)
    failures = verdict.count(FAILED) + (n_undecided if verdict.is_strict else 0)
    counts = {"tests": len(cases), "failures": failures, "skipped": 0 if verdict.is_strict else n_undecided}
    suite = ElementTree.Element(
        "testsuite",
        {"name": one_line(f"pocketquant gate {verdict.model[0]}")} | {key: str(n) for key, n in counts.items()},
    )
    for decision in cases:
        case = ElementTree.SubElement(suite, "testcase", classname="pocketquant.gate", name=one_line(decision.limit))
        if decision.outcome == FAILED or (decision.outcome == UNDECIDED and verdict.is_strict):
            failure = ElementTree.SubElement(
                case, "failure", message=one_line(sentence(decision)), type=decision.outcome
            )
            failure.text = "\n".join(map(one_line, describe_moved(moved)))
        elif decision.outcome == UNDECIDED:
            ElementTree.SubElement(case, "skipped", message=one_line(sentence(decision)))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def verdict_to_markdown(verdict: Verdict, moved: Moved | None) -> str:
    """A job's summary."""
    mark = "✅" if verdict.is_accepted else "❌"
    against = f" against the last accepted {verdict.baseline[0]}" if verdict.baseline else ""
    lines = [f"## {mark} {_escaped(verdict.summary)}", ""]
    lines += ["| limit | outcome | found | interval | limit is | note |", "|---|---|---:|---|---|---|"]
    for cells in table(verdict):
        lines.append("| " + " | ".join(_escaped(cell) for cell in [cells[0], _MARK[cells[1]], *cells[2:]]) + " |")
    pairing = {"yes": ", window by window", "in part": ", window by window where tokens are the same"}
    lines += ["", f"{as_code(verdict.model[0])} ({_escaped(verdict.model[1][:12])}){_escaped(against)}"]
    lines[-1] += f"{pairing.get(verdict.is_paired or '', '')}. Intervals hold with {verdict.confidence:.4g} together."
    if described := describe_moved(moved):
        lines += ["", "### What moved", "", *(f"- {_escaped(line)}" for line in described)]
    return "\n".join(lines) + "\n"


def table(verdict: Verdict) -> list[list[str]]:
    """A row for each limit: name, outcome, estimate, interval, limit, note; what is broken first."""
    order = {FAILED: 0, UNDECIDED: 1}
    return [
        [each.limit, each.outcome, _number(each.found), _interval(each), _bound(each), _note(each)]
        for each in sorted(verdict.decisions, key=lambda each: order.get(each.outcome, 2))
    ]


def sentence(decision: Decision) -> str:
    """One decision in a line."""
    parts = [f"{decision.limit}: {decision.outcome}"]
    if decision.found is not None:
        parts.append(f"found {_number(decision.found)}{' ' + _interval(decision) if decision.tokens else ''}")
    if decision.bound is not None:
        parts.append(f"limit {_bound(decision)}")
    return ", ".join(parts) + (f"; {_note(decision)}" if _note(decision) else "")


def describe_moved(moved: Moved | None) -> list[str]:
    """What moved, a line each; nothing if nobody asked."""
    if moved is None:
        return []
    lines = [f"metadata {key}: another value than in the baseline" for key in moved.metadata[:_SHOWN]]
    worse = [each for each in moved.tensors if each.growth is None or each.growth > 1.02]
    lines += [_describe_tensor(each) for each in worse[:_SHOWN]]
    if len(worse) > _SHOWN:
        lines.append(f"... and {len(worse) - _SHOWN} more tensors with larger errors")
    if others := len(moved.tensors) - len(worse):
        lines.append(f"{others} other tensors changed without a larger error")
    lines += [f"role {each.role}: relative error {each.rmse[0]:.4g} -> {each.rmse[1]:.4g}" for each in moved.roles]
    for domain in moved.domains:
        line = f"domain {domain.domain}: KL divergence {_number(domain.ratio)} times the baseline's"
        line += f" [{_number(domain.low)}, {_number(domain.high)}]"
        lines.append(line + ("" if domain.same_tokens else "; its tokens are others than the baseline's"))
    if not moved.has_tensors:
        lines.append("tensors: not known; run `eval --weights` for both reports")
    return lines or ["nothing moved"]


def _describe_tensor(tensor: MovedTensor) -> str:
    where = tensor.role + ("" if tensor.layer is None else f", layer {tensor.layer}")
    line = f"tensor {tensor.name} ({where}): {tensor.change}"
    old, new = tensor.formats
    if old is not None and new is not None and old != new:
        line += f", {old} -> {new}"
    for name, (before, after) in (("relative error", tensor.rmse), ("largest error", tensor.largest)):
        if before is not None and after is not None:
            line += f", {name} {before:.4g} -> {after:.4g}"
    return line


def _note(decision: Decision) -> str:
    parts = [decision.note] if decision.note else []
    if decision.outcome == UNDECIDED:
        needed = decision.tokens_needed
        parts.append(
            "no amount of text will decide it: the limit lies within the floor, or the estimate has no error to go by"
            if needed is None
            else f"about {needed:,} scored tokens would decide it; there are {decision.tokens:,}"
        )
    return "; ".join(parts)


def _interval(decision: Decision) -> str:
    if not decision.tokens:
        return "exact"
    return f"[{_end(decision.low, '-inf')}, {_end(decision.high, 'inf')}]"


def _end(value: float | None, none: str) -> str:
    return none if value is None else _number(value)


def _bound(decision: Decision) -> str:
    return "" if decision.bound is None else f"{'>=' if decision.is_least else '<='} {decision.bound:g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _escaped(text: str) -> str:
    return for_markdown(text.replace("<=", "≤").replace(">=", "≥"))


def _identity(known: tuple[str, str]) -> dict[str, str]:
    return {"name": known[0], "sha256": known[1]}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

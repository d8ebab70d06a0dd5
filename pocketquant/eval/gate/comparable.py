"""Checks whether two reports measure the same thing, and finds what differs between their files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pocketquant.errors import EvalError, listing
from pocketquant.eval.report.reading import Evidence, as_object

_EXACT = 1e-6
"""Relative error of a tensor that counts as none."""

IGNORED_METADATA = ("general.", "pocketquant.", "quantize.", "split.")
"""Metadata that says where a file is from, not what it does."""


def check_comparable(report: Evidence, baseline: Evidence) -> None:
    """Raises EvalError, with all differences, for reports whose numbers measure different things."""
    wanted: list[tuple[str, Callable[[Mapping[str, Any]], Any]]] = [
        ("vocabulary", lambda where: where.get("vocabulary")),
        ("context", lambda where: where.get("context")),
        ("rounding like", lambda where: where.get("like")),
        ("kind of reference", _kind_of_reference),
        ("reference", _which_reference),
    ]
    faults = []
    for name, get in wanted:
        ours, theirs = get(report.provenance), get(baseline.provenance)
        if ours != theirs:
            faults.append(f"{name}: {ours!s:.200} in {report.path}, {theirs!s:.200} in {baseline.path}")
    if faults:
        raise EvalError(f"the two reports measure different things; measure one again\n{listing(faults)}")


def _kind_of_reference(where: Mapping[str, Any]) -> str:
    pack = as_object(where.get("reference_pack"))
    if pack.get("kind") != "top":
        return "every token"
    return f"the {pack.get('top')} most likely tokens"


def _which_reference(where: Mapping[str, Any]) -> str:
    """The full-precision file by content, whether it was run itself or a pack was made from it."""
    identity = as_object(as_object(where.get("reference_pack")).get("model") or where.get("reference"))
    return f"{identity.get('name')} ({str(identity.get('sha256'))[:12]})"


def changed_metadata(report: Evidence, baseline: Evidence) -> list[str]:
    """The metadata keys that only one of two files has, or that differ in value; keys of the origin are ignored."""
    ours, theirs = report.metadata, baseline.metadata
    if not ours or not theirs:
        return []
    keys = sorted(key for key in ours.keys() | theirs.keys() if not key.startswith(IGNORED_METADATA))
    return [key for key in keys if ours.get(key) != theirs.get(key)]


def error_ratio(ours: float, theirs: float) -> float:
    """The ratio of an error to the one before; infinite if there was none before."""
    if ours <= _EXACT and theirs <= _EXACT:
        return 1.0
    return ours / theirs if theirs > _EXACT else math.inf

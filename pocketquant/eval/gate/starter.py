"""A first file of limits, which a given report keeps with some room.

Only the user knows what a file may lose. These limits say what the measured file lost, so that a gate can run from the
first day and be tightened later.
"""

from __future__ import annotations

import math

from pocketquant.eval import intervals
from pocketquant.eval.gate.decide import METRICS
from pocketquant.eval.gate.limits import AT_LEAST, CONFIDENCE
from pocketquant.eval.report.reading import Evidence

_ROOM = 1.1  # beyond the interval's end
_KEYS = ("kld_mean", "kld_p99", "top1", "ppl_ratio")
_TAIL = (1 - CONFIDENCE) / 32  # more limits than a starter has, so that all of them together hold


def starter_limits(report: Evidence) -> str:
    """TOML that `read_limits` reads and the report keeps; EvalError where the report lacks a number."""
    degrees = max(int(report.number("clusters")) - 1, 1)
    lines = [
        f"# What {_quoted(report.model[0])} kept, with {100 * (_ROOM - 1):.0f} % of room. Tighten them.",
        f"confidence = {CONFIDENCE}",
        'undecided = "warn"          # or "fail"',
        "",
        "[absolute]                  # against full precision",
    ]
    for key in _KEYS:
        metric, value, se = METRICS[key]
        found, error = report.number("metrics", metric, value), report.number("metrics", metric, se)
        lines.append(f"{key} = {_bound(key, found, error, degrees)}")
    domains = []
    for text in report.need_sums():
        known = intervals.share(text.column("kld"), text.column("tokens"))
        domains.append(float(_bound("kld_mean", known.value, math.sqrt(known.variance), max(known.degrees, 1))))
    lines.append(f"domain_kld_mean = {max(domains):g}")
    errors = [tensor.relative_rmse for tensor in report.tensors or ()]
    has_errors = bool(errors) and all(error is not None and math.isfinite(error) for error in errors)
    if has_errors:
        lines.append(f"tensor_rmse = {_up(_ROOM * max(error or 0.0 for error in errors))}")
    lines += [
        "",
        "[baseline]                  # against the last accepted file; `gate --first` leaves it out until there is one",
        "kld_mean_ratio = 1.05",
        "top1_drop = 0.005",
        "domain_kld_mean_ratio = 1.2",
        *(["tensor_rmse_ratio = 1.25"] if has_errors else []),
        "allow_metadata = []         # keys that may have changed",
    ]
    return "\n".join(lines) + "\n"


def _bound(key: str, found: float, error: float, degrees: int) -> str:
    t = intervals.student_quantile(_TAIL, degrees)
    if key in AT_LEAST:
        return f"{max(1 - float(_up(_ROOM * (1 - found + t * error))), 0.0):g}"
    if key == "ppl_ratio":  # the room is of what it lost, not of the model
        return f"{1 + float(_up(_ROOM * max(found + t * error - 1, 1e-4))):g}"
    return _up(_ROOM * (found + t * error))


def _up(value: float) -> str:
    """Rounded up to two digits."""
    if value <= 0:
        return "0.0"
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / step) * step:.6g}"


def _quoted(name: str) -> str:
    """A file's name as part of a comment: of one line."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:200])

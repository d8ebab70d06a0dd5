"""The limits of a gate, as TOML.

    confidence = 0.999            # of all decisions together
    undecided = "warn"            # or "fail"

    [absolute]                    # against full precision
    kld_mean = 0.02
    top1 = 0.95

    [baseline]                    # against the last accepted file
    kld_mean_ratio = 1.05
    top1_drop = 0.005

Every key is in `ABSOLUTE` or `BASELINE` below; any other is refused with the list of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketquant.errors import EvalError, listing
from pocketquant.files.small import read_toml

MAX_BYTES = 1 << 16
_LARGEST = 1e300
CONFIDENCE = 0.999
_SUREST = 0.999999
WARN, FAIL = "warn", "fail"

ABSOLUTE = {
    "kld_mean": "KL divergence, mean, at most (nats)",
    "kld_median": "KL divergence, median, at most (nats)",
    "kld_p90": "KL divergence, 90th percentile, at most (nats)",
    "kld_p99": "KL divergence, 99th percentile, at most (nats)",
    "tv_mean": "total variation, mean, at most",
    "top1": "share of positions with the same most likely token, at least",
    "top5": "share of positions with the reference's among the first five, at least",
    "delta_p_rms": "change of the right token's probability, RMS, at most",
    "ppl_ratio": "perplexity over the reference's, at most",
    "bpb_difference": "bits per byte more than the reference, at most",
    "domain_kld_mean": "KL divergence of each domain, mean, at most (nats)",
    "domain_top1": "the same most likely token in each domain, at least",
    "tensor_rmse": "relative RMS error of each tensor, at most",
    "non_finite": "positions where the model's logits are no finite numbers, at most; 0 unless given",
}
"""Key of [absolute] -> what it limits."""

BASELINE = {
    "kld_mean_ratio": "KL divergence, mean, over the baseline's, at most",
    "kld_p99_ratio": "KL divergence, 99th percentile, over the baseline's, at most",
    "tv_mean_ratio": "total variation, mean, over the baseline's, at most",
    "top1_drop": "share of the same most likely token, baseline's minus this one's, at most",
    "top5_drop": "share among the first five, baseline's minus this one's, at most",
    "bpb_rise": "bits per byte more than the baseline, at most",
    "domain_kld_mean_ratio": "KL divergence of each domain over the baseline's, at most",
    "tensor_rmse_ratio": "relative RMS error of each tensor over the baseline's, at most",
    "tensor_max_error_ratio": "largest error of a weight of each tensor over the baseline's, at most",
}
"""Key of [baseline] -> what it limits."""

AT_LEAST = {"top1", "top5", "domain_top1"}
"""Keys where more is better."""

_TOP = ("confidence", "undecided", "absolute", "baseline")
_ALLOW = "allow_metadata"
_SMALLEST = {"kld_mean_ratio", "kld_p99_ratio", "tv_mean_ratio", "domain_kld_mean_ratio"} | {
    "tensor_rmse_ratio",
    "tensor_max_error_ratio",
}


@dataclass(frozen=True)
class Limits:
    """What a gate decides on.

    Attributes:
        absolute: key of `ABSOLUTE` -> limit.
        baseline: key of `BASELINE` -> limit.
        allow_metadata: metadata keys that may differ from the baseline's.
        confidence: probability that none of the sampled decisions of one run is a false failure, at least.
        undecided: `WARN` or `FAIL`, what a limit counts as that the text was too short to decide.
    """

    absolute: Mapping[str, float] = field(default_factory=dict)
    baseline: Mapping[str, float] = field(default_factory=dict)
    allow_metadata: tuple[str, ...] = ()
    confidence: float = CONFIDENCE
    undecided: str = WARN


def read_limits(path: Path) -> Limits:
    """Reads a file of limits.

    Raises:
        EvalError: it cannot be read, or something in it is not understood; all such things are named.
    """
    return parse_limits(read_toml(path, MAX_BYTES, EvalError), str(path))


def parse_limits(found: Mapping[str, Any], name: str) -> Limits:
    """Checks parsed TOML; `name` is for messages, errors are those of `read_limits`."""
    faults = [_unknown(key, "", _TOP) for key in found if key not in _TOP]
    confidence, undecided = found.get("confidence", CONFIDENCE), found.get("undecided", WARN)
    if not _is_number(confidence) or not 0.5 <= confidence <= _SUREST:
        faults.append(f"confidence = {confidence!r}: give a number from 0.5 to {_SUREST}; {CONFIDENCE} is usual")
    if undecided not in (WARN, FAIL):
        faults.append(f'undecided = {undecided!r}: "{WARN}" or "{FAIL}"')
    sections: dict[str, dict[str, float]] = {}
    for section, known in (("absolute", ABSOLUTE), ("baseline", BASELINE)):
        values = found.get(section, {})
        sections[section] = {}
        if not isinstance(values, Mapping):
            faults.append(f"{section} = {values!r}: a table of limits, [{section}]")
            continue
        for key, value in values.items():
            if section == "baseline" and key == _ALLOW:
                continue
            if key not in known:
                faults.append(_unknown(key, section, (*known, _ALLOW) if section == "baseline" else tuple(known)))
            elif not _is_number(value) or not _is_sensible(key, value):
                faults.append(f"[{section}] {key} = {value!r}: {known[key]}: no such number can be")
            else:
                sections[section][key] = float(value)
    allowed = found.get("baseline", {}).get(_ALLOW, []) if isinstance(found.get("baseline", {}), Mapping) else []
    if not isinstance(allowed, list) or not all(isinstance(key, str) for key in allowed):
        faults.append(f"[baseline] {_ALLOW} = {allowed!r}: a list of metadata keys")
        allowed = []
    if not faults and not sections["absolute"] and not sections["baseline"]:
        faults.append("no limit at all; give at least one in [absolute] or [baseline]")
    if faults:
        raise EvalError(f"{name}: not understood\n{listing(faults)}")
    return Limits(sections["absolute"], sections["baseline"], tuple(allowed), float(confidence), undecided)


def _unknown(key: str, section: str, known: tuple[str, ...]) -> str:
    return f"{f'[{section}] ' if section else ''}{key}: not known; there is: {', '.join(known)}"


def _is_number(value: Any) -> bool:
    """A number that f64 holds; an integer may be of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_sensible(key: str, value: float) -> bool:
    if key in AT_LEAST:
        return 0 <= value <= 1
    if key in _SMALLEST:  # below 1 the last accepted file itself would fail
        return value >= 1
    return value >= 0 or key in ("bpb_difference", "top1_drop", "top5_drop", "bpb_rise")

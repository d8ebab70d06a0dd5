"""Decides whether a report keeps its limits, each on a confidence interval.

A limit is certainly kept (pass), certainly broken (fail), or the text is too short to tell (undecided). In the last
case the limit lies inside the interval, and the decision says about how many tokens would decide it. Chance fails a
good file in at most one run out of 1 / (1 - confidence), because the estimates of a run share this probability
(Bonferroni). Limits on tensors, metadata and non-finite positions are exact and take no share of it.

If the baseline was measured on the same tokens, each window is compared with itself. Texts with different tokens are
compared as independent samples, which needs many times as much text for the same result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from pocketquant.errors import EvalError
from pocketquant.eval import intervals
from pocketquant.eval.gate.comparable import changed_metadata, check_comparable, error_ratio
from pocketquant.eval.gate.limits import AT_LEAST, FAIL, Limits
from pocketquant.eval.gate.verdict import FAILED, PASS, Decision, Estimate, Sampled, Verdict, from_error
from pocketquant.eval.intervals import Share
from pocketquant.eval.kernels import FLOOR
from pocketquant.eval.report.reading import MAX_CLUSTERS, Evidence, choose_file, parse_report, same_tokens
from pocketquant.files.small import read_json
from pocketquant.llama.kernels import differing

METRICS = {
    "kld_mean": ("kld", "mean", "se"),
    "kld_median": ("kld", "median", "median_se"),
    "kld_p90": ("kld", "p90", "p90_se"),
    "kld_p99": ("kld", "p99", "p99_se"),
    "tv_mean": ("tv", "mean", "se"),
    "top1": ("top1", "mean", "se"),
    "top5": ("top5", "mean", "se"),
    "delta_p_rms": ("delta_p", "rms", "rms_se"),
    "ppl_ratio": ("ppl", "ratio", "ratio_se"),
    "bpb_difference": ("bpb", "difference", "difference_se"),
}
"""Key of [absolute] -> where the report has its value and standard error."""

_BOUNDED = ("kld", "tv")
"""Measures that a pack of the most likely tokens shows only in part."""

_SHARES: dict[str, tuple[str, str]] = {
    "kld_mean_ratio": ("kld", "tokens"),
    "tv_mean_ratio": ("tv", "tokens"),
    "top1_drop": ("top1", "tokens"),
    "top5_drop": ("top5", "tokens"),
    "bpb_rise": ("bits", "bytes"),
}
"""Key of [baseline] -> the sums whose share it compares."""


def read_report(path: Path, file: str | None = None) -> Evidence:
    """Reads what `eval --json` printed, or one file of what `make` and `sweep` wrote.

    Args:
        path: the report.
        file: name or recipe of the file meant, where the report holds several.

    Raises:
        SourceError: it cannot be read or is no JSON.
        EvalError: it is something else, or holds several files or another one.
    """
    return parse_report(choose_file(read_json(path), str(path), file), str(path))


def decide(
    report: Evidence,
    limits: Limits,
    baseline: Evidence | None = None,
    *,
    strict: bool = False,
    first: bool = False,
) -> Verdict:
    """Decides every limit.

    Args:
        report: of the file to judge.
        limits: what it may lose.
        baseline: of the last accepted file; its metadata is then compared, too.
        strict: undecided limits fail, whatever `limits` says.
        first: there is no accepted file yet: limits in [baseline] are left out.

    Raises:
        EvalError: a limit needs a baseline or a number that is not there, or the two reports cannot be compared.
    """
    if limits.baseline and baseline is None and not first:
        raise EvalError(
            "there are limits in [baseline] and no baseline; give --baseline REPORT.json of the last accepted file, or "
            "--first while there is none"
        )
    if baseline is not None:
        check_comparable(report, baseline)
    pending = _absolute(report, limits) + (_against(report, baseline, limits) if baseline is not None else [])
    n_sampled = sum(isinstance(each, Sampled) for each in pending)
    tail = (1 - limits.confidence) / max(n_sampled, 1)
    return Verdict(
        decisions=tuple(each if isinstance(each, Decision) else each.decide(tail) for each in pending),
        confidence=limits.confidence,
        is_strict=strict or limits.undecided == FAIL,
        model=report.model,
        baseline=None if baseline is None else baseline.model,
        is_paired=None if baseline is None else _is_paired(report, baseline),
        left_out=len(limits.baseline) if baseline is None else 0,
    )


def _absolute(report: Evidence, limits: Limits) -> list[Decision | Sampled]:
    pending: list[Decision | Sampled] = []
    for key, bound in limits.absolute.items():
        if key in METRICS:
            metric, value, se = METRICS[key]
            found, error = report.number("metrics", metric, value), report.number("metrics", metric, se)
            clusters, tokens = report.count("clusters"), report.count("tokens")
            note = _reference_note(report, is_bounded=metric in _BOUNDED)
            estimate = Estimate(found, error, clusters - 1)
            pending.append(from_error(f"absolute.{key}", bound, estimate, tokens, note, is_least=key in AT_LEAST))
        elif key == "tensor_rmse":
            pending.append(_largest_error(report, bound))
        elif key in ("domain_kld_mean", "domain_top1"):
            column = "kld" if key == "domain_kld_mean" else "top1"
            for text in report.need_sums():
                known = intervals.share(text.column(column), text.column("tokens"))
                estimate = Estimate(known.value, math.sqrt(known.variance), known.degrees)
                tokens = int(text.column("tokens").sum())
                name = f"absolute.{key}[{text.domain}]"
                note = _reference_note(report, is_bounded=column == "kld")
                pending.append(from_error(name, bound, estimate, tokens, note, is_least=key in AT_LEAST))
    broken, allowed = report.number("non_finite_model"), limits.absolute.get("non_finite", 0.0)
    pending.append(_exact("absolute.non_finite", allowed, broken))
    return pending


def _reference_note(report: Evidence, *, is_bounded: bool) -> str:
    """What to know of the reference: a pack of top tokens, where what keeps a limit may not, or a quantized file.

    Args:
        report: of the judged file.
        is_bounded: whether a pack of top tokens shows the measure only in part.
    """
    pack, types = (report.provenance.get(key) for key in ("reference_pack", "reference_quantized"))
    notes = []
    if is_bounded and isinstance(pack, Mapping) and pack.get("is_lower_bound"):
        notes.append(f"a lower bound: the reference keeps the {pack.get('top')} most likely tokens")
    if isinstance(types, str):
        notes.append(f"the reference is itself quantized ({types:.80})")
    return "; ".join(notes)


def _against(report: Evidence, baseline: Evidence, limits: Limits) -> list[Decision | Sampled]:
    pending: list[Decision | Sampled] = []
    kernels = differing(report.versions, baseline.versions)
    for key, bound in limits.baseline.items():
        name = f"baseline.{key}"
        if key in _SHARES:
            pending.append(_compare_shares(name, key, bound, report, baseline, None))
        elif key == "domain_kld_mean_ratio":
            ours, theirs = ({text.domain for text in each.need_sums()} for each in (report, baseline))
            for domain in sorted(ours & theirs):
                pending.append(_compare_shares(f"{name}[{domain}]", "kld_mean_ratio", bound, report, baseline, domain))
            for domain in sorted(theirs - ours):
                pending.append(_exact(f"{name}[{domain}]", None, None, "the baseline has this domain, the report not"))
        elif key == "kld_p99_ratio":
            pending.append(_compare_p99(name, bound, report, baseline))
        else:
            pending.append(_worst_tensor(name, key, bound, report, baseline))
    if kernels:
        pending = [_widened(each, kernels) if isinstance(each, Sampled) else each for each in pending]
    changed = [key for key in changed_metadata(report, baseline) if key not in limits.allow_metadata]
    note = f"changed: {', '.join(changed)}; accept with allow_metadata in [baseline]" if changed else ""
    pending.append(_exact("baseline.metadata", 0, len(changed), note))
    return pending


def _widened(sampled: Sampled, kernels: list[str]) -> Sampled:
    """A comparison of two figures from different kernels: a difference that kernels can cause is not a regression."""
    key = sampled.limit.removeprefix("baseline.").split("[")[0]
    slack = FLOOR[key] * (sampled.found if key.endswith("_ratio") else 1.0)
    note = f"other kernels than the baseline's ({', '.join(kernels)}): wider by {slack:.2g}"
    return replace(sampled, slack=slack, note="; ".join(filter(None, [sampled.note, note])))


def compare_kld(report: Evidence, baseline: Evidence, domain: str | None, tail: float) -> tuple[float, float, float]:
    """The ratio of the mean divergences of one domain (None for all), and the ends of its interval."""
    ours, theirs, known, _ = _shares("kld_mean_ratio", report, baseline, domain)
    if theirs.value <= 0:
        return (1.0, 1.0, 1.0) if ours.value <= 0 else (math.inf, 1.0, math.inf)
    t, cov = intervals.student_quantile(tail, min(ours.degrees, theirs.degrees)), known or 0.0
    return ours.value / theirs.value, *intervals.ratio_interval(ours, theirs, cov, t)


def _shares(
    key: str, report: Evidence, baseline: Evidence, domain: str | None
) -> tuple[Share, Share, float | None, int]:
    """Both shares, their covariance (None if they have no tokens in common), and the smaller number of tokens."""
    ours, theirs = report.texts(domain), baseline.texts(domain)
    top, bottom = _SHARES[key]
    pair: list[Share] = []
    tokens = []
    for texts in (ours, theirs):
        numerators, denominators = (np.concatenate([text.column(name) for text in texts]) for name in (top, bottom))
        if denominators.sum() <= 0:
            raise EvalError(f"{report.path}: no {bottom} were counted, so {key} cannot be computed; measure it again")
        pair.append(intervals.share(numerators, denominators))
        tokens.append(int(sum(text.column("tokens").sum() for text in texts)))
    same = same_tokens(ours, theirs)
    cov = intervals.covariance(pair[0], pair[1], *same) if len(same[0]) else None
    return pair[0], pair[1], cov, min(tokens)


def _compare_shares(
    name: str, key: str, bound: float, report: Evidence, baseline: Evidence, domain: str | None
) -> Decision | Sampled:
    ours, theirs, known, tokens = _shares(key, report, baseline, domain)
    degrees, cov = min(ours.degrees, theirs.degrees), known or 0.0
    note = "" if known is not None else "other tokens than the baseline's: not paired"
    if key.endswith("_ratio"):
        return _ratio(name, bound, (ours, theirs, cov), tokens, note)
    sign = -1.0 if key.endswith("_drop") else 1.0
    variance = intervals.difference_variance(ours, theirs, cov)
    found = sign * (ours.value - theirs.value) + 0.0  # no -0
    return from_error(name, bound, Estimate(found, math.sqrt(variance), degrees), tokens, note)


def _compare_p99(name: str, bound: float, report: Evidence, baseline: Evidence) -> Decision | Sampled:
    """Compares p99 as if the two were independent, because quantiles are not sums: the result is less often decided."""
    pair = []
    for each in (report, baseline):
        value, error = each.number("metrics", "kld", "p99"), each.number("metrics", "kld", "p99_se")
        n = min(each.count("clusters"), MAX_CLUSTERS)
        spread = error * math.sqrt((n - 1) / n / 2) if n > 1 else math.inf
        pair.append(Share(value, np.array([spread, -spread] + [0.0] * max(n - 2, 0))))
    ours, theirs = pair
    tokens = min(each.count("tokens") for each in (report, baseline))
    return _ratio(name, bound, (ours, theirs, 0.0), tokens)


def _ratio(
    name: str, bound: float, pair: tuple[Share, Share, float], tokens: int, note: str = ""
) -> Decision | Sampled:
    """The report's figure over the baseline's; `pair` is both and the covariance of their means."""
    ours, theirs, cov = pair
    if theirs.value <= 0:
        return _no_ratio(name, bound, ours.value)
    return Sampled(
        limit=name,
        bound=bound,
        is_least=False,
        found=ours.value / theirs.value,
        tokens=tokens,
        degrees=min(ours.degrees, theirs.degrees),
        interval=lambda t: intervals.ratio_interval(ours, theirs, cov, t),
        factor=lambda t: intervals.ratio_factor(ours, theirs, cov, t, bound),
        note=note,
    )


def _exact(name: str, bound: float | None, found: float | None, note: str = "") -> Decision:
    is_kept = bound is not None and found is not None and found <= bound
    return Decision(name, PASS if is_kept else FAILED, bound, False, found, found, found, note=note)


def _no_ratio(name: str, bound: float, value: float) -> Decision:
    note = "the baseline lost nothing" + (", this file did; judge it by an absolute limit" if value > 0 else "")
    return Decision(name, PASS if value <= 0 else FAILED, bound, False, None, None, None, note=note)


def _largest_error(report: Evidence, bound: float) -> Decision:
    errors = {tensor.name: tensor.error("relative_rmse", report.path) for tensor in report.need_tensors()}
    over = sorted((name for name, error in errors.items() if error > bound), key=lambda name: -errors[name])
    return _exact("absolute.tensor_rmse", bound, max(errors.values(), default=0.0), _first(over))


def _worst_tensor(name: str, key: str, bound: float, report: Evidence, baseline: Evidence) -> Decision:
    field = "relative_rmse" if key == "tensor_rmse_ratio" else "max_abs_error"
    before = {tensor.name: tensor for tensor in baseline.need_tensors()}
    ratios = {}
    for tensor in report.need_tensors():
        if tensor.name in before:
            ratios[tensor.name] = error_ratio(
                tensor.error(field, report.path), before[tensor.name].error(field, baseline.path)
            )
    over = sorted((each for each, ratio in ratios.items() if ratio > bound), key=lambda each: -ratios[each])
    largest = max(ratios.values(), default=1.0)
    exact = [each for each in over if math.isinf(ratios[each])]
    note = _first(over) + (f"; lossless in the baseline: {_first(exact)}" if exact else "")
    return Decision(name, FAILED if over else PASS, bound, False, *(3 * (None if exact else largest,)), note=note)


def _first(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _is_paired(report: Evidence, baseline: Evidence) -> str:
    ours, theirs = report.sums, baseline.sums
    n_same = len({text.stream for text in ours if text.stream} & {text.stream for text in theirs})
    return "no" if not n_same else "yes" if n_same == len(ours) == len(theirs) else "in part"

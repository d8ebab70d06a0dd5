"""A report as Markdown: one table of the metrics, and one each by domain, by position and by confidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pocketquant.escaping import for_markdown
from pocketquant.eval.kernels import describe_kernels
from pocketquant.eval.kinship import quantized_reference
from pocketquant.eval.measures import Bucket, Metrics
from pocketquant.eval.report.schema import Domain, Report
from pocketquant.llama.kernels import differing

Row = tuple[str, float, float | None]

_ABSOLUTE = {f"{name}, {side}" for name in ("perplexity", "bits per byte") for side in ("model", "reference")}
"""Numbers of one side alone, which have no noise floor."""


def to_markdown(report: Report) -> str:
    """The page that `pocketquant eval` prints."""
    from_, noise = report.provenance, report.noise_floor
    head = [f"{from_.model.name} against {from_.reference.name}", "value", "standard error"]
    cells = [[name, _number(value), _error(se)] for name, value, se in metric_rows(report.metrics)]
    if noise is not None:
        head.append("noise floor")
        floor = {name: _number(value) for name, value, _ in metric_rows(noise.metrics) if name not in _ABSOLUTE}
        cells = [[*row, floor.get(row[0], "")] for row in cells]
    parts = [_table(head, cells)]
    corpus = for_markdown(from_.corpus.name)
    where = f"{report.tokens} tokens scored in {report.windows} windows of {from_.context}, {corpus}"
    how = "" if from_.like is None else f", rounded as {from_.like} does"
    parts.append(
        f"{where}{how}; standard errors from resampling {report.clusters} {report.cluster_unit}s, seed {from_.seed}."
    )
    if from_.reference_pack is not None:
        parts.append(_pack_note(from_.reference_pack))
        if other := differing(from_.versions, from_.reference_pack["versions"]):
            parts.append(for_markdown(describe_kernels(from_.model.name, "the pack", other)))
    if from_.reference_quantized is not None:
        name = from_.reference_pack["model"]["name"] if from_.reference_pack is not None else from_.reference.name
        parts.append(f"**{for_markdown(quantized_reference(name, from_.reference_quantized))}**")
    if noise is not None:
        parts.append(
            f"Noise floor: the model against itself, {noise.rows} rows at a time, on {noise.tokens} tokens in "
            f"{noise.windows} windows."
        )
    if report.non_finite:
        parts.append(
            f"**Not finite at {report.non_finite} positions** (model {report.non_finite_model}, "
            f"reference {report.non_finite_reference}): they are in none of the numbers above."
        )
    if len(report.by_domain) > 1:
        parts.append(_by_domain(report.by_domain))
    if report.by_position is not None:
        parts.append(_buckets("position in the window", report.by_position, _place))
    if report.by_confidence:
        parts.append(_buckets("reference's top probability", report.by_confidence, _range))
    return "\n\n".join(parts) + "\n"


def metric_rows(metrics: Metrics) -> list[Row]:
    """(name with unit, value, standard error) of each number, in the order of the table."""
    kld, tv, delta_p, ppl, bpb = metrics.kld, metrics.tv, metrics.delta_p, metrics.ppl, metrics.bpb
    rows: list[Row] = [
        ("KL divergence, mean (nats)", kld.mean, kld.se),
        ("KL divergence, median (nats)", kld.median, kld.median_se),
        ("KL divergence, 90th percentile (nats)", kld.p90, kld.p90_se),
        ("KL divergence, 99th percentile (nats)", kld.p99, kld.p99_se),
        ("KL divergence, 99.9th percentile (nats)", kld.p999, kld.p999_se),
        ("KL divergence, largest (nats)", kld.max, None),
        ("same top token (%)", *_percent(metrics.top1.mean, metrics.top1.se)),
        ("reference's top token in the model's top 5 (%)", *_percent(metrics.top5.mean, metrics.top5.se)),
        ("total variation, mean (%)", *_percent(tv.mean, tv.se)),
        ("accepted as a draft, 1 - total variation (%)", *_percent(tv.acceptance, tv.se)),
        ("right token's probability, mean change (%)", *_percent(delta_p.mean, delta_p.se)),
        ("right token's probability, RMS change (%)", *_percent(delta_p.rms, delta_p.rms_se)),
    ]
    for name in ("p1", "p5", "p10", "p25", "p50", "p75", "p90", "p95", "p99"):
        value, se = getattr(delta_p, name), getattr(delta_p, f"{name}_se")
        rows.append((f"right token's probability, {_ordinal(name)} percentile of the change (%)", *_percent(value, se)))
    rows += [
        ("perplexity, model", ppl.model, ppl.model_se),
        ("perplexity, reference", ppl.reference, ppl.reference_se),
        ("perplexity, ratio", ppl.ratio, ppl.ratio_se),
    ]
    if bpb is not None:
        rows += [
            ("bits per byte, model", bpb.model, bpb.model_se),
            ("bits per byte, reference", bpb.reference, bpb.reference_se),
            ("bits per byte, difference", bpb.difference, bpb.difference_se),
        ]
    return rows


def _pack_note(pack: Mapping[str, Any]) -> str:
    floor, name = pack["floor"], for_markdown(pack["model"]["name"])
    if pack["is_lower_bound"]:
        return (
            f"The reference is a pack of {name}'s {pack['top']} most likely tokens per position: KL divergence and "
            f"total variation are lower bounds, which showed {100 * floor['captured']:.0f} % of a small divergence "
            f"when the pack was made."
        )
    return f"The reference is a pack of {name}, {floor['kld_mean']:.1g} nats from that file itself."


def _by_domain(domains: Sequence[Domain]) -> str:
    head = [
        "domain",
        "tokens",
        "KL divergence",
        "99th percentile",
        "same top token (%)",
        "perplexity ratio",
        "not finite",
    ]
    rows = []
    for each in domains:
        if each.metrics is None:
            rows.append([each.domain, str(each.tokens), "", "", "", "", str(each.non_finite)])
            continue
        kld, top1, ppl = each.metrics.kld, each.metrics.top1, each.metrics.ppl
        rows.append(
            [
                each.domain,
                str(each.tokens),
                _with_error(kld.mean, kld.se),
                _with_error(kld.p99, kld.p99_se),
                _with_error(*_percent(top1.mean, top1.se)),
                _with_error(ppl.ratio, ppl.ratio_se),
                str(each.non_finite),
            ]
        )
    return _table(head, rows)


def _buckets(name: str, buckets: Iterable[Bucket], label: Callable[[Bucket], str]) -> str:
    head = [name, "tokens", "KL divergence", "same top token (%)", "perplexity ratio"]
    rows = [
        [
            label(bucket),
            str(bucket.tokens),
            _with_error(bucket.kld, bucket.kld_se),
            _with_error(*_percent(bucket.top1, bucket.top1_se)),
            _with_error(bucket.ppl_ratio, bucket.ppl_ratio_se),
        ]
        for bucket in buckets
    ]
    return _table(head, rows)


def _place(bucket: Bucket) -> str:
    return f"{bucket.low:.0f} to {bucket.high - 1:.0f}"


def _range(bucket: Bucket) -> str:
    return f"{bucket.low:g} to {bucket.high:g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(for_markdown, head)) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(for_markdown, row)) + " |" for row in rows)])


def _percent(value: float, se: float | None) -> tuple[float, float | None]:
    return 100 * value, None if se is None else 100 * se


def _ordinal(name: str) -> str:
    return {"p1": "1st", "p50": "50th"}.get(name, f"{name[1:]}th")


def _number(value: float) -> str:
    return f"{value:.6g}"


def _error(se: float | None) -> str:
    return "" if se is None else f"{se:.2g}"


def _with_error(value: float, se: float | None) -> str:
    return f"{value:.4g}" if se is None else f"{value:.4g} ± {se:.1g}"

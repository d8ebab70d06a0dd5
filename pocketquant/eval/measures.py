"""The statistics of scored positions, each with its standard error.

A mean over all positions hides where a model fails. So the same numbers are also taken by position in the window (a
recurrent state can drift where a cache of keys and values does not) and by the confidence of the reference.

A standard error is None where the text is too short for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.eval import bootstrap
from pocketquant.eval.metrics import Positions

KLD_QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
DELTA_P_QUANTILES = {f"p{percent}": percent / 100 for percent in (1, 5, 10, 25, 50, 75, 90, 95, 99)}
CONFIDENCE_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.99, 1.0)
FIRST_BUCKET = 16
"""Positions 0 to 15 are one bucket; from there on, each bucket is twice as long as the one before."""


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) per token, in nats."""

    mean: float
    se: float | None
    median: float
    median_se: float | None
    p90: float
    p90_se: float | None
    p99: float
    p99_se: float | None
    p999: float
    p999_se: float | None
    max: float


@dataclass(frozen=True)
class Agreement:
    """The share of positions where the model agrees with the reference's most likely token.

    `top1`: it is the model's most likely token too. `top5`: it is among the model's five most likely tokens.
    """

    mean: float
    se: float | None


@dataclass(frozen=True)
class Variation:
    """Total variation, half the sum of |p - q| over the vocabulary, mean over positions.

    `acceptance` is 1 - mean: the share of tokens that speculative decoding accepts when one of the two drafts for the
    other, both sampling at temperature 1 (Leviathan, Kalman, Matias 2023, corollary 3.6).
    """

    mean: float
    se: float | None
    acceptance: float


@dataclass(frozen=True)
class TokenProbability:
    """Model's minus reference's probability of the token that came: mean, root mean square, percentiles; 1 is 100 %."""

    mean: float
    se: float | None
    rms: float
    rms_se: float | None
    p1: float
    p1_se: float | None
    p5: float
    p5_se: float | None
    p10: float
    p10_se: float | None
    p25: float
    p25_se: float | None
    p50: float
    p50_se: float | None
    p75: float
    p75_se: float | None
    p90: float
    p90_se: float | None
    p95: float
    p95_se: float | None
    p99: float
    p99_se: float | None


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss of both, and model over reference."""

    model: float
    model_se: float | None
    reference: float
    reference_se: float | None
    ratio: float
    ratio_se: float | None


@dataclass(frozen=True)
class BitsPerByte:
    """Loss in bits over bytes of the scored tokens' text, of both, and model minus reference."""

    model: float
    model_se: float | None
    reference: float
    reference_se: float | None
    difference: float
    difference_se: float | None


@dataclass(frozen=True)
class Metrics:
    """Everything measured; `bpb` is None if the lengths of the tokens are not known."""

    kld: Divergence
    top1: Agreement
    top5: Agreement
    tv: Variation
    delta_p: TokenProbability
    ppl: Perplexity
    bpb: BitsPerByte | None


@dataclass(frozen=True)
class Bucket:
    """Positions whose place, or whose reference's top probability, lies in [low, high); of a probability, 1 belongs to
    the last bucket. The numbers are means over them."""

    low: float
    high: float
    tokens: int
    kld: float
    kld_se: float | None
    top1: float
    top1_se: float | None
    ppl_ratio: float
    ppl_ratio_se: float | None


def measure(finite: Positions, draws: bootstrap.Resampling) -> Metrics:
    """All statistics of `POSITION`[n] without broken ones."""
    same = finite["is_same_top"].astype(np.float64)
    near = (finite["n_above_top"] < 5).astype(np.float64)
    tv = float(finite["variation"].mean())
    return Metrics(
        kld=_divergence(finite["kld_nats"], draws),
        top1=Agreement(float(same.mean()), _se_of_mean(same, draws)),
        top5=Agreement(float(near.mean()), _se_of_mean(near, draws)),
        tv=Variation(tv, _se_of_mean(finite["variation"], draws), 1 - tv),
        delta_p=_token_probability(finite, draws),
        ppl=_perplexity(finite, draws),
        bpb=_bits_per_byte(finite, draws),
    )


def by_confidence(finite: Positions, draws: bootstrap.Resampling) -> tuple[Bucket, ...]:
    """`POSITION`[n] without broken ones, by the probability of the reference's most likely token."""
    edges, found = np.array(CONFIDENCE_EDGES), []
    place = np.searchsorted(edges[1:-1], finite["top_reference"], side="right")
    for i, (low, high) in enumerate(pairwise(CONFIDENCE_EDGES)):
        if (place == i).any():
            found.append(_bucket(low, high, finite, draws, place == i))
    return tuple(found)


def by_position(positions: Positions, *, seed: int) -> tuple[Bucket, ...]:
    """`POSITION`[n_window, n], scored from the first position on, by the place in the window."""
    found = []
    is_finite = positions["is_finite_model"] & positions["is_finite_reference"]
    for low, high in _position_edges(positions.shape[1]):
        window, place = np.nonzero(is_finite[:, low:high])
        if len(window):
            draws = bootstrap.resample(window, place, high - low, seed=seed)
            finite = positions[:, low:high][is_finite[:, low:high]]
            found.append(_bucket(low, high, finite, draws, np.ones(len(finite), np.bool_)))
    return tuple(found)


def _position_edges(n: int) -> Iterator[tuple[int, int]]:
    low, high = 0, FIRST_BUCKET
    while low < n:
        yield low, min(high, n)
        low, high = high, 2 * high


def _bucket(
    low: float, high: float, finite: Positions, draws: bootstrap.Resampling, chosen: npt.NDArray[np.bool_]
) -> Bucket:
    kld, same = finite["kld_nats"], finite["is_same_top"].astype(np.float64)
    change = finite["nll_model_nats"] - finite["nll_reference_nats"]
    kld_means, same_means, changes = (
        bootstrap.resampled_means(values, draws, chosen=chosen) for values in (kld, same, change)
    )
    with np.errstate(over="ignore"):
        return Bucket(
            low=low,
            high=high,
            tokens=int(chosen.sum()),
            kld=float(kld[chosen].mean()),
            kld_se=_se(kld_means, draws),
            top1=float(same[chosen].mean()),
            top1_se=_se(same_means, draws),
            ppl_ratio=float(np.exp(change[chosen].mean())),
            ppl_ratio_se=_se(np.exp(changes), draws),
        )


def _divergence(kld: bootstrap.F64Array, draws: bootstrap.Resampling) -> Divergence:
    quantiles = _quantiles(kld, KLD_QUANTILES, draws)
    return Divergence(mean=float(kld.mean()), se=_se_of_mean(kld, draws), max=float(kld.max()), **quantiles)


def _token_probability(finite: Positions, draws: bootstrap.Resampling) -> TokenProbability:
    change = np.exp(-finite["nll_model_nats"]) - np.exp(-finite["nll_reference_nats"])
    return TokenProbability(
        mean=float(change.mean()),
        se=_se_of_mean(change, draws),
        rms=float(np.sqrt((change**2).mean())),
        rms_se=_se(np.sqrt(bootstrap.resampled_means(change**2, draws)), draws),
        **_quantiles(change, DELTA_P_QUANTILES, draws),
    )


def _perplexity(finite: Positions, draws: bootstrap.Resampling) -> Perplexity:
    nll_model, nll_reference = finite["nll_model_nats"], finite["nll_reference_nats"]
    ppl, ppl_se = [], []
    with np.errstate(over="ignore"):  # a ruined model's perplexity may pass f64
        for nll in (nll_model, nll_reference, nll_model - nll_reference):
            ppl.append(float(np.exp(nll.mean())))
            ppl_se.append(_se(np.exp(bootstrap.resampled_means(nll, draws)), draws))
    return Perplexity(ppl[0], ppl_se[0], ppl[1], ppl_se[1], ppl[2], ppl_se[2])


def _bits_per_byte(finite: Positions, draws: bootstrap.Resampling) -> BitsPerByte | None:
    n_bytes = finite["n_bytes"].astype(np.float64)
    if not n_bytes.any():
        return None
    values, errors = [], []
    lengths = bootstrap.resampled_means(n_bytes, draws)
    nll_model, nll_reference = finite["nll_model_nats"], finite["nll_reference_nats"]
    for nll in (nll_model, nll_reference, nll_model - nll_reference):
        values.append(float(nll.sum() / n_bytes.sum() / np.log(2)))
        errors.append(_se(bootstrap.resampled_means(nll, draws) / lengths / np.log(2), draws))
    return BitsPerByte(values[0], errors[0], values[1], errors[1], values[2], errors[2])


def _quantiles(values: bootstrap.F64Array, fractions: dict[str, float], draws: bootstrap.Resampling) -> dict[str, Any]:
    """Each quantile under its name, its standard error under NAME_se."""
    found = np.quantile(values, list(fractions.values()))
    resampled = bootstrap.resampled_quantiles(values, tuple(fractions.values()), draws)
    named: dict[str, Any] = {name: float(value) for name, value in zip(fractions, found, strict=True)}
    return named | {f"{name}_se": _se(resampled[:, i], draws) for i, name in enumerate(fractions)}


def _se_of_mean(values: bootstrap.F64Array, draws: bootstrap.Resampling) -> float | None:
    return _se(bootstrap.resampled_means(values, draws), draws)


def _se(replicates: bootstrap.F64Array, draws: bootstrap.Resampling) -> float | None:
    return bootstrap.standard_error(replicates) if draws.n_cluster > 1 else None

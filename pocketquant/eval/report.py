"""A measurement as a value: numbers with where they come from, as JSON for machines and Markdown for people.

Equal inputs, seed and software give equal bytes: there is no time and no absolute path in a report.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from pocketquant.errors import EvalError
from pocketquant.eval import bootstrap
from pocketquant.eval.metrics import Positions
from pocketquant.files import sha256_of

SCHEMA = "pocketquant.report/1"


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) per token, in nats."""

    mean: float
    se: float | None
    median: float
    median_se: float | None
    p99: float
    p99_se: float | None
    max: float


@dataclass(frozen=True)
class Agreement:
    """Share of positions where model and reference hold the same token most likely."""

    mean: float
    se: float | None


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
class Metrics:
    """Everything measured. Standard errors are None where there is too little text for one."""

    kld: Divergence
    top1: Agreement
    ppl: Perplexity


@dataclass(frozen=True)
class FileIdentity:
    """A file by content: its name without folders, its size in bytes, its SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Provenance:
    """What the numbers were measured on, and with.

    Attributes:
        vocabulary: digest of the tokens that both files share.
        text_tokens: tokens of the whole text, scored or not.
        chunks: the limit on windows that was asked for, None for none.
        seed: of the bootstrap.
        versions: name -> version of the software.
    """

    model: FileIdentity
    reference: FileIdentity
    corpus: FileIdentity
    vocabulary: str
    text_tokens: int
    context: int
    chunks: int | None
    seed: int
    threads: int
    gpu_layers: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """One comparison of a model with a reference on one text.

    Attributes:
        tokens: scored positions, `non_finite` included.
        windows: windows scored.
        non_finite: positions where either gave a logit that is no finite number; no metric contains them.
        non_finite_model: those where the model did.
        non_finite_reference: those where the reference did.
        clusters: what the standard errors' resampling drew.
        cluster_unit: "window", or "block" of a window where windows are few.
    """

    metrics: Metrics
    tokens: int
    windows: int
    non_finite: int
    non_finite_model: int
    non_finite_reference: int
    clusters: int
    cluster_unit: str
    provenance: Provenance

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; a number that JSON cannot write is None."""
        return {"schema": SCHEMA, **_plain(asdict(self))}

    def to_markdown(self) -> str:
        """A table of the metrics and a line on where they come from."""
        kld, top1, ppl, from_ = self.metrics.kld, self.metrics.top1, self.metrics.ppl, self.provenance
        rows = [
            ("KL divergence, mean (nats)", kld.mean, kld.se),
            ("KL divergence, median (nats)", kld.median, kld.median_se),
            ("KL divergence, 99th percentile (nats)", kld.p99, kld.p99_se),
            ("KL divergence, largest (nats)", kld.max, None),
            ("same top token (%)", 100 * top1.mean, None if top1.se is None else 100 * top1.se),
            ("perplexity, model", ppl.model, ppl.model_se),
            ("perplexity, reference", ppl.reference, ppl.reference_se),
            ("perplexity, ratio", ppl.ratio, ppl.ratio_se),
        ]
        lines = [f"| {from_.model.name} against {from_.reference.name} | value | standard error |", "|---|---:|---:|"]
        lines += [f"| {name} | {value:.6g} | {'' if se is None else f'{se:.2g}'} |" for name, value, se in rows]
        text = "\n".join(lines) + (
            f"\n\n{self.tokens} tokens scored in {self.windows} windows of {from_.context}, {from_.corpus.name}; "
            f"errors from {self.clusters} {self.cluster_unit}s, seed {from_.seed}.\n"
        )
        if self.non_finite:
            text += (
                f"\n**Not finite at {self.non_finite} positions** (model {self.non_finite_model}, "
                f"reference {self.non_finite_reference}): they are in none of the numbers above.\n"
            )
        return text


def summarize(positions: Positions, provenance: Provenance) -> Report:
    """Turns scored positions into a report.

    Args:
        positions: `POSITION`[n_window, n], one row a window.
        provenance: where they come from; its seed drives the bootstrap.

    Raises:
        EvalError: no position is finite.
    """
    is_finite = positions["is_finite_model"] & positions["is_finite_reference"]
    if not is_finite.any():
        raise EvalError(
            f"{provenance.model.name} against {provenance.reference.name}: none of {positions.size} positions has "
            f"finite logits (broken: model at {_count_broken(positions, 'model')}, "
            f"reference at {_count_broken(positions, 'reference')}); convert the broken file again"
        )
    window, place = np.nonzero(is_finite)
    draws = bootstrap.resample(window, place, positions.shape[1], seed=provenance.seed)
    finite = positions[is_finite]
    return Report(
        metrics=_measure(finite, draws),
        tokens=positions.size,
        windows=len(positions),
        non_finite=int((~is_finite).sum()),
        non_finite_model=_count_broken(positions, "model"),
        non_finite_reference=_count_broken(positions, "reference"),
        clusters=draws.n_cluster,
        cluster_unit=draws.unit,
        provenance=provenance,
    )


def _measure(finite: Positions, draws: bootstrap.Resampling) -> Metrics:
    kld, same = finite["kld_nats"], finite["is_same_top"].astype(np.float64)
    nll_model, nll_reference = finite["nll_model_nats"], finite["nll_reference_nats"]
    median, p99 = np.quantile(kld, [0.5, 0.99])
    quantiles = bootstrap.resampled_quantiles(kld, (0.5, 0.99), draws)
    se = bootstrap.standard_error if draws.n_cluster > 1 else lambda _: None
    ppl, ppl_se = [], []
    with np.errstate(over="ignore"):  # a ruined model's perplexity may pass f64
        for nll in (nll_model, nll_reference, nll_model - nll_reference):
            ppl.append(float(np.exp(nll.mean())))
            ppl_se.append(se(np.exp(bootstrap.resampled_means(nll, draws))))
    return Metrics(
        kld=Divergence(
            mean=float(kld.mean()),
            se=se(bootstrap.resampled_means(kld, draws)),
            median=float(median),
            median_se=se(quantiles[:, 0]),
            p99=float(p99),
            p99_se=se(quantiles[:, 1]),
            max=float(kld.max()),
        ),
        top1=Agreement(float(same.mean()), se(bootstrap.resampled_means(same, draws))),
        ppl=Perplexity(ppl[0], ppl_se[0], ppl[1], ppl_se[1], ppl[2], ppl_se[2]),
    )


def identify(path: str | Path) -> FileIdentity:
    """Name, size and SHA-256 of a file, read in small pieces.

    Raises:
        EvalError: the file cannot be read.
    """
    path = Path(path)
    try:
        return FileIdentity(path.name, path.stat().st_size, sha256_of(path))
    except OSError as error:
        raise EvalError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def list_versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on, besides the runtime's own."""
    return {"python": platform.python_version()} | {name: _version(name) for name in ("pocketquant", "numpy", "numba")}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from a source tree
        return "not installed"


def _count_broken(positions: Positions, which: str) -> int:
    return int((~positions[f"is_finite_{which}"]).sum())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

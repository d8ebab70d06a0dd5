"""A measurement as a value: numbers with where they come from, as JSON for machines and Markdown for people.

Equal inputs, seed and software give equal bytes: there is no time and no absolute path in a report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pocketquant.errors import EvalError
from pocketquant.eval import bootstrap
from pocketquant.eval.measures import Bucket, Metrics, by_confidence, by_position, measure
from pocketquant.eval.metrics import Positions
from pocketquant.eval.report.evidence import TensorState, TextSums, sum_clusters
from pocketquant.gguf_file.identity import FileIdentity

SCHEMA = "pocketquant.report/1"


@dataclass(frozen=True)
class Provenance:
    """What the numbers were measured on, and with.

    Attributes:
        corpus: the text; of several, their names, the sum of their sizes and a digest of their digests.
        vocabulary: digest of the tokens that both files share.
        text_tokens: tokens of all texts, scored or not.
        chunks: the limit on windows of each text that was asked for, None for none.
        seed: of the bootstrap.
        versions: name -> version of the software.
        like: the program whose rounding was imitated, None for none.
        chat_templates: digests of "model" and "reference", where conversations were scored.
        reference_pack: where the reference was a pack: what it holds, its floor, and the file behind it.
        model_metadata: each metadata key of the model with a short digest of its value.
        reference_quantized: the types that the reference's own matrices are rounded to; None for full precision.
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
    like: str | None = None
    chat_templates: Mapping[str, str | None] | None = None
    reference_pack: Mapping[str, Any] | None = None
    model_metadata: Mapping[str, str] | None = None
    reference_quantized: str | None = None


@dataclass(frozen=True)
class ScoredText:
    """One text of a run: its domain, its file, how many windows of the positions are its, a digest of their tokens."""

    domain: str
    file: FileIdentity
    text_tokens: int
    windows: int
    stream: str = ""


@dataclass(frozen=True)
class Domain:
    """The numbers of one text; `metrics` is None where none of its positions is finite."""

    domain: str
    file: FileIdentity
    text_tokens: int
    tokens: int
    windows: int
    non_finite: int
    metrics: Metrics | None


@dataclass(frozen=True)
class NoiseFloor:
    """The model against itself at another batch size: what of the numbers is the order of sums, not the weights.

    Attributes:
        rows: rows of logits at a time in the second run, which decides how the window is cut into batches.
    """

    rows: int
    tokens: int
    windows: int
    metrics: Metrics


@dataclass(frozen=True)
class Report:
    """One comparison of a model with a reference on one or more texts.

    Attributes:
        tokens: scored positions, `non_finite` included.
        windows: windows scored.
        non_finite: positions where either gave a logit that is no finite number; no metric contains them.
        non_finite_model: those where the model did.
        non_finite_reference: those where the reference did.
        clusters: what the standard errors' resampling drew.
        cluster_unit: "window", or "block" of a window where windows are few.
        by_domain: the same for each text.
        by_confidence: by the probability of the reference's most likely token.
        by_position: by the place in the window, from 0 on, where that was asked for; those before the middle of the
            window are in no other number.
        noise_floor: where that was asked for.
        tensors: what each tensor of the model is and lost, where that was asked for.
        sums: of each text, by cluster, for comparisons with other reports.
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
    by_domain: tuple[Domain, ...] = ()
    by_confidence: tuple[Bucket, ...] = ()
    by_position: tuple[Bucket, ...] | None = None
    noise_floor: NoiseFloor | None = None
    tensors: tuple[TensorState, ...] | None = None
    sums: tuple[TextSums, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; a number that JSON cannot write is None."""
        return {"schema": SCHEMA, **_plain(asdict(self))}


def summarize(
    positions: Positions,
    provenance: Provenance,
    *,
    texts: Sequence[ScoredText] = (),
    curve: Positions | None = None,
    noise_floor: NoiseFloor | None = None,
) -> Report:
    """Turns scored positions into a report.

    Args:
        positions: `POSITION`[n_window, n], one row a window.
        provenance: where they come from; its seed drives the bootstrap.
        texts: whose windows they are, one text after the other; none for no numbers by domain.
        curve: `POSITION`[n_window, context - 1], for the numbers by position.
        noise_floor: from `measure_noise`.

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
    draws = _resample(positions, provenance.seed)
    finite = positions[is_finite]
    metrics = measure(finite, draws)
    cuts = np.cumsum([0, *(text.windows for text in texts)])
    return Report(
        metrics=metrics,
        tokens=positions.size,
        windows=len(positions),
        non_finite=int((~is_finite).sum()),
        non_finite_model=_count_broken(positions, "model"),
        non_finite_reference=_count_broken(positions, "reference"),
        clusters=draws.n_cluster,
        cluster_unit=draws.unit,
        provenance=provenance,
        by_domain=tuple(
            _domain(
                text, positions[start : start + text.windows], provenance.seed, metrics if len(texts) == 1 else None
            )
            for text, start in zip(texts, cuts.tolist(), strict=False)
        ),
        by_confidence=by_confidence(finite, draws),
        by_position=None if curve is None else by_position(curve, seed=provenance.seed),
        noise_floor=noise_floor,
        sums=tuple(
            sum_clusters(positions[start : start + text.windows], text.domain, text.stream)
            for text, start in zip(texts, cuts.tolist(), strict=False)
        ),
    )


def measure_noise(positions: Positions, rows: int, seed: int) -> NoiseFloor | None:
    """`POSITION`[n_window, n] of a model against itself, summed up; None if none is finite."""
    finite = positions[positions["is_finite_model"] & positions["is_finite_reference"]]
    if not len(finite):
        return None
    return NoiseFloor(rows, positions.size, len(positions), measure(finite, _resample(positions, seed)))


def _domain(text: ScoredText, positions: Positions, seed: int, known: Metrics | None) -> Domain:
    is_finite = positions["is_finite_model"] & positions["is_finite_reference"]
    if known is None and is_finite.any():
        known = measure(positions[is_finite], _resample(positions, seed))
    broken = int((~is_finite).sum())
    return Domain(text.domain, text.file, text.text_tokens, positions.size, len(positions), broken, known)


def _resample(positions: Positions, seed: int) -> bootstrap.Resampling:
    window, place = np.nonzero(positions["is_finite_model"] & positions["is_finite_reference"])
    return bootstrap.resample(window, place, positions.shape[1], seed=seed)


def _count_broken(positions: Positions, which: str) -> int:
    return int((~positions[f"is_finite_{which}"]).sum())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

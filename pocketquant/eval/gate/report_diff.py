"""The differences between two reports in metadata, tensors, roles and domains. They explain a verdict."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pocketquant.eval.gate.comparable import changed_metadata, error_ratio
from pocketquant.eval.gate.decide import compare_kld
from pocketquant.eval.report.reading import Evidence, TensorRecord, same_tokens

_NOTABLE = 1.02
"""Errors that grew by less are not named, nor are those that shrank by less."""
_TAIL = 0.0005


@dataclass(frozen=True)
class MovedTensor:
    """A tensor whose bytes differ from the baseline's.

    Attributes:
        change: "changed", "added" or "removed".
        formats: the baseline's and this one's.
        rmse: relative RMS errors of both, None where a report has none.
        largest: largest errors of a weight of both, likewise.
        growth: how many times larger the RMS or the largest error became, whichever grew more; None if not known,
            infinite where there was no error.
    """

    name: str
    role: str
    layer: int | None
    change: str
    formats: tuple[str | None, str | None]
    rmse: tuple[float | None, float | None]
    largest: tuple[float | None, float | None]
    growth: float | None


@dataclass(frozen=True)
class MovedRole:
    """All tensors of a role together: RMS errors, relative and weighted by their numbers of weights."""

    role: str
    rmse: tuple[float, float]


@dataclass(frozen=True)
class MovedDomain:
    """A domain whose divergence changed by more than chance, or whose tokens are others.

    Attributes:
        ratio: this file's mean KL divergence over the baseline's, with the ends of its interval.
        same_tokens: False where the text, the tokenizer or the chat template cut it into other tokens.
    """

    domain: str
    ratio: float
    low: float
    high: float
    same_tokens: bool


@dataclass(frozen=True)
class Moved:
    """Everything that moved, most first.

    Attributes:
        has_tensors: both reports say what each tensor is.
    """

    metadata: tuple[str, ...]
    tensors: tuple[MovedTensor, ...]
    roles: tuple[MovedRole, ...]
    domains: tuple[MovedDomain, ...]
    has_tensors: bool


def find_moved(report: Evidence, baseline: Evidence) -> Moved:
    """Compares two reports.

    Raises:
        EvalError: they hold no sums by window.
    """
    has_tensors = report.tensors is not None and baseline.tensors is not None
    ours, theirs = report.tensors or (), baseline.tensors or ()
    return Moved(
        metadata=tuple(changed_metadata(report, baseline)),
        tensors=_tensors(ours, theirs) if has_tensors else (),
        roles=_roles(ours, theirs) if has_tensors else (),
        domains=_domains(report, baseline),
        has_tensors=has_tensors,
    )


def _tensors(ours: Sequence[TensorRecord], theirs: Sequence[TensorRecord]) -> tuple[MovedTensor, ...]:
    before, now = ({tensor.name: tensor for tensor in each} for each in (theirs, ours))
    found = []
    for name in dict.fromkeys([*now, *before]):
        old, new = before.get(name), now.get(name)
        if old is not None and new is not None and (old.sha256, old.format) == (new.sha256, new.format):
            continue
        known = new or old
        assert known is not None
        found.append(
            MovedTensor(
                name=name,
                role=known.role,
                layer=known.layer,
                change="added" if old is None else "removed" if new is None else "changed",
                formats=(old.format if old else None, new.format if new else None),
                rmse=(old.relative_rmse if old else None, new.relative_rmse if new else None),
                largest=(old.max_abs_error if old else None, new.max_abs_error if new else None),
                growth=_growth(old, new),
            )
        )
    return tuple(sorted(found, key=lambda each: -(math.inf if each.growth is None else each.growth)))


def _growth(old: TensorRecord | None, new: TensorRecord | None) -> float | None:
    if old is None or new is None:
        return None
    ratios = [
        error_ratio(after, before)
        for after, before in ((new.relative_rmse, old.relative_rmse), (new.max_abs_error, old.max_abs_error))
        if after is not None and before is not None
    ]
    return max(ratios, default=None)


def _roles(ours: Sequence[TensorRecord], theirs: Sequence[TensorRecord]) -> tuple[MovedRole, ...]:
    now, before = _by_role(ours), _by_role(theirs)
    found = [
        MovedRole(role, (before[role], now[role]))
        for role in now
        if role in before and not 1 / _NOTABLE <= error_ratio(now[role], before[role]) <= _NOTABLE
    ]
    return tuple(sorted(found, key=lambda each: -error_ratio(each.rmse[1], each.rmse[0])))


def _by_role(tensors: Sequence[TensorRecord]) -> dict[str, float]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for tensor in tensors:
        if tensor.relative_rmse is not None:
            sums[tensor.role][0] += tensor.weights * tensor.relative_rmse**2
            sums[tensor.role][1] += tensor.weights
    return {role: math.sqrt(total / weights) for role, (total, weights) in sums.items() if weights}


def _domains(report: Evidence, baseline: Evidence) -> tuple[MovedDomain, ...]:
    theirs = {text.domain for text in baseline.need_sums()}
    shared = [text.domain for text in report.need_sums() if text.domain in theirs]
    found = []
    for domain in dict.fromkeys(shared):
        is_same = len(same_tokens(report.texts(domain), baseline.texts(domain))[0]) > 0
        ratio, low, high = compare_kld(report, baseline, domain, _TAIL / len(shared))
        if not is_same or low > 1 or high < 1:
            found.append(MovedDomain(domain, ratio, low, high, is_same))
    return tuple(sorted(found, key=lambda each: -each.ratio))

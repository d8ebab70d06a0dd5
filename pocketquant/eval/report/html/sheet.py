"""Report JSON -> what a page shows: numbers that are numbers, names that are text, nothing else.

Reports may come from anywhere, so every field is checked as it is taken, and none is trusted to be short, finite or
there. Reports on one page share text, windows and reference: otherwise their numbers would not belong side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from pocketquant.errors import EvalError, listing
from pocketquant.eval.report.html.taking import MAX_ROWS, items, listed, mapping, number, whole, words
from pocketquant.eval.report.html.task_results import TaskDrift, is_drift, read_drift
from pocketquant.eval.report.kinds import RELEASE, REPORT, TASKS
from pocketquant.eval.report.reading import RELEASES
from pocketquant.eval.report.schema import SCHEMA as EVALUATION
from pocketquant.files.json_kinds import refuse_other_kinds
from pocketquant.files.small import read_json
from pocketquant.formats import FORMATS

MAX_VARIANTS = 64
MAX_TENSORS = 1 << 15


@dataclass(frozen=True)
class Figure:
    """A number with its standard error; None where it is not known."""

    mean: float | None
    se: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval."""
        if self.mean is None or self.se is None:
            return None
        return self.mean - 1.96 * self.se, self.mean + 1.96 * self.se


@dataclass(frozen=True)
class Slice:
    """Some of the positions: a domain, or a range of places or of confidence."""

    label: str
    low: float | None
    high: float | None
    tokens: int
    kld: Figure
    top1: Figure


@dataclass(frozen=True)
class Cell:
    """One tensor; `error` is relative to its own size, 0 where it was kept exactly."""

    name: str
    role: str
    layer: int | None
    format: str
    error: float | None


@dataclass(frozen=True)
class Identity:
    """A file by content."""

    name: str
    size: int | None
    sha256: str


@dataclass(frozen=True)
class Origin:
    """What a variant was measured with: enough to do it again.

    Attributes:
        reference_versions: what made the pack that was the reference; empty where it was no pack.
        top: tokens of each position that the reference pack keeps, which makes divergences lower bounds; 0 for all.
        given: the file that was given as the reference: the pack, where `reference` is what the pack was made from.
        like: the program whose rounding was imitated; "" for none.
        quantized: the types that the reference itself is rounded to; "" for full precision.
        captured: the share of a small divergence that such a pack shows.
    """

    model: Identity
    reference: Identity
    texts: tuple[tuple[str, Identity], ...]
    context: int
    chunks: int | None
    seed: int
    has_positions: bool
    has_floor: bool
    has_tensors: bool
    versions: Mapping[str, str]
    reference_versions: Mapping[str, str]
    given: Identity
    like: str = ""
    quantized: str = ""
    top: int = 0
    captured: float | None = None


@dataclass(frozen=True)
class MeasuredFile:
    """One measured file.

    Attributes:
        bits: per weight; None where the report does not say.
        floor: mean divergence of the file from itself at another batch size, where that was measured.
        on_front: no other file is smaller and loses less; two measurements of one file do not beat each other.
        is_kept: whether a sweep left the file on disk; None where that is no question.
    """

    label: str
    file: str
    file_bytes: int
    bits: float | None
    kld: Figure
    p99: Figure
    top1: Figure
    ratio: Figure
    tokens: int
    windows: int
    non_finite: int
    floor: float | None
    domains: tuple[Slice, ...]
    positions: tuple[Slice, ...]
    confidence: tuple[Slice, ...]
    tensors: tuple[Cell, ...]
    origin: Origin
    on_front: bool = True
    is_kept: bool | None = None


@dataclass(frozen=True)
class Sheet:
    """Everything one page shows.

    Attributes:
        command: how the files were made, as words of a command line; empty where only measurements are known.
        given: the source that they were made from, as it was named; "" likewise.
        reference_type: recipe of the full-precision file that was made to measure against; "" likewise.
        rounding: a sentence on the importance matrix; empty for none.
    """

    title: str
    n_weights: int | None
    reference: str
    variants: tuple[MeasuredFile, ...]
    tasks: tuple[TaskDrift, ...]
    notes: tuple[str, ...]
    command: tuple[str, ...]
    given: str
    reference_type: str
    rounding: str
    sidecars: tuple[tuple[str, int], ...]


def read_sheet(paths: Sequence[Path]) -> Sheet:
    """Reads what `eval --json`, `make`, `sweep` and `tasks --json` wrote.

    Raises:
        SourceError: a file cannot be read or is no JSON.
        EvalError: as `to_sheet`.
    """
    return to_sheet([(path.name, read_json(path)) for path in paths])


def to_sheet(documents: Sequence[tuple[str, Any]]) -> Sheet:
    """Checks and joins reports, each with the name it goes by in messages.

    Raises:
        EvalError: none is there, one is no report, lacks what a page needs, or was measured otherwise than another.
    """
    variants: list[MeasuredFile] = []
    tasks: list[TaskDrift] = []
    releases: list[Mapping[str, Any]] = []
    for name, document in documents:
        schema = document.get("schema") if isinstance(document, Mapping) else None
        kind = (
            RELEASE if schema in RELEASES else REPORT if schema == EVALUATION else TASKS if is_drift(document) else None
        )
        if kind is None:
            raise EvalError(
                f"{name}: no report (schema {schema!r:.60}); give what `eval --json`, `make`, `sweep` or `tasks` wrote"
            )
        refuse_other_kinds(document, kind, name, EvalError)
        if kind is RELEASE:
            releases.append(document)
            entries = listed(document.get("variants"), MAX_VARIANTS, name, "variants")
            variants += [_variant(entry.get("evaluation"), entry, name) for entry in entries]
        elif kind is REPORT:
            variants.append(_variant(document, {}, name))
        else:
            tasks.append(read_drift(document, name))
    if not variants:
        raise EvalError("a page needs at least one measured file; give a report of `eval --json`, `make` or `sweep`")
    if len(variants) > MAX_VARIANTS:
        raise EvalError(f"{len(variants)} measured files are more than the {MAX_VARIANTS} that one page shows")
    _check_alike(variants)
    return _join(variants, tasks, releases)


def _join(variants: list[MeasuredFile], tasks: list[TaskDrift], releases: list[Mapping[str, Any]]) -> Sheet:
    first: Mapping[str, Any] = releases[0] if releases else {}
    source, importance = mapping(first.get("source")), first.get("importance")
    given = Path(words(source.get("given")) or "").stem
    names = [words(source.get("name")), given, _common([Path(each.origin.model.name).stem for each in variants])]
    rounding = ""
    if isinstance(importance, Mapping):
        texts = ", ".join(words(each) for each in items(importance.get("datasets")))
        rounding = f"Rounding is weighted by {words(importance.get('file'))}, made from {texts or 'a text'}."
    notes = [words(note) for each in releases for note in items(mapping(each.get("source")).get("notes"))]
    sidecars = [mapping(item) for each in releases for item in items(each.get("sidecars"))]
    return Sheet(
        title=next(name for name in [*names, "model"] if name),
        n_weights=whole(source.get("n_weights")),
        reference=words(first.get("reference")) or variants[0].origin.reference.name,
        variants=_marked(_named(variants)),
        tasks=tuple(tasks),
        notes=tuple(dict.fromkeys(notes)),
        command=tuple(words(word) for word in items(first.get("command"))),
        given=words(source.get("given")),
        reference_type=words(first.get("reference")),
        rounding=rounding,
        sidecars=tuple((words(item.get("file")), whole(item.get("file_bytes")) or 0) for item in sidecars),
    )


def _variant(evaluation: Any, entry: Mapping[str, Any], where: str) -> MeasuredFile:
    found = mapping(evaluation)
    metrics, from_ = mapping(found.get("metrics")), mapping(found.get("provenance"))
    model = _identity(from_.get("model"))
    if not metrics or not model.name or model.size is None:
        raise EvalError(f"{where}: a measurement without its metrics or its file's name and size; measure again")
    kld, ppl = mapping(metrics.get("kld")), mapping(metrics.get("ppl"))
    noise = mapping(mapping(mapping(found.get("noise_floor")).get("metrics")).get("kld"))
    tensors = listed(entry.get("weights") or found.get("tensors"), MAX_TENSORS, where, "tensors")
    bits = number(entry.get("bits_per_weight")) or _bits_per_weight(tensors)
    domains = listed(found.get("by_domain"), MAX_ROWS, where, "domains")
    kept = entry.get("is_kept")
    return MeasuredFile(
        label=words(entry.get("recipe")) or Path(model.name).stem,
        file=words(entry.get("file")) or model.name,
        file_bytes=whole(entry.get("file_bytes")) or model.size,
        bits=bits,
        kld=_value(kld),
        p99=Figure(number(kld.get("p99")), number(kld.get("p99_se"))),
        top1=_value(metrics.get("top1")),
        ratio=Figure(number(ppl.get("ratio")), number(ppl.get("ratio_se"))),
        tokens=whole(found.get("tokens")) or 0,
        windows=whole(found.get("windows")) or 0,
        non_finite=whole(found.get("non_finite")) or 0,
        floor=number(noise.get("mean")),
        domains=tuple(_domain(each) for each in domains),
        positions=_buckets(found.get("by_position"), where, places=True),
        confidence=_buckets(found.get("by_confidence"), where, places=False),
        tensors=tuple(_cell(tensor) for tensor in tensors),
        origin=_origin(found, from_, model, domains),
        is_kept=kept if isinstance(kept, bool) else None,
    )


def _origin(
    found: Mapping[str, Any], from_: Mapping[str, Any], model: Identity, domains: Sequence[Mapping[str, Any]]
) -> Origin:
    pack = mapping(from_.get("reference_pack"))
    texts = [(words(each.get("domain")), _identity(each.get("file"))) for each in domains]
    return Origin(
        model=model,
        reference=_identity(pack.get("model") or from_.get("reference")),
        texts=tuple(texts) or (("", _identity(from_.get("corpus"))),),
        context=whole(from_.get("context")) or 0,
        chunks=whole(from_.get("chunks")),
        seed=whole(from_.get("seed")) or 0,
        has_positions=found.get("by_position") is not None,
        has_floor=found.get("noise_floor") is not None,
        has_tensors=found.get("tensors") is not None,
        versions=_versions(from_.get("versions")),
        reference_versions=_versions(pack.get("versions")),
        given=_identity(from_.get("reference")),
        like=words(from_.get("like")),
        quantized=words(from_.get("reference_quantized")),
        top=(whole(pack.get("top")) or 0) if pack.get("is_lower_bound") else 0,
        captured=number(mapping(pack.get("floor")).get("captured")),
    )


def _versions(given: Any) -> dict[str, str]:
    found = mapping(given)
    return {words(key): words(found[key]) for key in list(found)[:20]}


def _bits_per_weight(tensors: Sequence[Mapping[str, Any]]) -> float | None:
    """Of the tensors alone, as `Plan.bits_per_weight`: header and tokenizer are in the file's size. None if unknown."""
    known = [(whole(each.get("weights")) or 0, FORMATS.get(words(each.get("format")))) for each in tensors]
    n_weights = sum(count for count, _ in known)
    if not n_weights or any(kind is None for _, kind in known):
        return None
    return sum(count * kind.bits_per_weight for count, kind in known if kind is not None) / n_weights


def _identity(given: Any) -> Identity:
    found = mapping(given)
    return Identity(words(found.get("name")), whole(found.get("size")), words(found.get("sha256")))


def _domain(found: Mapping[str, Any]) -> Slice:
    metrics = mapping(found.get("metrics"))
    kld, top1 = _value(metrics.get("kld")), _value(metrics.get("top1"))
    return Slice(words(found.get("domain")), None, None, whole(found.get("tokens")) or 0, kld, top1)


def _buckets(given: Any, where: str, *, places: bool) -> tuple[Slice, ...]:
    slices = []
    for found in listed(given, MAX_ROWS, where, "rows"):
        low, high = number(found.get("low")), number(found.get("high"))
        if low is None or high is None:
            continue
        label = f"{low:.0f} to {high - 1:.0f}" if places else f"{100 * low:g} to {100 * high:g} %"
        kld, top1 = (Figure(number(found.get(key)), number(found.get(f"{key}_se"))) for key in ("kld", "top1"))
        slices.append(Slice(label, low, high, whole(found.get("tokens")) or 0, kld, top1))
    return tuple(slices)


def _cell(found: Mapping[str, Any]) -> Cell:
    error = number(found.get("relative_rmse"))
    if error is None and "snr_db" in found and found["snr_db"] is None:
        error = 0.0
    role, name = words(found.get("role")), words(found.get("name"))
    return Cell(name, role or name, whole(found.get("layer")), words(found.get("format")), error)


def _check_alike(variants: Sequence[MeasuredFile]) -> None:
    first, offenders = variants[0], []
    for other in variants[1:]:
        ours, theirs = first.origin, other.origin
        pairs = {
            "text": ([text.sha256 for _, text in ours.texts], [text.sha256 for _, text in theirs.texts]),
            "context": (ours.context, theirs.context),
            "windows": (first.windows, other.windows),
            "reference": (ours.reference.sha256, theirs.reference.sha256),
            "number of tokens kept of the reference": (ours.top, theirs.top),
        }
        different = [what for what, (a, b) in pairs.items() if a != b]
        if different:
            offenders.append(f"{other.file}: another {', another '.join(different)} than {first.file}")
    if offenders:
        raise EvalError(
            f"these measurements do not belong side by side:\n{listing(offenders)}\nMeasure every file against one "
            "reference on the same texts, context and chunks."
        )


def _common(names: Sequence[str]) -> str:
    """The words that all names begin with, ended by a hyphen or a point; of one name, the name."""
    if len(names) == 1:
        return names[0]
    letters = zip(*names, strict=False)
    shared = "".join(each[0] for each in takewhile(lambda each: len(set(each)) == 1, letters))
    return shared[: max(shared.rfind("-"), shared.rfind("."), 0)]


def _named(variants: Sequence[MeasuredFile]) -> list[MeasuredFile]:
    """Short labels that tell the files apart: without the words that all of them begin with."""
    labels = [variant.label for variant in variants]
    if len(labels) > 1 and (shared := _common(labels)):
        labels = [label[len(shared) + 1 :] or label for label in labels]
    known: dict[str, int] = {}
    named = []
    for variant, label in zip(variants, labels, strict=True):
        known[label] = known.get(label, 0) + 1
        named.append(replace(variant, label=label if known[label] == 1 else f"{label} ({known[label]})"))
    return named


def _marked(variants: Sequence[MeasuredFile]) -> tuple[MeasuredFile, ...]:
    """By size, each with whether it is on the front."""
    ordered = sorted(variants, key=lambda each: (each.file_bytes, each.kld.mean or 0.0, each.label))
    return tuple(replace(each, on_front=_is_on_front(each, ordered)) for each in ordered)


def _is_on_front(variant: MeasuredFile, ordered: Sequence[MeasuredFile]) -> bool:
    """Whether no other file beats it; another measurement of the same file is none."""
    digest = variant.origin.model.sha256
    others = [each for each in ordered if each is variant or not digest or each.origin.model.sha256 != digest]
    front = find_front([(each.file_bytes, each.kld.mean) for each in others])
    return next(i for i, each in enumerate(others) if each is variant) in front


def find_front(points: Sequence[tuple[float, float | None]]) -> set[int]:
    """Which of (size, loss) no other point beats: none is as small or smaller and loses less, or as much and is
    smaller; of equal points the first."""
    known = [(size, loss, i) for i, (size, loss) in enumerate(points) if loss is not None]
    front, least = set(), math.inf
    for _, loss, i in sorted(known):
        if loss < least:
            front.add(i)
            least = loss
    return front


def _value(found: Any) -> Figure:
    return Figure(number(mapping(found).get("mean")), number(mapping(found).get("se")))

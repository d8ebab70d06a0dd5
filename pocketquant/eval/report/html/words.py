"""The sentences and table cells of a page, in words that are the same in HTML and in Markdown."""

from __future__ import annotations

from pocketquant.eval.kernels import describe_kernels
from pocketquant.eval.kinship import quantized_reference
from pocketquant.eval.report.html.published import Published
from pocketquant.eval.report.html.sheet import Figure, MeasuredFile, Sheet
from pocketquant.llama.kernels import differing


def describe_lead(sheet: Sheet) -> str:
    """What was measured, in a sentence."""
    first, count = sheet.variants[0], len(sheet.variants)
    files = "One file" if count == 1 else f"{count} files"
    weights = f" of {sheet.n_weights:,} weights" if sheet.n_weights else ""
    texts = len(first.origin.texts)
    text = "one text" if texts == 1 else f"{texts} texts"
    compared = "compared" if count == 1 else "each compared"
    where = f"{first.tokens:,} tokens of {text}"
    return f"{files}{weights}, {compared} with full precision ({sheet.reference}) on {where}."


def warnings(sheet: Sheet) -> list[str]:
    """What a reader has to know before the numbers."""
    top, captured = sheet.variants[0].origin.top, sheet.variants[0].origin.captured
    share = "" if captured is None else f", about {100 * captured:.0f} % of a small one"
    bound = (
        f"KL divergences are lower bounds: the reference is a pack of the {top} most likely tokens of each position, "
        f"which shows only part of a divergence{share}."
    )
    origin = sheet.variants[0].origin
    lesser = [quantized_reference(origin.reference.name, origin.quantized)] if origin.quantized else []
    found = (
        [bound] * bool(top)
        + lesser
        + [
            f"{variant.file} gave numbers that are not finite at {variant.non_finite:,} of {variant.tokens:,} "
            "positions; they are in none of the figures."
            for variant in sheet.variants
            if variant.non_finite
        ]
    )
    first = sheet.variants[0]
    for variant in sheet.variants:
        origin = variant.origin
        if other := differing(origin.versions, first.origin.versions):
            found.append(describe_kernels(variant.file, first.file, other))
        if origin.reference_versions and (other := differing(origin.versions, origin.reference_versions)):
            found.append(describe_kernels(variant.file, "its reference pack", other))
    return found


def describe_table(sheet: Sheet) -> str:
    """What the columns are."""
    parts = ["± is the standard error."]
    if any(variant.floor is not None for variant in sheet.variants):
        parts.append(
            "Noise floor: divergence of the file from itself at another batch size; smaller differences mean nothing."
        )
    if not all(variant.on_front for variant in sheet.variants):
        parts.append("Beaten: another file is no larger and loses less.")
    if sheet.rounding:
        parts.append(sheet.rounding)
    if sheet.sidecars:
        beside = ", ".join(f"{name} ({size_words(nbytes)})" for name, nbytes in sheet.sidecars)
        parts.append(f"Beside them: {beside}.")
    return " ".join(parts)


def describe_points(sheet: Sheet, published: Published | None) -> str:
    """What the chart shows besides the files."""
    parts = ["Further down loses less, further left is smaller; bars are 95 % intervals."]
    if len(sheet.variants) > 1:
        parts.append("The solid line joins the files that no other one beats.")
    if published is not None:
        sizes = ", ".join(model.name for model in published.models)
        parts.append(
            f"Grey circles are published figures of {sizes}, whole models in one type, from {published.source}. "
            "They were measured on another text and runtime: they give the scale, not a ranking."
        )
    return " ".join(parts)


def number_cells(variant: MeasuredFile) -> list[tuple[str, str]]:
    """(number, standard error) of mean divergence, 99th percentile, same top token and perplexity ratio."""
    top1 = variant.top1
    percent = Figure(None if top1.mean is None else 100 * top1.mean, None if top1.se is None else 100 * top1.se)
    least = "≥ " if variant.origin.top else ""
    return [
        _cell(variant.kld, ".3g", least=least),
        _cell(variant.p99, ".3g", least=least),
        _cell(percent, ".2f", " %"),
        _cell(variant.ratio, ".4f"),
    ]


def size_words(nbytes: float) -> str:
    """Bytes in powers of ten: 2.95 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def _cell(value: Figure, spec: str, unit: str = "", *, least: str = "") -> tuple[str, str]:
    if value.mean is None:
        return "not finite", ""
    return f"{least}{value.mean:{spec}}{unit}", "" if value.se is None else f"{value.se:.1g}"

"""How to run it again: commands, files by digest, versions. Names are quoted for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pocketquant.eval.report.html.sheet import Identity, MeasuredFile, Origin, Sheet
from pocketquant.texts.embedded import name_in_package


def list_steps(sheet: Sheet) -> list[tuple[str, str]]:
    """(what it does, command), in order; each runs where the files lie.

    A release deletes the full precision that it was measured against, so that is made anew before a file is measured
    by itself.
    """
    if not sheet.command:
        commands = [_evaluate(variant, variant.origin.given.name) for variant in sheet.variants]
        reports = [f"{variant.label}.json" for variant in sheet.variants]
        commands.append(shlex.join(["pocketquant", "report", *reports, "--out", "report.html"]))
        return [("Measure the files, then join the reports:", "\n".join(commands))]
    again = [*sheet.command, "--out", "again"]  # the folder is left out of what a report keeps
    steps = [("Make and measure all of it; equal versions give equal bytes:", shlex.join(again))]
    first = sheet.variants[0]
    if sheet.command[1:2] != ("demo",) and sheet.given:
        reference = first.origin.reference.name
        if not reference.endswith(".gguf"):
            return steps
        full = ["pocketquant", "convert", sheet.given, "--type", sheet.reference_type, "--out", reference]
        steps.append(("Measure one file by itself:", f"{shlex.join(full)}\n{_evaluate(first, reference)}"))
    return steps


def list_files(sheet: Sheet) -> list[tuple[str, str, str, str]]:
    """(what, name, bytes, digest) of everything that was read or judged."""
    first = sheet.variants[0].origin
    rows = [_row("file", variant.origin.model) for variant in sheet.variants]
    rows.append(_row("reference", first.reference))
    rows += [_row("text", text) for _, text in first.texts]
    return list(dict.fromkeys(rows))


def made_with(sheet: Sheet) -> str:
    """Versions and settings that the numbers depend on."""
    origin = sheet.variants[0].origin
    versions = [", ".join(f"{name} {version}" for name, version in origin.versions.items())]
    limit = "" if origin.chunks is None else f", at most {origin.chunks} of each text"
    others = {tuple(variant.origin.versions.items()) for variant in sheet.variants}
    mixed = "" if len(others) == 1 else " (of the first file; others were measured with other versions)"
    return (
        f"Measured with {versions[0]}{mixed}; windows of {origin.context} tokens{limit}; bootstrap seed {origin.seed}."
    )


def _evaluate(variant: MeasuredFile, reference: str) -> str:
    origin = variant.origin
    words = ["pocketquant", "eval", origin.model.name, "--reference", reference]
    for domain, text in origin.texts:
        name = name_in_package(text.name, text.sha256)
        words += ["--text", f"{domain}={name}" if domain else name]
    words += ["--context", str(origin.context), *_options(origin), "--json"]
    return f"{shlex.join(words)} > {shlex.quote(f'{variant.label}.json')}"


def _options(origin: Origin) -> Sequence[str]:
    options: list[str] = []
    if origin.chunks is not None:
        options += ["--chunks", str(origin.chunks)]
    if origin.seed:
        options += ["--seed", str(origin.seed)]
    if origin.has_positions:
        options.append("--positions")
    if origin.has_floor:
        options.append("--noise-floor")
    if origin.like:
        options += ["--like", origin.like]
    if origin.has_tensors:
        options.append("--weights")
    return options


def _row(what: str, file: Identity) -> tuple[str, str, str, str]:
    return what, file.name, "" if file.size is None else f"{file.size:,}", file.sha256

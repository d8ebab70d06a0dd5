"""How to run it again: commands, files by digest, versions. Names are quoted for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pocketquant.eval.html.sheet import Identity, Origin, Sheet, Variant


def list_steps(sheet: Sheet) -> list[tuple[str, str]]:
    """(what it does, command), in order."""
    steps = []
    if sheet.command:
        steps.append(("Make and measure all of it; equal versions give equal bytes:", shlex.join(sheet.command)))
    shown = sheet.variants[:1] if sheet.command else sheet.variants
    words = "Measure one file by itself:" if sheet.command else "Measure the files, then join the reports:"
    commands = [_evaluate(variant, f"{variant.label}.json") for variant in shown]
    if not sheet.command:
        commands.append(
            shlex.join(["pocketquant", "report", *(f"{v.label}.json" for v in shown), "--out", "report.html"])
        )
    return [*steps, (words, "\n".join(commands))]


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


def _evaluate(variant: Variant, out: str) -> str:
    origin = variant.origin
    words = ["pocketquant", "eval", origin.model.name, "--reference", origin.reference.name]
    for domain, text in origin.texts:
        words += ["--text", f"{domain}={text.name}" if domain else text.name]
    words += ["--context", str(origin.context), *_options(origin), "--json"]
    return f"{shlex.join(words)} > {shlex.quote(out)}"


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
    if origin.has_tensors:
        options.append("--weights")
    return options


def _row(what: str, file: Identity) -> tuple[str, str, str, str]:
    return what, file.name, "" if file.size is None else f"{file.size:,}", file.sha256

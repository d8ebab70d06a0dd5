"""A report as Markdown, for a model card; `page` makes the HTML page of the same sheet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pocketquant.escaping import for_markdown
from pocketquant.eval.report.html.reproduce import list_files, list_steps, made_with
from pocketquant.eval.report.html.sheet import Figure, Sheet, Slice
from pocketquant.eval.report.html.task_results import HEAD
from pocketquant.eval.report.html.words import describe_lead, describe_table, number_cells, size_words, warnings

_WORST = 5


def to_card(sheet: Sheet, *, brief: bool = False) -> str:
    """The card: tables of the files, by domain, of the tensors that lost most, and how to run it again.

    Args:
        brief: the table of the files and what belongs to it, alone.
    """
    has_bits = all(variant.bits is not None for variant in sheet.variants)
    head = ["file", "size", *(["bits per weight"] if has_bits else []), "KL divergence", "99th percentile"]
    rows = []
    for variant in sheet.variants:
        bits = [f"{variant.bits:.2f}"] if has_bits and variant.bits is not None else []
        numbers = [number + (f" ± {error}" if error else "") for number, error in number_cells(variant)]
        rows.append([variant.file, size_words(variant.file_bytes), *bits, *numbers])
    parts = [f"# {for_markdown(sheet.title)}, quantized", for_markdown(describe_lead(sheet))]
    parts += [f"**{for_markdown(warning)}**" for warning in warnings(sheet)]
    parts.append(_table([*head, "same top token", "perplexity ratio"], rows))
    parts.append(for_markdown(f"KL divergence in nats per token. {describe_table(sheet)}"))
    if brief:
        return "\n\n".join(parts) + "\n"
    domains = [variant.domains for variant in sheet.variants]
    if max(map(len, domains)) > 1:
        names = [each.label for each in max(domains, key=len)]
        rows = [[variant.file, *_by_name(variant.domains, names)] for variant in sheet.variants]
        parts += ["## KL divergence by kind of text", _table(["file", *names], rows)]
    if any(len(variant.positions) > 1 for variant in sheet.variants):
        names = [each.label for each in max((variant.positions for variant in sheet.variants), key=len)]
        rows = [[variant.file, *_by_name(variant.positions, names)] for variant in sheet.variants]
        parts += ["## KL divergence by place in the window", _table(["file", *names], rows)]
    worst = [
        [variant.file, cell.name, cell.role, cell.format, f"{100 * (cell.error or 0):.2f}"]
        for variant in sheet.variants
        for cell in sorted(variant.tensors, key=lambda cell: -(cell.error or 0.0))[:_WORST]
        if cell.error
    ]
    if worst:
        parts += ["## Tensors that lost most", _table(["file", "tensor", "role", "type", "relative error (%)"], worst)]
    for drift in sheet.tasks:
        parts += ["## Benchmarks, item by item", for_markdown(drift.note), _table(HEAD, drift.rows)]
    parts.append("## How to run it again")
    for words, command in list_steps(sheet):
        parts += [words, _fenced(command)]
    parts.append(_table(["what", "file", "bytes", "SHA-256"], list_files(sheet)))
    parts.append(for_markdown(made_with(sheet)))
    parts += [f"Note: {for_markdown(note)}" for note in sheet.notes]
    return "\n\n".join(parts) + "\n"


def _by_name(slices: Sequence[Slice], names: Sequence[str]) -> list[str]:
    known = {each.label: each.kld for each in slices}
    return [_number(known.get(name, Figure(None))) for name in names]


def _number(value: Figure) -> str:
    if value.mean is None:
        return ""
    return f"{value.mean:.3g}" + ("" if value.se is None else f" ± {value.se:.1g}")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [[for_markdown(cell) for cell in head], *([for_markdown(cell) for cell in row] for row in rows)]
    rule = "|---|" + "---:|" * (len(head) - 1)
    written = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([written[0], rule, *written[1:]])


def _fenced(command: str) -> str:
    """A block of code that no run of backquotes in it can end."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in command).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{command}\n{fence}"

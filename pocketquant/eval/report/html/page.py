"""The HTML page: one file that loads nothing, in the colours that the reader's system has, without a script.

Equal reports give equal bytes. Whatever comes from a report is escaped where it is put in; the page also forbids the
browser to load or run anything, should that ever fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import jinja2

from pocketquant.eval.report.html import charts, heat
from pocketquant.eval.report.html.published import read_published
from pocketquant.eval.report.html.reproduce import list_files, list_steps, made_with
from pocketquant.eval.report.html.sheet import MeasuredFile, Sheet, Slice
from pocketquant.eval.report.html.task_results import HEAD
from pocketquant.eval.report.html.words import (
    describe_lead,
    describe_points,
    describe_table,
    number_cells,
    size_words,
    warnings,
)

WIDE, HALF, NARROW = 990, 470, 350
"""Widths that drawings are made for: a desk's, one of two side by side, a telephone's."""

_HERE = Path(__file__).parent


def to_html(sheet: Sheet) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    published = read_published()
    has_bits = all(variant.bits is not None for variant in sheet.variants)
    context: dict[str, Any] = {
        "sheet": sheet,
        "both": _both,
        "lead": describe_lead(sheet),
        "warnings": warnings(sheet),
        "has_bits": has_bits,
        "has_floor": any(variant.floor is not None for variant in sheet.variants),
        "rows": [_row(i, variant, len(sheet.variants)) for i, variant in enumerate(sheet.variants)],
        "table_note": describe_table(sheet),
        "size_charts": _at_widths(lambda width: charts.size_chart(sheet.variants, published, width)),
        "size_note": describe_points(sheet, published if has_bits else None),
        "legend": _legend(sheet.variants),
        "dot_charts": _domains(sheet.variants),
        "curve_charts": _curves(sheet.variants, lambda each: each.positions, "position in the window", by_place=True),
        "confidence_charts": _curves(
            sheet.variants, lambda each: each.confidence, "probability of the reference's top token", by_place=False
        ),
        **_maps(sheet.variants),
        "drifts": sheet.tasks,
        "drift_head": HEAD,
        "steps": [{"words": words, "command": command} for words, command in list_steps(sheet)],
        "files": list_files(sheet),
        "made_with": made_with(sheet),
    }
    return environment.get_template("page.html.jinja").render(context)


def _at_widths(draw: Callable[[float], str], wide: float = WIDE) -> tuple[str, str]:
    return draw(wide), draw(NARROW)


def _both(drawings: tuple[str, str]) -> str:
    """A drawing for wide and one for narrow screens, of which the style shows one."""
    return f'<div class="wide">{drawings[0]}</div><div class="narrow">{drawings[1]}</div>'


def _row(index: int, variant: MeasuredFile, count: int) -> dict[str, Any]:
    notes = [] if variant.on_front or count < 2 else ["beaten"]
    notes += ["kept"] if variant.is_kept else []
    return {
        "mark": charts.legend_mark(index, hollow=not variant.on_front),
        "label": variant.label,
        "note": ", ".join(notes),
        "on_front": variant.on_front,
        "size": size_words(variant.file_bytes),
        "bits": "" if variant.bits is None else f"{variant.bits:.2f}",
        "numbers": number_cells(variant),
        "floor": "" if variant.floor is None else f"{variant.floor:.1g}",
    }


def _legend(variants: Sequence[MeasuredFile]) -> str:
    """The signs of the series; nothing to explain where there is one."""
    items = [f"<li>{charts.legend_mark(i)}{escape(each.label)}</li>" for i, each in enumerate(variants)]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _domains(variants: Sequence[MeasuredFile]) -> tuple[str, str] | None:
    """None where there is one text only: the first table has its numbers."""
    if max(len(variant.domains) for variant in variants) < 2:
        return None
    series = [(variant.label, variant.domains) for variant in variants]
    return _at_widths(lambda width: charts.dot_chart(series, width))


def _curves(
    variants: Sequence[MeasuredFile],
    slices_of: Callable[[MeasuredFile], Sequence[Slice]],
    words: str,
    *,
    by_place: bool,
) -> tuple[str, str] | None:
    series = [(variant.label, slices_of(variant)) for variant in variants]
    if max(len(slices) for _, slices in series) < 2:
        return None
    return _at_widths(lambda width: charts.curve_chart(series, words, width, by_place=by_place))


def _maps(variants: Sequence[MeasuredFile]) -> dict[str, Any]:
    """A map for each file that lost something in some tensor, all in one scale."""
    scale = heat.find_scale([variant.tensors for variant in variants])
    shown = [(i, each) for i, each in enumerate(variants) if any(cell.error for cell in each.tensors)]
    if scale is None:
        return {"maps": [], "shades": ""}
    wide = HALF if len(shown) > 1 else WIDE
    return {
        "shades": heat.scale_bar(scale),
        "maps": [
            {
                "mark": charts.legend_mark(i, hollow=not each.on_front),
                "label": each.label,
                "charts": _at_widths(partial(heat.heat_map, each.tensors, scale), wide),
                "exact": ", ".join(heat.exact_roles(each.tensors)),
            }
            for i, each in shown
        ],
    }

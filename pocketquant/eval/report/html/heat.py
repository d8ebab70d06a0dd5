"""Each tensor's error as a map: roles from top to bottom, layers from left to right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pocketquant.eval.report.html import svg
from pocketquant.eval.report.html.sheet import Cell
from pocketquant.model import Role

STEPS = 9
"""Shades of the map."""

_ORDER = {role.value: place for place, role in enumerate(Role)}
_WORDS_WIDTH = 40.0


@dataclass(frozen=True)
class Scale:
    """Errors from `low` to `high`, in `STEPS` shades of equal ratio."""

    low: float
    high: float

    def step(self, error: float) -> int:
        share = math.log(max(error, self.low) / self.low) / math.log(self.high / self.low)
        return min(int(share * STEPS), STEPS - 1)


def find_scale(maps: Sequence[Sequence[Cell]]) -> Scale | None:
    """One scale for all maps of a page, so that they can be compared; None if nothing was lost."""
    errors = [cell.error for cells in maps for cell in cells if cell.error]
    if not errors:
        return None
    low, high = min(errors), max(errors)
    return Scale(low, high) if high > 1.2 * low else Scale(low / 1.5, high * 1.5)


def heat_map(cells: Sequence[Cell], scale: Scale, width: float) -> str:
    """The map; of several tensors of a role in a layer the worst, and no roles that lost nothing anywhere."""
    lossy = {cell.role for cell in cells if cell.error}
    roles = sorted(lossy, key=lambda role: (_ORDER.get(role, len(_ORDER)), role))
    layers = sorted({cell.layer for cell in cells if cell.layer is not None and cell.role in lossy})
    has_rest = any(cell.layer is None and cell.role in lossy for cell in cells)
    columns: list[int | None] = [*layers, *([None] if has_rest else [])]
    worst: dict[tuple[str, int | None], Cell] = {}
    for cell in cells:
        key = cell.role, cell.layer
        if cell.role in lossy and (key not in worst or (cell.error or 0.0) > (worst[key].error or 0.0)):
            worst[key] = cell
    left = max(svg.width_of(role) for role in roles) + 10
    step, pitch = (width - left - 2) / max(len(columns), 1), 20.0
    step = min(step, 72.0)
    gap = 1.0 if step < 9 else 2.0
    parts = []
    for row, role in enumerate(roles):
        top = pitch * row
        parts.append(svg.text(left - 8, top + 14, role, class_="row-name", text_anchor="end"))
        for column, layer in enumerate(columns):
            found = worst.get((role, layer))
            if found is not None:
                parts.append(_square(found, scale, left + step * column, top, step - gap, pitch - 2))
    bottom = pitch * len(roles)
    every = max(1, math.ceil(26 / step))
    for column, layer in enumerate(columns):
        if layer is None or column % every == 0:
            words = "rest" if layer is None else str(layer)
            is_crowded = layer is not None and has_rest and (len(columns) - 1 - column) * step < 36
            if not is_crowded:
                is_last = layer is None and step < 30  # wider than its column
                at = left + step * (column + (1 if is_last else 0.5)) - gap / 2
                anchor = "end" if is_last else "middle"
                parts.append(svg.text(at, bottom + 15, words, class_="tick", text_anchor=anchor))
    parts.append(svg.text(left - 8, bottom + 15, "layer", class_="tick", text_anchor="end"))
    label = f"relative error of {len(cells)} tensors, {len(roles)} roles by {len(layers)} layers"
    return svg.drawing(width, bottom + 22, label, parts, "chart heat")


def scale_bar(scale: Scale, width: float = 320.0) -> str:
    """What the shades mean."""
    step = width / STEPS
    parts = []
    for i in range(STEPS):
        parts.append(svg.element("rect", x=10 + step * i, y=2, width=step - 1, height=12, class_=f"h{i}"))
    for i in (0, STEPS // 3, 2 * STEPS // 3, STEPS):
        error = scale.low * (scale.high / scale.low) ** (i / STEPS)
        anchor = {0: "start", STEPS: "end"}.get(i, "middle")
        at = 10 + step * i
        parts.append(svg.text(at, 29, f"{100 * error:.2g} %", class_="tick", text_anchor=anchor))
    return svg.drawing(width + 20, 34, "shades of the maps", parts, "bar-of-shades")


def exact_roles(cells: Sequence[Cell]) -> list[str]:
    """Roles that lost nothing, in the order of the model."""
    lossy = {cell.role for cell in cells if cell.error}
    known = {cell.role for cell in cells if cell.error is not None} - lossy
    return sorted(known, key=lambda role: (_ORDER.get(role, len(_ORDER)), role))


def _square(cell: Cell, scale: Scale, x: float, y: float, width: float, height: float) -> str:
    where = "" if cell.layer is None else f", layer {cell.layer}"
    if cell.error is None:
        words, kind, step = f"{cell.name}: not known", "exact", 0
    elif cell.error == 0:
        words, kind, step = f"{cell.name} ({cell.format}{where}): exact", "exact", 0
    else:
        step = scale.step(cell.error)
        words, kind = f"{cell.name} ({cell.format}{where}): {100 * cell.error:.3g} % of its size", f"h{step}"
    parts = [
        svg.element(
            "rect",
            svg.title(words),
            x=x,
            y=y,
            width=max(width, 0.5),
            height=height,
            rx=1.5 if width > 8 else 0,
            class_=kind,
        )
    ]
    if width >= _WORDS_WIDTH and svg.width_of(cell.format, 10) < width - 2:
        tone = "on-dark" if step >= STEPS // 2 and kind != "exact" else "on-light"
        parts.append(svg.text(x + width / 2, y + 13, cell.format, class_=f"type {tone}", text_anchor="middle"))
    return "".join(parts)

"""SVG by hand: elements with everything escaped, and axes.

Coordinates are CSS pixels of the drawing at its own width. Colours are classes, so that one drawing serves a light and
a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

FONT_PIXELS = 12
CHARACTER_PIXELS = 6.7
"""Mean width of a character of the page's sans-serif at `FONT_PIXELS`; a bit much, so that nothing overlaps."""

N_COLORS = 8
_SHAPES = 4


def element(name: str, *content: str, **attributes: object) -> str:
    """An element; `content` is finished SVG, attribute values are escaped. A trailing _ and any _ inside become -."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{given}>{''.join(content)}</{name}>"


def text(x: float, y: float, words: str, **attributes: object) -> str:
    """A line of text, baseline at y."""
    return element("text", escape(words), x=x, y=y, **attributes)


def title(words: str) -> str:
    """What a browser shows while the pointer rests on the parent."""
    return element("title", escape(words))


def drawing(width: float, height: float, label: str, parts: Sequence[str], class_: str) -> str:
    """The whole picture; `label` says to a screen reader what it shows."""
    return element(
        "svg",
        *parts,
        class_=class_,
        viewBox=f"0 0 {_attribute(width)} {_attribute(height)}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
    )


def marker(index: int, x: float, y: float, *, hollow: bool = False, words: str = "", radius: float = 5.0) -> str:
    """The sign of the `index`-th series: its own colour, and beyond colour a shape."""
    shape, r = index % _SHAPES, radius
    kind = f"s{index % N_COLORS}" + (" hollow" if hollow else "")
    inside = title(words) if words else ""
    if shape == 0:
        return element("circle", inside, cx=x, cy=y, r=r, class_=kind)
    points = {
        1: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        2: [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        3: [(0, -1.2), (1.15, 0.85), (-1.15, 0.85)],
    }[shape]
    d = "M" + "L".join(f"{_attribute(x + r * a)} {_attribute(y + r * b)}" for a, b in points) + "Z"
    return element("path", inside, d=d, class_=kind)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str) -> str:
    """A line through points."""
    d = "M" + "L".join(f"{_attribute(x)} {_attribute(y)}" for x, y in points)
    return element("path", d=d, class_=class_)


def width_of(words: str, font_pixels: float = FONT_PIXELS) -> float:
    """About how wide a text is."""
    return len(words) * CHARACTER_PIXELS * font_pixels / FONT_PIXELS


def shortened(words: str, width: float) -> str:
    """As much of a text as there is room for."""
    most = max(int(width / CHARACTER_PIXELS), 2)
    return words if len(words) <= most else words[: most - 1] + "…"


@dataclass(frozen=True)
class Axis:
    """Values on a stretch of pixels: `low` lies at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies; beyond the ends it lies on them."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.is_log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values to label."""
        return _log_ticks(self.low, self.high) if self.is_log else _linear_ticks(self.low, self.high)


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis around positive values, a tenth of its length free at both ends."""
    known = [value for value in values if value > 0] or [1e-3, 1e-2]
    low, high = math.log10(min(known)), math.log10(max(known))
    if high - low < 0.3:
        low, high = low - 0.15, high + 0.15
    free = 0.08 * (high - low)
    return Axis(10 ** (low - free), 10 ** (high + free), start, end, is_log=True)


def linear_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis around values, a little of its length free at both ends."""
    low, high = min(values), max(values)
    free = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    return Axis(low - free, high + free, start, end)


def short(value: float) -> str:
    """A tick's label: 0.001, 2e-05, 4.5."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = [10.0**k for k in range(first, last + 1)]
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), tuple(range(1, 10))):
        ticks = [_clean(decade * factor) for decade in decades for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 4:
            return inside
    return inside


def _linear_ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 7)
    first = math.ceil(low / step)
    return [_clean(k * step) for k in range(first, math.floor(high / step) + 1)]


def _clean(value: float) -> float:
    return float(f"{value:.10g}")


def _attribute(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".") or "0"
    return escape(str(value))

"""Draws loss over file size, ours and llama.cpp's, from the rows that `quality.py --csv` measured.

    python benchmarks/plot_quality.py [--rows benchmarks/quality.csv] [--note TEXT] [--out docs/quality.svg]

The picture holds its own colours for light and dark pages and its own ground, so that it can be read on either. Each
series has a shape and a dash besides its colour, so that nobody has to tell colours apart; these are orange, blue,
green and purple after Okabe and Ito, darker on white and lighter on black. Bars are 95 % intervals: 1.96 standard
errors to both sides. The same rows give the same bytes.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketquant.eval.report.html import svg

ROOT = Path(__file__).parent.parent
ROWS, PICTURE = ROOT / "benchmarks/quality.csv", ROOT / "docs/quality.svg"
NOTE = "the embedded model (3.8 M weights), 5,080 tokens of text that no file was made with"

WIDTH, HEIGHT = 840.0, 520.0
LEFT, TOP, RIGHT, BOTTOM = 74.0, 84.0, WIDTH - 26, HEIGHT - 84
RADIUS, FONT_PIXELS, BOLD = 5.0, 14.0, 1.25

SERIES = {
    "peer": "llama.cpp's quantizer, with an importance matrix",
    "types and rounding, no gradients": "pocketquant, by the model's activations",
    "types and rounding, curvature": "pocketquant, by activations and gradients",
    "types and rounding, curvature, tuned": "the same, then tuned",
}
"""Method of a row -> its name in the picture, in the order of the legend."""

STYLE = """
svg { color-scheme: light dark; }
text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; fill: #1b2430; }
.ground { fill: #ffffff; stroke: #d5dbe2; }
.title { font-size: 17px; font-weight: 600; }
.soft, .tick { fill: #55606e; }
.tick { font-size: 13px; }
.size { font-weight: 600; }
.grid { stroke: #e4e8ed; }
.s0 { --c: #b34700; } .s1 { --c: #0072b2; } .s2 { --c: #00795a; } .s3 { --c: #a3477f; }
path.mark, circle.mark { fill: var(--c); stroke: #ffffff; stroke-width: 1; }
.bar { stroke: var(--c); stroke-width: 1.5; }
.curve { fill: none; stroke: var(--c); stroke-width: 2; }
.curve.s1 { stroke-dasharray: 7 4; } .curve.s2 { stroke-dasharray: 2 4; } .curve.s3 { stroke-dasharray: 10 3 2 3; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6ebf1; }
  .ground { fill: #0d1117; stroke: #30363d; }
  .soft, .tick { fill: #a3afbd; }
  .grid { stroke: #262d36; }
  .s0 { --c: #ff9d57; } .s1 { --c: #6cb6ff; } .s2 { --c: #3fd0a0; } .s3 { --c: #f09ac6; }
  path.mark, circle.mark { stroke: #0d1117; }
}
"""


@dataclass(frozen=True)
class Row:
    """A file that was measured; divergence in nats per token, with its standard error."""

    size: str
    method: str
    nbytes: int
    mean: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        return self.mean - 1.96 * self.error, self.mean + 1.96 * self.error


def read_rows(path: Path) -> list[Row]:
    """The rows of the first text that have a place in the picture, smallest file first.

    Raises:
        SystemExit: a row lacks a column, a number is none, or there is nothing to draw.
    """
    with path.open(encoding="utf-8", newline="") as file:
        try:
            found = [
                (each["text"], Row(each["size"], each["method"], int(each["bytes"]), *map(float, kld)))
                for each in csv.DictReader(file)
                for kld in [(each["kld_nats"], each["kld_se"])]
            ]
        except (KeyError, TypeError, ValueError) as problem:
            raise SystemExit(f"{path}: no table of quality.py --csv: {problem!r}") from problem
    rows = [row for text, row in found if text == found[0][0] and row.method in SERIES]
    if not rows or min(row.mean for row in rows) <= 0:
        raise SystemExit(f"{path}: no rows of {', '.join(map(repr, SERIES))} with a divergence above 0")
    return sorted(rows, key=lambda row: (row.nbytes, row.method))


def draw(rows: Sequence[Row], note: str) -> str:
    """The picture as SVG; `note` says below it what was measured."""
    x = svg.linear_axis([row.nbytes / 1e6 for row in rows], LEFT, RIGHT)
    lowest = min(row.mean for row in rows) / 5  # an interval down to 0 would take the whole logarithmic axis
    y = svg.log_axis([max(end, lowest) for row in rows for end in row.interval], BOTTOM, TOP)
    parts = [
        svg.element("style", STYLE),
        svg.element("rect", x=0.5, y=0.5, width=WIDTH - 1, height=HEIGHT - 1, rx=8, class_="ground"),
        svg.text(20, 32, "What quantization loses, by file size", class_="title"),
        svg.text(20, 54, "KL divergence from full precision, nats per token; bars are 95 % intervals", class_="soft"),
        *_grid(x, y),
        *_legend([method for method in SERIES if any(row.method == method for row in rows)]),
    ]
    for index, method in enumerate(SERIES):
        own = [row for row in rows if row.method == method]
        places = [(x.place(row.nbytes / 1e6), y.place(row.mean)) for row in own]
        if len(places) > 1:
            parts.append(svg.path(places, f"curve s{index}"))
        for row, (at_x, at_y) in zip(own, places, strict=True):
            low, high = (y.place(max(end, lowest)) for end in row.interval)
            parts.append(svg.line(at_x, low, at_x, high, f"bar s{index}"))
            words = f"{SERIES[method]}, {row.size}: {row.mean:.2g} ± {row.error:.1g} nats, {row.nbytes:,} bytes"
            parts.append(_mark(index, at_x, at_y, words))
    parts += _sizes(rows, x, y)
    parts.append(svg.text((LEFT + RIGHT) / 2, HEIGHT - 18, note, class_="soft", text_anchor="middle"))
    label = f"KL divergence over file size of {len(rows)} files; the less, the better"
    picture = svg.drawing(WIDTH, HEIGHT, label, parts, "quality")
    return picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def _grid(x: svg.Axis, y: svg.Axis) -> list[str]:
    parts = []
    for tick in y.ticks():
        at = y.place(tick)
        parts.append(svg.line(LEFT, at, RIGHT, at, "grid"))
        parts.append(svg.text(LEFT - 8, at + 4, svg.short(tick), class_="tick", text_anchor="end"))
    for tick in x.ticks():
        at = x.place(tick)
        parts.append(svg.line(at, TOP, at, BOTTOM, "grid"))
        parts.append(svg.text(at, BOTTOM + 20, svg.short(tick), class_="tick", text_anchor="middle"))
    parts.append(svg.text((LEFT + RIGHT) / 2, BOTTOM + 42, "file size, MB", class_="soft", text_anchor="middle"))
    return parts


def _sizes(rows: Sequence[Row], x: svg.Axis, y: svg.Axis) -> list[str]:
    """llama.cpp's name of each size above its worst file, to the right of the falling curve where there is room."""
    worst = {row.size: row for row in sorted(rows, key=lambda row: row.interval[1])}
    names = sorted(worst, key=lambda size: worst[size].nbytes)
    places = [x.place(worst[size].nbytes / 1e6) for size in names]
    parts = []
    for size, at, after in zip(names, places, [*places[1:], WIDTH], strict=True):
        is_narrow = after - at < BOLD * svg.width_of(size, FONT_PIXELS) + 4
        top = y.place(worst[size].interval[1]) - 8
        anchor = "end" if is_narrow else "start"
        parts.append(svg.text(at + (14 if is_narrow else -6), top, size, class_="size", text_anchor=anchor))
    return parts


def _legend(methods: Sequence[str]) -> list[str]:
    """Upper right, where no curve comes: files lose less the larger they are."""
    left = RIGHT - max(svg.width_of(SERIES[method], FONT_PIXELS) for method in methods) - 44
    parts = []
    for i, method in enumerate(methods):
        index, at = list(SERIES).index(method), TOP + 8 + 23 * i
        parts.append(svg.path([(left, at), (left + 34, at)], f"curve s{index}"))
        parts.append(_mark(index, left + 17, at, ""))
        parts.append(svg.text(left + 44, at + 5, SERIES[method]))
    return parts


def _mark(index: int, x: float, y: float, words: str) -> str:
    return svg.marker(index, x, y, words=words, radius=RADIUS).replace(f'class="s{index}"', f'class="mark s{index}"')


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--note", default=NOTE, help="what was measured, below the picture")
    parser.add_argument("--out", type=Path, default=PICTURE)
    asked = parser.parse_args(arguments)
    asked.out.write_text(draw(read_rows(asked.rows), asked.note), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

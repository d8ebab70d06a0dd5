"""The charts: size against divergence, curves, rows of dots; each at any width, with bars for 95 % intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape

from pocketquant.eval.report.html import svg
from pocketquant.eval.report.html.published import Published
from pocketquant.eval.report.html.sheet import Figure, MeasuredFile, Slice

NARROW = 480
"""Below this width labels move to where a telephone has room for them."""

_GUTTER, _HEAD = 52.0, 30.0
"""Room for the labels of the upright axis, and for its name above it."""

_NAME_ROOM = 36.0


@dataclass(frozen=True)
class _Frame:
    """Where the plot lies in its drawing."""

    left: float
    top: float
    right: float
    bottom: float


def size_chart(variants: Sequence[MeasuredFile], published: Published | None, width: float) -> str:
    """Divergence over bits per weight, or over bytes where a file's weights were not counted; the front is joined."""
    is_narrow = width < NARROW
    height = 360.0 if is_narrow else 440.0
    frame = _Frame(_GUTTER, _HEAD, width - 14, height - 46)
    has_bits = all(variant.bits is not None for variant in variants)
    shown = published if has_bits else None
    models = shown.models if shown else ()
    sizes = [_size(variant, has_bits) for variant in variants]
    spread = [*sizes, *(point.bits_per_weight for model in models for point in model.points)]
    losses = [*_ends(variant.kld for variant in variants), *(p.kld for m in models for p in m.points)]
    x, y = svg.linear_axis(spread, frame.left, frame.right), svg.log_axis(losses, frame.bottom, frame.top)
    if models:  # their names stand left of their first points
        room = (x.high - x.low) / (frame.right - frame.left - _NAME_ROOM) * _NAME_ROOM
        x = replace(x, low=x.low - room)
    unit = "bits per weight" if has_bits else "file size in MB"
    parts = _grid(frame, x, y, unit, "KL divergence, nats per token")
    boxes: list[_Box] = []
    for model in models:
        points = [(x.place(point.bits_per_weight), y.place(point.kld)) for point in model.points]
        best = [p for i, p in enumerate(points) if all(p[1] > q[1] for q in points[:i] if q[0] <= p[0])]
        parts.append(svg.path(best, "peer-line"))
        for point, place in zip(model.points, points, strict=True):
            words = f"{model.name}, all {point.format}: {point.kld:g} at {point.bits_per_weight:g} bits (published)"
            parts.append(svg.element("circle", svg.title(words), cx=place[0], cy=place[1], r=3.0, class_="peer"))
            boxes.append(_Box(place[0] - 3, place[1] - 3, place[0] + 3, place[1] + 3))
        at, name = points[0], model.name.rpartition("-")[2]
        parts.append(svg.text(at[0] - 8, at[1] + 4, name, class_="peer-label", text_anchor="end"))
        boxes.append(_Box(at[0] - 8 - svg.width_of(name), at[1] - 8, at[0] - 8, at[1] + 6))
    front = [
        (x.place(size), y.place(variant.kld.mean))
        for variant, size in zip(variants, sizes, strict=True)
        if variant.on_front and variant.kld.mean
    ]
    if len(front) > 1:
        parts.append(svg.path(sorted(front), "front"))
    placed = [
        (i, variant, x.place(size), y.place(variant.kld.mean))
        for i, (variant, size) in enumerate(zip(variants, sizes, strict=True))
        if variant.kld.mean
    ]
    boxes += [_Box(at_x - 6, at_y - 6, at_x + 6, at_y + 6) for _, _, at_x, at_y in placed]
    for i, variant, at_x, at_y in placed:
        parts.append(_upright_bar(variant.kld, at_x, y, i))
        words = f"{variant.file}: {_spoken(variant.kld)}, {_size(variant, has_bits):.3g} {unit}"
        parts.append(svg.marker(i, at_x, at_y, hollow=not variant.on_front, words=words))
    for _, variant, at_x, at_y in placed:
        parts.append(_label(variant.label, at_x, at_y, frame, boxes))
    return svg.drawing(width, height, f"KL divergence over {unit} of {len(variants)} files", parts, "chart")


@dataclass(frozen=True)
class _Box:
    """A rectangle that is taken."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return not (
            self.right < other.left or other.right < self.left or self.bottom < other.top or other.bottom < self.top
        )


def _label(words: str, x: float, y: float, frame: _Frame, boxes: list[_Box]) -> str:
    """A name beside its point, where nothing else is; none where there is no room, the table has it."""
    words = svg.shortened(words, 170)
    wide = svg.width_of(words)
    places = [
        (x + 10, y + 4, "start"),
        (x - 10, y + 4, "end"),
        (x + 9, y - 9, "start"),
        (x + 9, y + 18, "start"),
        (x - 9, y - 9, "end"),
        (x - 9, y + 18, "end"),
        (x, y - 13, "middle"),
        (x, y + 23, "middle"),
    ]
    for at_x, at_y, anchor in places:
        left = at_x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        box = _Box(left, at_y - 10, left + wide, at_y + 3)
        is_inside = (
            frame.left < box.left and box.right < frame.right and frame.top < box.top and box.bottom < frame.bottom
        )
        if is_inside and not any(box.meets(other) for other in boxes):
            boxes.append(box)
            return svg.text(at_x, at_y, words, class_="name", text_anchor=anchor)
    return ""


def curve_chart(
    series: Sequence[tuple[str, Sequence[Slice]]], axis_label: str, width: float, *, by_place: bool = True
) -> str:
    """Divergence over slices that follow one another: places in the window, or confidence of the reference."""
    is_narrow = width < NARROW
    height = 290.0 if is_narrow else 340.0
    frame = _Frame(_GUTTER, _HEAD, width - 14, height - 46)
    labels = max((slices for _, slices in series), key=len)
    y = svg.log_axis(_ends(each.kld for _, slices in series for each in slices), frame.bottom, frame.top)
    step = (frame.right - frame.left) / len(labels)
    parts = _rows_of_grid(frame, y, "KL divergence, nats per token")
    every = max(1, -(-46 * len(labels) // int(frame.right - frame.left)))
    for i, each in enumerate(labels):
        if i % every == 0:
            low, high = each.low or 0.0, each.high or 0.0
            words = f"{low:g}" if by_place else f"{100 * low:g}-{100 * high:g} %"
            words = words if by_place or not is_narrow else f"{100 * low:g}"
            parts.append(
                svg.text(frame.left + step * (i + 0.5), frame.bottom + 16, words, class_="tick", text_anchor="middle")
            )
    middle = (frame.left + frame.right) / 2
    parts.append(svg.text(middle, height - 8, axis_label, class_="axis-label", text_anchor="middle"))
    for k, (name, slices) in enumerate(series):
        shift = _dodge(k, len(series), min(step * 0.6, 9 * len(series)))
        known = [
            (i, each, frame.left + step * (i + 0.5) + shift, y.place(each.kld.mean))
            for i, each in enumerate(slices)
            if each.kld.mean and each.kld.mean > 0
        ]
        if len(known) > 1:
            parts.append(svg.path([(at_x, at_y) for _, _, at_x, at_y in known], f"curve s{k % svg.N_COLORS}"))
        for _, each, at_x, at_y in known:
            parts.append(_upright_bar(each.kld, at_x, y, k))
            words = f"{name}, {each.label}: {_spoken(each.kld)} ({each.tokens:,} tokens)"
            parts.append(svg.marker(k, at_x, at_y, words=words, radius=3.6))
    return svg.drawing(width, height, f"KL divergence by {axis_label}", parts, "chart")


def dot_chart(series: Sequence[tuple[str, Sequence[Slice]]], width: float) -> str:
    """Divergence of each domain: one row a domain, one dot a file."""
    rows = list(dict.fromkeys(each.label for _, slices in series for each in slices))
    pitch = max(26.0, 10.0 * len(series) + 8)
    left = min(max(svg.width_of(row) for row in rows) + 16, width * 0.3)
    frame = _Frame(left, 8, width - 18, 8 + pitch * len(rows))
    x = svg.log_axis(_ends(each.kld for _, slices in series for each in slices), frame.left, frame.right)
    height = frame.bottom + 44
    parts = []
    for i, row in enumerate(rows):
        top = frame.top + pitch * i
        if i % 2 == 0:
            parts.append(svg.element("rect", x=0, y=top, width=width, height=pitch, class_="band"))
        name = svg.shortened(row, left - 12)
        parts.append(svg.element("text", svg.title(row), escape(name), x=4, y=top + pitch / 2 + 4, class_="row-name"))
    for tick in _sparse(x, 48):
        at = x.place(tick)
        parts.append(svg.line(at, frame.top, at, frame.bottom, "grid"))
        parts.append(svg.text(at, frame.bottom + 16, svg.short(tick), class_="tick", text_anchor="middle"))
    middle = (frame.left + frame.right) / 2
    words = "KL divergence, nats per token"
    parts.append(svg.text(middle, height - 6, words, class_="axis-label", text_anchor="middle"))
    for k, (name, slices) in enumerate(series):
        for each in slices:
            if not each.kld.mean or each.kld.mean <= 0:
                continue
            at_y = frame.top + pitch * (rows.index(each.label) + 0.5) + _dodge(k, len(series), pitch - 10)
            at_x, interval = x.place(each.kld.mean), each.kld.interval
            if interval:
                low = x.place(interval[0]) if interval[0] > 0 else frame.left
                parts.append(svg.line(low, at_y, x.place(interval[1]), at_y, f"bar s{k % svg.N_COLORS}"))
            spoken = f"{name}, {each.label}: {_spoken(each.kld)} ({each.tokens:,} tokens)"
            parts.append(svg.marker(k, at_x, at_y, words=spoken, radius=3.8))
    return svg.drawing(width, height, "KL divergence by domain", parts, "chart")


def legend_mark(index: int, *, hollow: bool = False) -> str:
    """A series' sign alone, for tables and legends."""
    return svg.element(
        "svg", svg.marker(index, 7, 7, hollow=hollow), class_="mark", width=14, height=14, aria_hidden="true"
    )


def _grid(frame: _Frame, x: svg.Axis, y: svg.Axis, x_label: str, y_label: str) -> list[str]:
    parts = _rows_of_grid(frame, y, y_label)
    for tick in _sparse(x, 44):
        at = x.place(tick)
        parts.append(svg.line(at, frame.top, at, frame.bottom, "grid"))
        parts.append(svg.text(at, frame.bottom + 16, svg.short(tick), class_="tick", text_anchor="middle"))
    middle = (frame.left + frame.right) / 2
    parts.append(svg.text(middle, frame.bottom + 38, x_label, class_="axis-label", text_anchor="middle"))
    return parts


def _rows_of_grid(frame: _Frame, y: svg.Axis, label: str) -> list[str]:
    parts = []
    for tick in _sparse(y, 20):
        at = y.place(tick)
        parts.append(svg.line(frame.left, at, frame.right, at, "grid"))
        parts.append(svg.text(frame.left - 6, at + 4, svg.short(tick), class_="tick", text_anchor="end"))
    parts.append(svg.text(4, 13, label, class_="axis-label"))
    return parts


def _sparse(axis: svg.Axis, least: float) -> list[float]:
    """Ticks whose labels stand apart."""
    kept: list[float] = []
    for tick in axis.ticks():
        if not kept or abs(axis.place(tick) - axis.place(kept[-1])) >= least:
            kept.append(tick)
    return kept


def _upright_bar(value: Figure, x: float, y: svg.Axis, index: int) -> str:
    if value.interval is None:
        return ""
    low, high = value.interval
    bottom = y.place(low) if low > 0 else y.start
    return svg.line(x, bottom, x, y.place(high), f"bar s{index % svg.N_COLORS}")


def _size(variant: MeasuredFile, has_bits: bool) -> float:
    return variant.bits if has_bits and variant.bits is not None else variant.file_bytes / 1e6


def _ends(values: Iterable[Figure]) -> list[float]:
    """Positive means and ends of intervals: what an axis has to hold. An interval that comes near 0 is cut at a fifth
    of the least mean, else it would take the whole logarithmic axis."""
    known = [value for value in values if value.mean is not None and value.mean > 0]
    least = min((value.mean for value in known if value.mean), default=0.0) / 5
    ends = [end for value in known for end in (value.mean, *(value.interval or ())) if end is not None]
    return [max(end, least) for end in ends]


def _dodge(index: int, count: int, room: float) -> float:
    """How far a series steps aside so that bars do not cover one another."""
    return 0.0 if count < 2 else room * (index / (count - 1) - 0.5)


def _spoken(value: Figure) -> str:
    if value.mean is None:
        return "not known"
    return f"{value.mean:.3g}" + (f" ± {value.se:.1g}" if value.se is not None else "")

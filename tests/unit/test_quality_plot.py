"""The picture of loss over file size: what the command draws from the measured rows, where nothing covers a label."""

from __future__ import annotations

import importlib.util
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_quality", ROOT / "benchmarks/plot_quality.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_what_the_command_draws(plot: ModuleType, tmp_path: Path) -> None:
    plot.main(["--out", str(tmp_path / "again.svg")])
    made, kept = tmp_path / "again.svg", ROOT / "docs/quality.svg"
    assert made.read_bytes() == kept.read_bytes(), "run python benchmarks/plot_quality.py"


def test_the_rows_are_those_of_the_page(plot: ModuleType) -> None:
    page = (ROOT / "docs/explain/quality.md").read_text(encoding="utf-8")
    section = page.partition("### The embedded model")[2].partition("###")[0]
    table = [[cell.strip() for cell in line.split("|")[1:]] for line in section.splitlines() if "±" in line]
    told = sorted((row[0], int(row[2].replace(",", "")), row[3]) for row in table)
    drawn = plot.read_rows(plot.ROWS)
    assert sorted((row.size, row.nbytes, f"{row.mean:.6f} ± {row.error:.6f}") for row in drawn) == told


def test_every_row_is_drawn_where_its_numbers_say(plot: ModuleType) -> None:
    rows = plot.read_rows(plot.ROWS)
    picture = ET.fromstring(plot.draw(rows, "note"))
    marks = [(mark.findtext(f"{SVG}title"), mark) for mark in picture.iter() if "mark" in mark.get("class", "")]
    told = [words for words, _ in marks if words]
    assert len(told) == len(rows)
    for row in rows:
        assert any(f"{row.size}: {row.mean:.2g} ± {row.error:.1g} nats, {row.nbytes:,} bytes" in each for each in told)
    peers = [
        (float(mark.get("cx", "")), float(mark.get("cy", ""))) for words, mark in marks if words and mark.get("cx")
    ]
    assert peers == sorted(peers)  # larger files lie to the right, and these lose less: lower on the page
    bars = [each for each in picture.iter(f"{SVG}line") if "bar" in each.get("class", "")]
    assert len(bars) == len(rows)
    assert all(float(bar.get("y2", "")) < float(bar.get("y1", "")) for bar in bars)


def boxes_of(picture: ET.Element, plot: ModuleType) -> list[tuple[str, float, float, float, float]]:
    """Texts and marks, as (what, left, top, right, bottom); the width of letters is guessed a little too large."""
    found = []
    for each in picture.iter():
        if each.tag == f"{SVG}text":
            x, y, words = float(each.get("x", "")), float(each.get("y", "")), each.text or ""
            wide = plot.svg.width_of(words, plot.FONT_PIXELS) * (plot.BOLD if each.get("class") == "size" else 1)
            left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[each.get("text-anchor", "start")]
            found.append((words, left, y - 11, left + wide, y + 3))
        elif "mark" in each.get("class", ""):
            numbers = [float(n) for n in re.findall(r"[\d.]+", each.get("d", ""))]
            middle = float(each.get("cx", 0)), float(each.get("cy", 0))
            xs, ys = numbers[::2] or [middle[0] - 5, middle[0] + 5], numbers[1::2] or [middle[1] - 5, middle[1] + 5]
            found.append(("a mark", min(xs), min(ys), max(xs), max(ys)))
    return found


def test_no_label_lies_on_another_or_on_a_point(plot: ModuleType) -> None:
    boxes = boxes_of(ET.fromstring((ROOT / "docs/quality.svg").read_text(encoding="utf-8")), plot)
    for i, (words, left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left < right <= plot.WIDTH, words
        for other, other_left, other_top, other_right, other_bottom in boxes[i + 1 :]:
            is_apart = right <= other_left or other_right <= left or bottom <= other_top or other_bottom <= top
            assert is_apart or words == other == "a mark", f"{words!r} and {other!r}"


def test_it_is_readable_on_dark_pages(plot: ModuleType) -> None:
    """Contrast of what is drawn with its own ground: WCAG 2.2 asks for 4.5 for text and 3 for shapes."""
    light, _, dark = plot.STYLE.partition("@media (prefers-color-scheme: dark)")
    for style, ground in ((light, "#ffffff"), (dark, "#0d1117")):
        assert f".ground {{ fill: {ground}" in style
        inks = re.findall(r"(?:text|\.tick) \{[^}]*?fill: (#\w{6})", style)
        assert len(inks) >= 2
        assert all(contrast(ink, ground) >= 4.5 for ink in inks)
        colors = re.findall(r"--c: (#\w{6})", style)
        assert len(colors) == len(plot.SERIES)
        assert all(contrast(color, ground) >= 3 for color in colors)


def contrast(one: str, other: str) -> float:
    """Source: WCAG 2.2, relative luminance and contrast ratio."""
    values = []
    for color in (one, other):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        values.append(0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)
    return max(values) / min(values)


@pytest.mark.parametrize("broken", ["", "text,size\na,b\n", "text,size,method,bytes,kld_nats,kld_se\na,b,peer,x,1,1\n"])
def test_a_file_without_rows_is_refused(broken: str, plot: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(broken)
    with pytest.raises(SystemExit, match=r"rows\.csv"):
        plot.main(["--rows", str(tmp_path / "rows.csv"), "--out", str(tmp_path / "none.svg")])
    assert not (tmp_path / "none.svg").exists()

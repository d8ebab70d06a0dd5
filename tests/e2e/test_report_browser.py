"""The page in a real browser, without a network: it is shown whole, in both colours, on a desk and on a telephone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_driver import Browser, find_browser
from report_maker import make_evaluation, make_tasks

from pocketquant.eval.report.html import to_html, to_sheet

OVERLAPS = """
(() => {
  const found = [];
  for (const chart of document.querySelectorAll('svg.chart')) {
    const boxes = [...chart.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    if (!boxes.length || !boxes[0][1].width) continue;
    const frame = chart.getBoundingClientRect();
    for (const [words, box] of boxes)
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1)
        found.push(words + ' leaves its chart');
    for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
      const [a, b] = [boxes[i][1], boxes[j][1]];
      if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
        found.push(boxes[i][0] + ' over ' + boxes[j][0]);
    }
  }
  return found;
})()
"""
CONTRAST = """
(() => {
  const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).map(v => v / 255).map(
    v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const card = light(getComputedStyle(document.querySelector('section')).backgroundColor);
  return Math.min(...['td', '.note', 'h2', 'thead th', '.error'].map(name => {
    const ink = light(getComputedStyle(document.querySelector(name)).color);
    return (Math.max(ink, card) + 0.05) / (Math.min(ink, card) + 0.05); }));
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium or Chrome on this machine")
    with Browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    figures = (("Q4_0", 0.031, 2.3), ("POCKET_4BIT", 0.017, 2.45), ("Q4_K_M", 0.019, 2.47), ("Q8_0", 0.0012, 4.1))
    documents = [
        (f"{name}.json", make_evaluation(f"Tiny-{name}", kld=kld, size=int(size * 1e6), texts=7, n_layer=32))
        for name, kld, size in figures
    ]
    for (_, document), (_, _, size) in zip(documents, figures, strict=True):
        for tensor in document["tensors"]:
            tensor["weights"] = int(size * 1e6 * 8 / (2 * size) / len(document["tensors"]))
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(to_html(to_sheet([*documents, ("tasks.json", make_tasks())])), encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 390])
def test_the_page_is_shown_whole(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    troubles = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.loadingFailed")
    assert [event for event in browser.events if event["method"] in troubles] == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert {url for url in asked if not url.startswith("data:")} == {page.resolve().as_uri()}
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(OVERLAPS) == []
    shown = "getComputedStyle(document.querySelector('{}')).display"
    assert (browser.evaluate(shown.format(".wide")) == "none") == (width < 700)
    assert (browser.evaluate(shown.format(".narrow")) == "none") == (width > 700)
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(16, 20, 26)" if dark else "rgb(246, 247, 249)")
    assert browser.evaluate(CONTRAST) >= 4.5
    assert browser.evaluate("document.querySelectorAll('svg.heat rect').length") > 200


def test_the_browser_would_have_told(browser: Browser, tmp_path: Path) -> None:
    """The test above sees what it looks for."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<img src='http://example.invalid/x.png'><script>nothing()</script><div style='width:2000px'>x</div>"
    )
    browser.open(path, width=390)
    methods = [event["method"] for event in browser.events]
    assert "Runtime.exceptionThrown" in methods
    assert "Network.loadingFailed" in methods
    assert browser.evaluate("document.documentElement.scrollWidth") > 390

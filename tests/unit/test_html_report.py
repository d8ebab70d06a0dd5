"""Reports as pages: what they say, that nothing in them can run or load, and that they are the same every time."""

from __future__ import annotations

import json
import math
import re
import sys
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_maker import make_evaluation, make_tasks

from pocketquant import open_model, open_recipe, plan
from pocketquant.errors import EvalError
from pocketquant.eval.report.html import svg, to_card, to_html, to_sheet
from pocketquant.eval.report.html.heat import Scale
from pocketquant.eval.report.html.published import read_published
from pocketquant.eval.report.html.reproduce import list_steps
from pocketquant.eval.report.html.sheet import find_front
from pocketquant.eval.report.html.taking import words as words_of
from pocketquant.quant import sensitivity

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Every element with its attributes; fails where one is not closed, or not in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attributes}) == len(attributes), f"{tag}: an attribute twice"
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def documents() -> list[tuple[str, Any]]:
    found = [
        (f"{name}.json", make_evaluation(f"Tiny-{name}", kld=kld, size=size))
        for name, kld, size in (("Q4_0", 0.031, 2_300_000), ("Q4_K", 0.017, 2_300_001), ("Q8_0", 0.0012, 4_100_000))
    ]
    return [*found, ("tasks.json", make_tasks())]


def test_a_page_shows_everything() -> None:
    page = Page(to_html(to_sheet(documents())))
    text = " ".join(" ".join(page.words).split())
    for words in (
        "Tiny",
        "Q4_K",
        "0.017",
        "domain 1",
        "ffn_down",
        "cloze (acc)",
        "-2.2 ± 1 points",
        "Kept exactly: norm",
    ):
        assert words in text, words
    assert "f" * 64 in text
    assert "pocketquant eval Tiny-Q8_0.gguf --reference Tiny-F32.gguf" in text
    assert "Qwen3.5-4B" in text
    shown = [dict(attributes)["class"] for tag, attributes in page.elements if tag == "svg" and "class" in attributes]
    assert shown.count("chart") == 2 * 4  # size, domains, positions, confidence; wide and narrow
    assert shown.count("chart heat") == 2 * 3


def test_nothing_is_loaded_and_nothing_runs() -> None:
    page = to_html(to_sheet(documents()))
    for tag, attributes in Page(page).elements:
        assert tag not in ("script", "iframe", "object", "embed", "img", "form", "base", "use", "foreignobject")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "style"):
            assert attributes.get(name) in (None, "data:,"), (tag, attributes)
    assert not re.search(r"url\(|@import|@font-face", page)
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "</style><svg onload=alert(1)>",
        "</title></text></svg><b>",
        "{{ 7 * 7 }}{% for %}",
        "`code`|cell|\n# head",
        "$(rm -rf x); 'quoted'",
    ],
)
def test_names_are_text(hostile: str) -> None:
    """Every text of a report replaced by hostile words: the page has the same elements as for harmless ones."""

    def replaced(value: Any, words: str) -> Any:
        if isinstance(value, dict):
            kept = ("schema", "sha256")
            return {k: v if k in kept else replaced(v, words) for k, v in value.items()} | (
                {words: words} if "numpy" in value else {}
            )
        if isinstance(value, list):
            return [replaced(item, words) for item in value]
        return words if isinstance(value, str) else value

    pages = []
    for words in (hostile, "harmless"):
        sheet = to_sheet([(name, replaced(document, words)) for name, document in documents()])
        pages.append(Page(to_html(sheet)))
        card = to_card(sheet)
        assert "<" not in re.sub(r"(?ms)^(`{3,})$.*?^\1$", "", card), "outside of blocks of code"
        rows = [line for line in card.splitlines() if line.startswith("|")]
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
        assert all(a == b for a, b, row in zip(cells, cells[1:], rows[1:], strict=False) if row.startswith("|---"))
    assert [tag for tag, _ in pages[0].elements if tag != "text"] == [
        tag for tag, _ in pages[1].elements if tag != "text"
    ]
    assert words_of(hostile) in " ".join(pages[0].words)


def test_commands_are_quoted_for_a_shell() -> None:
    document = make_evaluation("Tiny-$(touch x)", kld=0.01)
    [(_, command)] = list_steps(to_sheet([("a.json", document)]))
    assert "eval 'Tiny-$(touch x).gguf' --reference" in command


def test_equal_reports_give_equal_pages() -> None:
    first, second = (to_sheet(json.loads(json.dumps(documents()))) for _ in range(2))
    assert to_html(first) == to_html(second)
    assert to_card(first) == to_card(second)


def test_numbers_that_are_none_are_left_out() -> None:
    document = make_evaluation("Tiny-Q4_K", kld=0.02)
    document["metrics"]["ppl"]["ratio"] = None
    document["metrics"]["kld"]["se"] = None
    document["by_domain"][0]["metrics"] = None
    document["by_position"][1]["kld"] = None
    document["tensors"][0]["relative_rmse"] = math.inf
    document["tensors"][1]["layer"] = -3
    document["non_finite"] = 12
    del document["noise_floor"], document["by_confidence"]
    page = " ".join(Page(to_html(to_sheet([("a.json", document)]))).words)
    assert "not finite" in page
    assert "12 of 1,001 positions" in page
    assert "nan" not in page.lower().split()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["provenance"].update(context=512), "another context"),
        (lambda d: d["by_domain"][1]["file"].update(sha256="0" * 64), "another text"),
        (lambda d: d.update(windows=9), "another windows"),
        (lambda d: d["provenance"]["reference"].update(sha256="0" * 64), "another reference"),
        (lambda d: d.update(schema="pocketquant.gate/1"), "no report"),
        (lambda d: d.pop("metrics"), "without its metrics"),
        (lambda d: d.update(tensors=[{}] * 40_000), "more than the"),
    ],
)
def test_what_cannot_stand_side_by_side_is_refused(change: Any, said: str) -> None:
    one, other = make_evaluation("Tiny-A", kld=0.01), deepcopy(make_evaluation("Tiny-B", kld=0.02))
    change(other)
    with pytest.raises(EvalError, match=said):
        to_sheet([("a.json", one), ("b.json", other)])


@pytest.mark.parametrize("document", [[], 3, None, {}, {"schema": []}])
def test_other_json_is_refused(document: Any) -> None:
    with pytest.raises(EvalError, match="no report"):
        to_sheet([("x.json", document)])
    with pytest.raises(EvalError, match="at least one"):
        to_sheet([("tasks.json", make_tasks())])


def test_the_front() -> None:
    points = [(10, 0.5), (12, 0.6), (12, 0.4), (13, 0.4), (9, None), (20, 0.1), (10, 0.5)]
    assert find_front(points) == {0, 2, 5}


def test_published_figures_are_those_that_targets_use() -> None:
    """Both files state figures of the same source."""
    table = tomllib.loads(Path(sensitivity.__file__).with_name("sensitivity.toml").read_text(encoding="utf-8"))
    known = {each["model"]: each["whole_model"] for each in table["measured"]}
    compared = 0
    for model in read_published().models:
        for point in model.points if model.name in known else ():
            assert point.kld == pytest.approx(known[model.name][point.format], abs=6e-5), (model.name, point)
            compared += 1
    assert compared == 14


def test_axes() -> None:
    axis = svg.log_axis([0.001, 0.1], 0, 100)
    assert axis.place(0.01) == pytest.approx(50)
    assert axis.ticks() == [0.001, 0.003, 0.01, 0.03, 0.1]
    assert svg.linear_axis([4.0, 9.0], 0, 1).ticks() == [4, 5, 6, 7, 8, 9]
    assert svg.log_axis([], 0, 1).ticks()
    assert svg.log_axis([0.2, 0.2], 0, 1).place(0.2) == pytest.approx(0.5)
    scale = Scale(0.001, 0.1)
    steps = [scale.step(0.001 * 1.5**i) for i in range(14)]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 8)


def test_two_measurements_of_one_file_do_not_beat_each_other() -> None:
    first, again, other = (make_evaluation("Tiny-Q4_K", kld=kld) for kld in (0.010, 0.011, 0.03))
    other["provenance"]["model"].update(sha256="1" * 64)
    sheet = to_sheet([("a.json", first), ("b.json", again), ("c.json", other)])
    assert [variant.on_front for variant in sheet.variants] == [True, True, False]
    page = to_html(sheet)
    assert page.count('class="beaten"') == 1


def test_figures_of_other_kernels_are_called_that() -> None:
    first, other = make_evaluation("Tiny-Q4_K", kld=0.010), make_evaluation("Tiny-Q8_0", kld=0.003)
    said = "Tiny-Q4_K.gguf was measured by other kernels of llama.cpp than Tiny-Q8_0.gguf"  # the nearer one is first
    sheet = to_sheet([("a.json", first), ("b.json", other)])
    assert "other kernels" not in to_html(sheet) + to_card(sheet)
    other["provenance"]["versions"]["llama_cpp_extra_kernels"] = "not used"
    sheet = to_sheet([("a.json", first), ("b.json", other)])
    for page in (" ".join(Page(to_html(sheet)).words), to_card(sheet).replace("\\", "")):
        assert said in page
        assert "(whether its extra kernels are used): divergences less than 0.5 % apart mean nothing" in page


def test_divergences_from_a_pack_of_top_tokens_are_lower_bounds() -> None:
    document = make_evaluation("Tiny-Q4_K", kld=0.01)
    document["provenance"]["reference_pack"] = {
        "kind": "top",
        "top": 64,
        "is_lower_bound": True,
        "floor": {"captured": 0.81},
        "model": document["provenance"]["reference"],
    }
    sheet = to_sheet([("a.json", document)])
    for page in (" ".join(Page(to_html(sheet)).words), to_card(sheet)):
        assert "KL divergences are lower bounds" in page
        assert "64 most likely tokens" in page
        assert "81 %" in page
        assert "≥ 0.01" in page
    assert "lower bound" not in to_card(to_sheet([("a.json", make_evaluation("Tiny-Q4_K", kld=0.01))]))
    with pytest.raises(EvalError, match="another number of tokens kept of the reference"):
        to_sheet([("a.json", document), ("b.json", make_evaluation("Tiny-Q5_K", kld=0.005, size=3_000_000))])


def test_benchmarks_against_a_quantized_reference_say_so() -> None:
    documents = [("a.json", make_evaluation("Tiny", kld=0.01)), ("t.json", make_tasks())]
    assert "itself quantized" not in to_html(to_sheet(documents))
    documents[1][1]["reference_quantized"] = "97 % Q8_0"
    assert "Tiny-F32.gguf is itself quantized (97 % Q8_0)" in to_html(to_sheet(documents))


def test_bits_per_weight_are_those_of_a_plan(checkpoint: Path) -> None:
    planned = plan(open_model(checkpoint), open_recipe("q4_k_m"))
    document = make_evaluation("Tiny-Q4_K", kld=0.01, size=planned.file_bytes)
    document["tensors"] = [
        {"name": item.tensor.name, "format": item.format.name, "weights": math.prod(item.tensor.shape)}
        for item in planned.tensors
    ]
    [variant] = to_sheet([("a.json", document)]).variants
    assert variant.bits == pytest.approx(planned.bits_per_weight)

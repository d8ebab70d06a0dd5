"""The same numbers from a live reference and from packs, and every mismatch refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_maker import make_checkpoint
from pack_maker import reseal
from typer.testing import CliRunner

from pocketquant import EvalSettings, evaluate, open_model, open_recipe, plan, write
from pocketquant.cli.app import app
from pocketquant.errors import EvalError
from pocketquant.eval import compare
from pocketquant.eval.packs.pack import read_pack
from pocketquant.eval.reference import MAX_FLOOR, PackSettings, base_file_bytes, make_reference, plan_reference
from pocketquant.eval.report.markdown import to_markdown
from pocketquant.texts.corpus import Text

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

Recipe = Callable[[str], Path]
CONTEXT, CHUNKS = 128, 6


def make(model: Path, text: Path, out: Path, **options: Any) -> Path:
    make_reference(model, [Text("text", text)], out, PackSettings(CONTEXT, CHUNKS, **options))
    return out


@pytest.mark.parametrize(("recipe", "coding"), [("f32", "f24"), ("bf16", "bf16"), ("f16", "f16"), ("q8_0", "q8_0")])
def test_a_pack_gives_the_numbers_of_its_reference(
    recipe: str, coding: str, demo_gguf: Recipe, demo_text: Path, tmp_path: Path
) -> None:
    reference, model = demo_gguf(recipe), demo_gguf("q4_k_m")
    out = make(reference, demo_text, tmp_path / "ref.pqref", with_head=True)
    header = read_pack(out).header
    floor = header.floor
    assert header.coding == coding
    assert 0 <= floor.kld_mean <= floor.kld_max
    assert floor.kld_mean < 1e-9 < MAX_FLOOR
    assert floor.shift < 1e-6
    assert floor.captured == 1
    live = compare(model, reference, demo_text, context=CONTEXT, chunks=CHUNKS).metrics
    packed = compare(model, out, demo_text, context=CONTEXT, chunks=CHUNKS).metrics
    assert abs(packed.kld.mean - live.kld.mean) < floor.shift
    assert packed.top1 == live.top1
    assert packed.ppl.model == live.ppl.model
    assert packed.ppl.reference == pytest.approx(live.ppl.reference, rel=1e-5)
    assert packed.kld.p99 == pytest.approx(live.kld.p99, rel=1e-3)
    assert packed.tv.mean == pytest.approx(live.tv.mean, rel=1e-4)


def test_a_pack_without_its_matrix_reads_it_from_the_file(demo_gguf: Recipe, demo_text: Path, tmp_path: Path) -> None:
    reference, model = demo_gguf("bf16"), demo_gguf("q4_k_m")
    small, whole = (make(reference, demo_text, tmp_path / name, with_head=has) for name, has in (("a", 0), ("b", 1)))
    assert whole.stat().st_size - small.stat().st_size == pytest.approx(1536 * 256 * 2, abs=200)
    with pytest.raises(EvalError, match=r"a: holds no output matrix.*demo-bf16\.gguf.*--head"):
        compare(model, small, demo_text, context=CONTEXT, chunks=2)
    run = CliRunner().invoke(
        app,
        f"eval {model} --reference {small} --head {reference} --text {demo_text} --context 128 --chunks 2 --json -q",
    )
    assert run.exit_code == 0, run.output
    with pytest.raises(EvalError, match=r"demo-bf16\.gguf: no reference pack.*leave --head out"):
        evaluate(model, reference, demo_text, EvalSettings(context=CONTEXT, chunks=2, head=reference))
    by_head = json.loads(run.stdout)["metrics"]
    shutil.copy(reference, tmp_path / reference.name)
    beside = compare(model, small, demo_text, context=CONTEXT, chunks=2).to_json()["metrics"]
    assert beside == by_head == compare(model, whole, demo_text, context=CONTEXT, chunks=2).to_json()["metrics"]
    shutil.copy(demo_gguf("f32"), tmp_path / reference.name)
    with pytest.raises(EvalError, match=r"another model than the one .*a was made from, demo-bf16\.gguf"):
        compare(model, small, demo_text, context=CONTEXT, chunks=2)


def test_top_tokens_give_a_lower_bound_of_the_stated_share(demo_gguf: Recipe, demo_text: Path, tmp_path: Path) -> None:
    reference = demo_gguf("bf16")
    bounds = {}
    for top in (16, 64):
        out = make(reference, demo_text, tmp_path / f"{top}.pqref", top=top)
        header = read_pack(out).header
        assert header.floor.kld_mean < 1e-7
        bounds[top] = header.floor.captured
        for recipe in ("q4_k_m", "q8_0"):
            live = compare(demo_gguf(recipe), reference, demo_text, context=CONTEXT, chunks=CHUNKS).metrics
            report = compare(demo_gguf(recipe), out, demo_text, context=CONTEXT, chunks=CHUNKS)
            assert report.metrics.kld.mean / live.kld.mean == pytest.approx(bounds[top], abs=0.08)
            assert report.metrics.top1 == live.top1
            assert report.metrics.top5 == live.top5
            assert report.metrics.ppl.reference == pytest.approx(live.ppl.reference, rel=1e-4)
            assert report.to_json()["provenance"]["reference_pack"]["is_lower_bound"] is True
            assert f"{top} most likely tokens" in to_markdown(report)
            assert "lower bounds" in to_markdown(report)
    assert 0.4 < bounds[16] < bounds[64] < 1


def test_sizes_are_those_of_the_plan(demo_gguf: Recipe, demo_text: Path, tmp_path: Path) -> None:
    texts = [Text("text", demo_text)]
    for top, with_head in ((0, False), (0, True), (32, False)):
        settings = PackSettings(context=64, chunks=5, top=top, with_head=with_head)
        planned = plan_reference(demo_gguf("f32"), texts, settings)
        out = tmp_path / f"{top}{with_head}.pqref"
        pack = make_reference(demo_gguf("f32"), texts, out, settings)
        assert (planned.windows, planned.positions) == (5, 5 * 31) == (pack.header.n_window, pack.header.positions)
        assert planned.base_bytes == base_file_bytes(1536, 5, 64, 31)
        assert 0 < out.stat().st_size - planned.pack_bytes < 3000


def test_threads_do_not_change_a_byte(demo_gguf: Recipe, demo_text: Path, tmp_path: Path) -> None:
    for top in (0, 16):
        one, two = (make(demo_gguf("bf16"), demo_text, tmp_path / f"{n}.pqref", top=top, threads=n) for n in (1, 2))
        assert one.read_bytes() == two.read_bytes()


def test_windows_can_be_scored_from_their_beginning(demo_gguf: Recipe, demo_text: Path, tmp_path: Path) -> None:
    reference, model = demo_gguf("bf16"), demo_gguf("q4_k_m")
    late = make(reference, demo_text, tmp_path / "late.pqref", with_head=True)
    early = make(reference, demo_text, tmp_path / "early.pqref", with_head=True, positions=True)
    with pytest.raises(EvalError, match="positions from 64 on, 0 was asked for"):
        compare(model, late, demo_text, context=CONTEXT, chunks=2, positions=True)
    live = compare(model, reference, demo_text, context=CONTEXT, chunks=2, positions=True)
    packed = compare(model, early, demo_text, context=CONTEXT, chunks=2, positions=True)
    assert live.by_position is not None
    assert packed.by_position is not None
    for ours, theirs in zip(packed.by_position, live.by_position, strict=True):
        assert (ours.low, ours.high, ours.tokens) == (theirs.low, theirs.high, theirs.tokens)
        assert ours.kld == pytest.approx(theirs.kld, abs=1e-6)
    half = compare(model, early, demo_text, context=CONTEXT, chunks=2).metrics.kld.mean
    assert half == pytest.approx(compare(model, late, demo_text, context=CONTEXT, chunks=2).metrics.kld.mean, abs=1e-7)


def test_every_mismatch_is_refused_by_name(demo_gguf: Recipe, demo_text: Path, tmp_path: Path) -> None:
    reference, model = demo_gguf("bf16"), demo_gguf("q4_k_m")
    out = make(reference, demo_text, tmp_path / "ref.pqref", top=16)

    def refused(why: str, judged: Path = model, text: Path = demo_text, **options: object) -> None:
        with pytest.raises(EvalError, match=why):
            compare(judged, out, text, **{"context": CONTEXT, "chunks": CHUNKS, **options})  # type: ignore[arg-type]

    refused(r"made for windows of 128 tokens, 64 were asked for; use --context 128", context=64)
    refused(r"too few were kept; use --chunks 6", chunks=CHUNKS + 3)
    refused(r"need a GGUF as the reference", like="llama-perplexity")
    other = tmp_path / "other.txt"
    other.write_bytes(demo_text.read_bytes()[::-1].decode("latin-1").encode())
    refused(r"6 of 6 windows of .*other\.txt .*another text; the pack was made from\n  evaluation\.txt", text=other)
    changed = tmp_path / "changed.txt"
    changed.write_text(demo_text.read_text(encoding="utf-8").replace("e", "E", 1), encoding="utf-8")
    refused(r"of 6 windows of .*changed\.txt .*another text", text=changed)

    stranger = tmp_path / "stranger.gguf"
    write(plan(open_model(make_checkpoint(tmp_path / "Tiny-1M")), open_recipe("bf16")), stranger)
    refused(r"stranger\.gguf has \d+ tokens|give different meanings to the same token numbers", judged=stranger)
    assert compare(model, out, demo_text, context=CONTEXT, chunks=3).windows == 3


def test_another_tokenizer_and_another_shape_are_told_apart(demo_gguf: Recipe, demo_text: Path, tmp_path: Path) -> None:
    out = make(demo_gguf("bf16"), demo_text, tmp_path / "ref.pqref", top=16)
    data = demo_gguf("q4_k_m").read_bytes()
    shorter, merges = tmp_path / "merges.gguf", open_model(str(demo_gguf("q4_k_m"))).metadata["tokenizer.ggml.merges"]
    first = next(merge for merge in merges.value if data.count(merge.encode()) == 1 and merge.isascii())
    left, right = first.split(" ")
    swapped = f"{right} {left}"
    assert swapped != first
    shorter.write_bytes(data.replace(first.encode(), swapped.encode()))
    with pytest.raises(
        EvalError, match=r"is the same text, but .*merges\.gguf cuts it into other tokens than demo-bf16"
    ):
        compare(shorter, out, demo_text, context=CONTEXT, chunks=CHUNKS)

    header = read_pack(out).header
    assert header.sizes == {"n_layer": 4, "n_embd": 256}
    out.write_bytes(reseal(out.read_bytes(), lambda fields: fields["sizes"].update(n_layer=7)))
    with pytest.raises(EvalError, match=r"(?s)another model than the one .*n_layer = 4, the pack's reference has 7"):
        compare(demo_gguf("q4_k_m"), out, demo_text, context=CONTEXT, chunks=CHUNKS)


def test_the_command_makes_a_pack(demo_gguf: Recipe, demo_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "ref.pqref"
    arguments = ["reference", str(demo_gguf("bf16")), "--text", str(demo_text), "--out", str(out)]
    arguments += ["--context", "64", "--chunks", "4", "--top-k", "32", "--json"]
    planned = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert not out.exists()
    assert json.loads(planned.stdout)["positions"] == 4 * 31
    made = CliRunner().invoke(app, arguments)
    assert made.exit_code == 0, made.output
    document = json.loads(made.stdout)
    assert document["kind"] == "top"
    assert document["file_bytes"] == out.stat().st_size
    assert document["floor"]["kld_mean"] < 1e-7
    assert str(tmp_path) not in out.read_bytes().decode("latin-1")
    assert CliRunner().invoke(app, [*arguments, "--with-head"]).exit_code == 2
    before = out.read_bytes()
    with pytest.raises(EvalError, match="--top-k 5000"):
        make_reference(demo_gguf("bf16"), [Text("text", demo_text)], out, PackSettings(64, 1, top=5000))
    assert out.read_bytes() == before
    with pytest.raises(EvalError, match="is a reference pack already"):
        make_reference(out, [Text("text", demo_text)], tmp_path / "x", PackSettings(64))

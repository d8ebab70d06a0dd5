"""The real runtime on the embedded model: logits, windows, reports, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_maker import changed

from pocketquant.errors import EvalError, SourceError
from pocketquant.eval import compare, weight_errors
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.llama.runtime import open_runtime
from pocketquant.model import Value

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

PRE = "tokenizer.ggml.pre"

Recipe = Callable[[str], Path]


def test_logits_are_those_of_the_high_level_binding(demo_gguf: Recipe, demo_text: Path) -> None:
    path = demo_gguf("f32")
    text = demo_text.read_text(encoding="utf-8")[:2000]
    peer = llama_cpp.Llama(str(path), n_ctx=256, n_batch=256, logits_all=True, verbose=False)
    with open_runtime(path, context=256, threads=1) as runtime:
        tokens = runtime.tokenize(text)
        assert tokens == peer.tokenize(text.encode(), add_bos=False)
        assert runtime.bos is None
        window = tokens[:200]
        peer.eval(window)
        expected = np.array(peer.scores[:200])
        for _ in range(2):  # a second time to see that memory is emptied
            found = [(start, rows.copy()) for start, rows in runtime.logits(window, first=100)]
            assert found[0][0] == 100
            np.testing.assert_allclose(np.concatenate([rows for _, rows in found]), expected[100:], atol=1e-2)


def test_rows_at_a_time_do_not_matter(demo_gguf: Recipe, demo_text: Path) -> None:
    path = demo_gguf("f32")
    text = demo_text.read_text(encoding="utf-8")[:4000]
    with (
        open_runtime(path, context=512, threads=1) as whole,
        open_runtime(path, context=512, threads=1, rows=64) as few,
    ):
        window = whole.tokenize(text)[:511]
        assert len(window) == 511
        ((start, rows),) = ((start, rows.copy()) for start, rows in whole.logits(window, first=256))
        groups = [(start, rows.copy()) for start, rows in few.logits(window, first=256)]
    assert start == 256
    assert [(start, len(rows)) for start, rows in groups] == [(256, 64), (320, 64), (384, 64), (448, 63)]
    np.testing.assert_allclose(np.concatenate([rows for _, rows in groups]), rows, atol=1e-2)


def test_a_file_does_not_differ_from_itself(demo_gguf: Recipe, demo_text: Path) -> None:
    report = compare(demo_gguf("q8_0"), demo_gguf("q8_0"), demo_text, context=64, chunks=4, threads=2)
    assert report.metrics.kld.max == 0
    assert report.metrics.top1.mean == 1
    assert report.metrics.ppl.ratio == 1
    assert (report.tokens, report.windows, report.non_finite) == (4 * 31, 4, 0)


def test_fewer_bits_lose_more(demo_gguf: Recipe, demo_text: Path) -> None:
    reports = {
        recipe: compare(demo_gguf(recipe), demo_gguf("f32"), demo_text, context=128, chunks=24)
        for recipe in ("f32", "q8_0", "q4_k_m")
    }
    kld = {recipe: report.metrics.kld for recipe, report in reports.items()}
    assert kld["f32"].max == 0
    assert 0 < kld["q8_0"].mean + 5 * kld["q8_0"].se < kld["q4_k_m"].mean < 0.1
    assert kld["q4_k_m"].median < kld["q4_k_m"].mean < kld["q4_k_m"].p99 <= kld["q4_k_m"].max
    assert reports["q4_k_m"].metrics.top1.mean < reports["q8_0"].metrics.top1.mean < 1
    assert reports["q8_0"].metrics.ppl.reference == pytest.approx(reports["f32"].metrics.ppl.model, rel=1e-6)
    assert reports["q4_k_m"].metrics.ppl.ratio == pytest.approx(1, abs=0.05)


def test_a_report_repeats_and_names_its_sources(demo_gguf: Recipe, demo_text: Path) -> None:
    def run(threads: int) -> dict[str, object]:
        report = compare(
            demo_gguf("q4_k_m"), demo_gguf("f32"), demo_text, context=64, chunks=6, threads=threads, seed=3
        )
        return replace(report, provenance=replace(report.provenance, threads=0)).to_json()

    first = run(2)
    assert json.dumps(first) == json.dumps(run(2))
    assert json.dumps(first, sort_keys=True).count(str(demo_text.parent)) == 0
    provenance = first["provenance"]
    assert provenance["model"]["size"] == demo_gguf("q4_k_m").stat().st_size
    assert provenance["corpus"]["name"] == demo_text.name
    assert {"pocketquant", "llama_cpp", "numpy", "python"} <= set(provenance["versions"])


def test_weights_lose_where_the_format_rounds(demo_gguf: Recipe) -> None:
    reference = open_gguf(demo_gguf("f32"))
    errors = weight_errors(open_gguf(demo_gguf("q4_k_m")), reference)
    assert [error.name for error in errors] == [tensor.name for tensor in open_gguf(demo_gguf("q4_k_m")).tensors]
    for error in errors:
        if error.format == "F32":
            assert (error.snr_db, error.max_abs_error) == (None, 0)
        else:
            assert error.snr_db > 18
            assert error.cosine > 0.99
            assert 0 < error.relative_rmse < 0.13
    assert {"Q4_K", "Q6_K"} <= {error.format for error in errors}


def test_files_that_do_not_load_are_refused_with_the_reason(demo_gguf: Recipe, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="no such file"):
        open_runtime(tmp_path / "absent.gguf", context=64)
    whole = demo_gguf("q8_0").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"cut\.gguf: broken tensor table"):
        open_runtime(cut, context=64)
    odd = changed(
        demo_gguf("q8_0"), tmp_path / "odd.gguf", lambda parts: parts.metadata.update({PRE: Value("str", "odd")})
    )
    with pytest.raises(EvalError, match=r"odd\.gguf: llama\.cpp cannot load it(?s:.)*\n  llama\.cpp: .*odd"):
        open_runtime(odd, context=64)
    with pytest.raises(EvalError, match="use a context of at most"):
        open_runtime(demo_gguf("q8_0"), context=1 << 30)


def test_texts_that_do_not_fit_are_refused(demo_gguf: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("Only a few words.\n", encoding="utf-8")
    with pytest.raises(EvalError, match="too few for one window of 64"):
        compare(demo_gguf("q8_0"), demo_gguf("q8_0"), path, context=64)
    with pytest.raises(EvalError, match="cannot be read"):
        compare(demo_gguf("q8_0"), demo_gguf("q8_0"), tmp_path / "absent.txt", context=64)


def test_llama_cpp_stays_silent(demo_gguf: Recipe, capfd: pytest.CaptureFixture[str]) -> None:
    with open_runtime(demo_gguf("q8_0"), context=64) as runtime:
        next(iter(runtime.logits(runtime.tokenize("some words to run"))))
    assert capfd.readouterr() == ("", "")

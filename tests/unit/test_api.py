"""What the Python functions refuse; that they work is what the script of docs/python.md shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from statistics_maker import make_statistics

import pocketquant as pq


def test_nothing_is_written_over_what_it_is_made_from(checkpoint: Path, tmp_path: Path) -> None:
    path = make_statistics(pq.open_model(checkpoint), tmp_path / "a.gguf")
    before = path.read_bytes()
    choice = pq.Choice(pq.open_recipe("q4_0"), statistics=pq.open_statistics(path))
    with pytest.raises(pq.PocketquantError, match=r"a\.gguf"):
        pq.quantize(checkpoint, path, choice)
    assert path.read_bytes() == before


def test_only_full_precision_is_converted_to(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(pq.PocketquantError, match="q8_0: bf16, f16 or f32 are full precision"):
        pq.convert_source(checkpoint, tmp_path / "a.gguf", "q8_0")
    (written,) = pq.convert_source(checkpoint, tmp_path / "a.gguf", "f16")
    assert (written.kind, written.path, written.plan.file_bytes) == (
        "model",
        tmp_path / "a.gguf",
        (tmp_path / "a.gguf").stat().st_size,
    )


def test_a_checkpoint_is_compared_with_nothing(checkpoint: Path) -> None:
    with pytest.raises(pq.PocketquantError, match="only a GGUF file can be compared with a source"):
        pq.check_file(checkpoint, source=checkpoint)


def test_an_importance_matrix_that_went_on_leaves_no_state(
    demo_gguf: Callable[[str], Path], demo_text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from pocketquant.calibration.imatrix import collect_importance
    from pocketquant.texts.calibration import CalibrationSettings

    class Cut(BaseException):
        pass

    def cut(done: int, total: int) -> None:
        if done == 2:
            raise Cut

    model, state = demo_gguf("f32"), tmp_path / ".m.gguf.unfinished"
    with pytest.raises(Cut):
        collect_importance(model, demo_text, CalibrationSettings(64, 4), state=state, progress=cut)
    assert state.exists()
    how = pq.CollectSettings(context=64, chunks=4, resume=True)
    pq.imatrix(model, demo_text, tmp_path / "m.gguf", how)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_report_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"schema": "other"}))
    (tmp_path / "limits.toml").write_text("[absolute]\nkld_mean = 0.02\n")
    with pytest.raises(pq.PocketquantError, match=r"report\.json"):
        pq.gate(tmp_path / "report.json", tmp_path / "limits.toml")
    with pytest.raises(pq.PocketquantError, match=r"report\.json"):
        pq.report([tmp_path / "report.json"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_texts_may_be_paths(demo_gguf: Callable[[str], Path], demo_text: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    how = pq.EvalSettings(context=64, chunks=2)
    reports = [pq.evaluate(demo_gguf("q4_0"), demo_gguf("f32"), texts, how) for texts in (demo_text, [demo_text])]
    assert reports[0].metrics == reports[1].metrics

"""Reports: numbers from positions, JSON, Markdown."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pocketquant.errors import EvalError
from pocketquant.eval.metrics import POSITION, Positions
from pocketquant.eval.report import FileIdentity, Provenance, identify, list_versions, summarize

FROM = Provenance(
    model=FileIdentity("model.gguf", 10, "aa"),
    reference=FileIdentity("reference.gguf", 20, "bb"),
    corpus=FileIdentity("text.txt", 30, "cc"),
    vocabulary="dd",
    text_tokens=9999,
    context=64,
    chunks=None,
    seed=7,
    threads=2,
    gpu_layers=0,
    versions={"python": "3.12.0"},
)


def make_positions(n_window: int, n: int = 31) -> Positions:
    random = np.random.default_rng(n_window)
    positions = np.zeros((n_window, n), POSITION)
    positions["kld_nats"] = random.exponential(0.01, (n_window, n))
    positions["nll_reference_nats"] = random.exponential(2, (n_window, n))
    positions["nll_model_nats"] = positions["nll_reference_nats"] + random.normal(0.01, 0.1, (n_window, n))
    positions["is_same_top"] = random.random((n_window, n)) < 0.9
    positions["is_finite_model"] = positions["is_finite_reference"] = True
    return positions


def test_metrics_are_the_plain_statistics() -> None:
    positions = make_positions(40)
    report = summarize(positions, FROM)
    kld = positions["kld_nats"].ravel()
    metrics = report.metrics
    assert metrics.kld.mean == pytest.approx(kld.mean())
    assert (metrics.kld.median, metrics.kld.p99) == pytest.approx(np.quantile(kld, [0.5, 0.99]))
    assert metrics.kld.max == kld.max()
    assert metrics.top1.mean == pytest.approx(positions["is_same_top"].mean())
    assert metrics.ppl.model == pytest.approx(np.exp(positions["nll_model_nats"].mean()))
    assert metrics.ppl.reference == pytest.approx(np.exp(positions["nll_reference_nats"].mean()))
    assert metrics.ppl.ratio == pytest.approx(metrics.ppl.model / metrics.ppl.reference)
    # paired: the ratio is known far better than either
    assert 0 < metrics.ppl.ratio_se < metrics.ppl.model_se / 5
    assert (report.tokens, report.windows, report.clusters, report.cluster_unit) == (1240, 40, 40, "window")


def test_broken_positions_move_no_metric() -> None:
    positions = make_positions(30)
    positions["is_finite_model"][:, 4] = False
    positions["is_finite_reference"][2, :6] = False
    report = summarize(positions, FROM)
    kept = np.delete(positions, 4, axis=1)
    kld = np.delete(kept["kld_nats"].ravel(), [60, 61, 62, 63, 64])  # window 2, five more of its positions
    assert report.metrics.kld.mean == pytest.approx(kld.mean())
    assert (report.tokens, report.non_finite) == (930, 35)
    assert (report.non_finite_model, report.non_finite_reference) == (30, 6)
    assert "Not finite at 35 positions" in report.to_markdown()
    assert "Not finite" not in summarize(make_positions(30), FROM).to_markdown()
    positions["is_finite_reference"] = False
    with pytest.raises(EvalError, match="none of 930 positions"):
        summarize(positions, FROM)


def test_json_has_the_promised_fields_and_survives_a_round_trip() -> None:
    report = summarize(make_positions(25), FROM)
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found == report.to_json()
    assert found["schema"] == "pocketquant.report/1"
    assert set(found["metrics"]["kld"]) == {"mean", "se", "median", "median_se", "p99", "p99_se", "max"}
    assert set(found["metrics"]["top1"]) == {"mean", "se"}
    sides = {"model", "reference", "ratio"}
    assert set(found["metrics"]["ppl"]) == sides | {f"{side}_se" for side in sides}
    assert found["provenance"]["model"] == {"name": "model.gguf", "size": 10, "sha256": "aa"}


def test_equal_seeds_give_equal_reports() -> None:
    positions = make_positions(25)
    assert summarize(positions, FROM) == summarize(positions, FROM)
    other = summarize(positions, replace(FROM, seed=8))
    assert other.metrics.kld.se != summarize(positions, FROM).metrics.kld.se
    assert other.metrics.kld.mean == summarize(positions, FROM).metrics.kld.mean


def test_one_window_gets_errors_from_blocks_and_one_position_none() -> None:
    report = summarize(make_positions(1), FROM)
    assert (report.cluster_unit, report.clusters) == ("block", 20)
    assert report.metrics.kld.se > 0
    alone = summarize(make_positions(1, 1), FROM)
    assert alone.metrics.kld.se is None
    assert alone.metrics.ppl.ratio_se is None
    assert "| perplexity, ratio |" in alone.to_markdown()


def test_numbers_beyond_json_become_none() -> None:
    positions = make_positions(25)
    positions["nll_model_nats"] = 1e5
    report = summarize(positions, FROM)
    assert report.metrics.ppl.model == np.inf
    assert report.to_json()["metrics"]["ppl"]["model"] is None
    assert report.metrics.ppl.model_se is None


def test_files_are_identified_by_content(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"pocket" * 300_000)
    assert identify(path) == FileIdentity("weights.bin", 1_800_000, hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(EvalError, match="cannot be read"):
        identify(tmp_path / "absent")


def test_versions_name_what_numbers_depend_on() -> None:
    assert set(list_versions()) == {"python", "pocketquant", "numpy", "numba"}

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
from pocketquant.eval.report.markdown import to_markdown
from pocketquant.eval.report.schema import Provenance, ScoredText, measure_noise, summarize
from pocketquant.extras import list_versions
from pocketquant.gguf_file.identity import FileIdentity, identify, identify_all

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
    positions["n_above_top"] = random.geometric(0.4, (n_window, n)) - 1
    positions["variation"] = random.beta(1, 20, (n_window, n))
    positions["top_reference"] = random.beta(2, 2, (n_window, n))
    positions["n_bytes"] = random.integers(1, 9, (n_window, n))
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
    assert metrics.kld.p90 == pytest.approx(np.quantile(kld, 0.9))
    assert metrics.kld.p999 == pytest.approx(np.quantile(kld, 0.999))
    assert metrics.top5.mean == pytest.approx((positions["n_above_top"] < 5).mean())
    assert metrics.tv.mean == pytest.approx(positions["variation"].mean())
    assert metrics.tv.acceptance == pytest.approx(1 - positions["variation"].mean())
    nll_model, nll_reference = positions["nll_model_nats"].ravel(), positions["nll_reference_nats"].ravel()
    change = np.exp(-nll_model) - np.exp(-nll_reference)
    assert metrics.delta_p.mean == pytest.approx(change.mean())
    assert metrics.delta_p.rms == pytest.approx(np.sqrt((change**2).mean()))
    assert (metrics.delta_p.p1, metrics.delta_p.p75) == pytest.approx(np.quantile(change, [0.01, 0.75]))
    assert metrics.bpb.model == pytest.approx(nll_model.sum() / np.log(2) / positions["n_bytes"].sum())
    assert metrics.bpb.difference == pytest.approx(metrics.bpb.model - metrics.bpb.reference)
    assert 0 < metrics.bpb.difference_se < metrics.bpb.model_se / 5
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
    assert "Not finite at 35 positions" in to_markdown(report)
    assert "Not finite" not in to_markdown(summarize(make_positions(30), FROM))
    positions["is_finite_reference"] = False
    with pytest.raises(EvalError, match="none of 930 positions"):
        summarize(positions, FROM)


def test_json_has_the_promised_fields_and_survives_a_round_trip() -> None:
    report = summarize(make_positions(25), FROM)
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found == report.to_json()
    assert found["schema"] == "pocketquant.report/1"
    metrics = found["metrics"]
    assert set(metrics) == {"kld", "top1", "top5", "tv", "delta_p", "ppl", "bpb"}
    quantiles = {"median", "p90", "p99", "p999"}
    assert set(metrics["kld"]) == {"mean", "se", "max"} | quantiles | {f"{name}_se" for name in quantiles}
    assert set(metrics["top1"]) == set(metrics["top5"]) == {"mean", "se"}
    assert set(metrics["tv"]) == {"mean", "se", "acceptance"}
    changes = {"rms", *(f"p{percent}" for percent in (1, 5, 10, 25, 50, 75, 90, 95, 99))}
    assert set(metrics["delta_p"]) == {"mean", "se"} | changes | {f"{name}_se" for name in changes}
    for name, third in (("ppl", "ratio"), ("bpb", "difference")):
        sides = {"model", "reference", third}
        assert set(metrics[name]) == sides | {f"{side}_se" for side in sides}
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
    assert "| perplexity, ratio |" in to_markdown(alone)


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


def test_confidence_buckets_hold_every_position_once() -> None:
    positions = make_positions(40)
    positions["top_reference"][0, :2] = [1.0, 0.2]
    report = summarize(positions, FROM)
    top, kld = positions["top_reference"].ravel(), positions["kld_nats"].ravel()
    assert sum(bucket.tokens for bucket in report.by_confidence) == 1240
    for bucket in report.by_confidence:
        chosen = (top >= bucket.low) & ((top < bucket.high) | (bucket.high == 1))
        assert bucket.tokens == chosen.sum()
        assert bucket.kld == pytest.approx(kld[chosen].mean())
        if chosen.sum() > 50:
            assert bucket.kld_se == pytest.approx(kld[chosen].std() / np.sqrt(chosen.sum()), rel=0.5)
    # a resample of the windows may well hold none of a few positions, and then there is no error to state
    assert [bucket.kld_se is None for bucket in report.by_confidence if bucket.tokens < 10] == [True]


def test_position_buckets_double_and_see_a_drift() -> None:
    curve = make_positions(30, 100)
    curve["kld_nats"] *= 1 + np.arange(100)
    curve["is_finite_model"][:, 20] = False
    report = summarize(curve[:, 50:], FROM, curve=curve)
    assert [(bucket.low, bucket.high) for bucket in report.by_position] == [(0, 16), (16, 32), (32, 64), (64, 100)]
    assert [bucket.tokens for bucket in report.by_position] == [480, 450, 960, 1080]
    klds = [bucket.kld for bucket in report.by_position]
    assert klds == sorted(klds)
    assert klds[0] == pytest.approx(curve["kld_nats"][:, :16].mean())
    assert report.tokens == 30 * 50
    assert "| 64 to 99 | 1080 |" in to_markdown(report)


def test_domains_are_their_own_windows() -> None:
    positions = make_positions(30)
    positions["is_finite_model"][10:13] = False
    file = FileIdentity("x.txt", 1, "ee")
    texts = [ScoredText("a", file, 900, 10), ScoredText("broken", file, 300, 3), ScoredText("b", file, 1600, 17)]
    report = summarize(positions, FROM, texts=texts)
    first, broken, last = report.by_domain
    assert first.metrics == summarize(positions[:10], FROM).metrics
    assert last.metrics.kld.mean == pytest.approx(positions["kld_nats"][13:].mean())
    assert (broken.metrics, broken.non_finite, broken.tokens) == (None, 93, 93)
    assert "| broken | 93 |  |" in to_markdown(report)
    (alone,) = summarize(positions[:10], FROM, texts=texts[:1]).by_domain
    assert alone.metrics == first.metrics


def test_a_noise_floor_stands_beside_the_numbers() -> None:
    quiet = make_positions(5)
    quiet["kld_nats"] /= 1000
    floor = measure_noise(quiet, 48, 0)
    assert floor is not None
    report = summarize(make_positions(25), FROM, noise_floor=floor)
    (line,) = [line for line in to_markdown(report).splitlines() if line.startswith("| KL divergence, mean")]
    assert line.endswith(f"| {quiet['kld_nats'].mean():.6g} |")
    assert json.loads(json.dumps(report.to_json()))["noise_floor"]["metrics"]["kld"]["mean"] == floor.metrics.kld.mean
    quiet["is_finite_model"] = False
    assert measure_noise(quiet, 48, 0) is None


def test_lengths_that_are_not_known_leave_out_bits_per_byte() -> None:
    positions = make_positions(25)
    positions["n_bytes"] = 0
    report = summarize(positions, FROM)
    assert report.metrics.bpb is None
    assert report.to_json()["metrics"]["bpb"] is None
    assert "bits per byte" not in to_markdown(report)


def test_several_files_are_one_by_the_digest_of_their_digests() -> None:
    one, two = FileIdentity("a", 1, "aa"), FileIdentity("b", 2, "bb")
    assert identify_all([one]) == one
    assert identify_all([one, two]) == FileIdentity("a, b", 3, hashlib.sha256(b"aa\nbb\n").hexdigest())

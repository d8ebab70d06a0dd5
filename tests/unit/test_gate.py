"""The gate: limits, intervals, decisions, what it prints, and reports that are not what they should be."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from pocketquant.errors import EvalError, SourceError
from pocketquant.eval import intervals
from pocketquant.eval.gate.decide import decide, read_report
from pocketquant.eval.gate.limits import ABSOLUTE, BASELINE, parse_limits, read_limits
from pocketquant.eval.gate.output import describe_moved, table, to_json, to_junit, verdict_to_markdown
from pocketquant.eval.gate.report_diff import find_moved
from pocketquant.eval.gate.verdict import FAILED, PASS, UNDECIDED, Decision, Verdict
from pocketquant.eval.kernels import FLOOR
from pocketquant.eval.metrics import POSITION, Positions
from pocketquant.eval.report.evidence import sum_clusters
from pocketquant.eval.report.reading import COLUMNS, Evidence, parse_report
from pocketquant.eval.report.schema import Provenance, ScoredText, summarize
from pocketquant.gguf_file.identity import FileIdentity
from pocketquant.llama.kernels import NAMES, differing

FILE = FileIdentity("text.txt", 30, "cc")


def make_positions(seed: int, n_window: int, scale: float, n: int = 20) -> Positions:
    """Windows unlike one another, as texts are; equal seeds are equal texts, `scale` is how bad the model is."""
    random = np.random.default_rng(seed)
    hard = random.lognormal(0, 0.5, (n_window, 1))
    found = np.zeros((n_window, n), POSITION)
    found["kld_nats"] = scale * hard * random.exponential(0.01, (n_window, n))
    found["variation"] = found["kld_nats"] / 2
    found["nll_reference_nats"] = random.exponential(2, (n_window, n))
    found["nll_model_nats"] = found["nll_reference_nats"] + found["kld_nats"]
    found["is_same_top"] = random.random((n_window, n)) < 1 - 0.05 * scale
    found["n_above_top"] = np.where(found["is_same_top"], 0, 7)
    found["n_bytes"] = 4
    found["is_finite_model"] = found["is_finite_reference"] = True
    return found


def make_report(scale: float = 1.0, seed: int = 0, n_window: int = 100, **changes: Any) -> Evidence:
    provenance = Provenance(
        model=FileIdentity("model.gguf", 10, f"{scale}"),
        reference=FileIdentity("reference.gguf", 20, "bb"),
        corpus=FILE,
        vocabulary="dd",
        text_tokens=9999,
        context=41,
        chunks=None,
        seed=7,
        threads=2,
        gpu_layers=0,
        versions={},
        model_metadata={"general.name": f"{scale}", "tokenizer.chat_template": "ee"},
    )
    texts = [ScoredText("prose", FILE, 900, n_window // 2, f"p{seed}")]
    texts.append(ScoredText("code", FILE, 900, n_window - n_window // 2, f"c{seed}"))
    data = summarize(make_positions(seed, n_window, scale), provenance, texts=texts).to_json()
    data["provenance"] |= changes
    return parse_report(json.loads(json.dumps(data)), "report.json")


def decide_one(report: Evidence, accepted: Evidence | None = None, /, **limits: dict[str, float]) -> Decision:
    (decision,) = [
        each
        for each in decide(report, parse_limits(limits, "limits"), accepted).decisions
        if each.limit not in ("absolute.non_finite", "baseline.metadata")
    ]
    return decision


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("tail", "degrees", "expected"),
    [(0.025, 1, 12.7062), (0.025, 5, 2.57058), (0.0005, 10, 4.58689), (0.001, 30, 3.38518), (0.001, 9999, 3.09023)],
)
def test_quantiles_are_those_of_the_tables(tail: float, degrees: int, expected: float) -> None:
    assert intervals.student_quantile(tail, degrees) == pytest.approx(expected, rel=1e-3)


def test_the_ratios_interval_ends_where_the_difference_is_just_significant() -> None:
    random = np.random.default_rng(0)
    sizes = random.integers(10, 30, 40).astype(float)
    b = sizes * random.lognormal(0, 0.4, 40)
    a = 1.3 * b * random.lognormal(0, 0.1, 40)
    ours, theirs = intervals.share(a, sizes), intervals.share(b, sizes)
    both = np.arange(40)
    cov = intervals.covariance(ours, theirs, both, both)
    low, high = intervals.ratio_interval(ours, theirs, cov, 3.0)
    assert low < ours.value / theirs.value < high
    for end in (low, high):
        assert intervals.ratio_factor(ours, theirs, cov, 3.0, end) == pytest.approx(1)
    wide = intervals.ratio_interval(ours, theirs, 0.0, 3.0)
    assert wide[0] < low < high < wide[1]
    assert intervals.ratio_interval(ours, theirs, 0.0, 100.0) == (-math.inf, math.inf)
    assert intervals.ratio_interval(*2 * (intervals.share(a[:1], sizes[:1]),), 0.0, 3.0) == (-math.inf, math.inf)


def test_a_file_with_its_own_baseline_is_exactly_as_good() -> None:
    report = make_report()
    decision = decide_one(report, report, baseline={"kld_mean_ratio": 1})
    assert (decision.outcome, decision.low, decision.high) == (PASS, pytest.approx(1), pytest.approx(1))
    assert decision.note == ""


@pytest.mark.parametrize("paired", [True, False])
def test_chance_fails_no_more_files_than_stated(paired: bool) -> None:
    """Files whose true loss is at the limit, with few windows and long tails: the worst honest case."""
    wrong, runs = 0, 2000
    random = np.random.default_rng(1)
    tail = 0.05
    t = intervals.student_quantile(tail, 24)
    tokens, every = np.full(25, 20.0), np.arange(25)
    for _ in range(runs):
        text, other = random.lognormal(0, 1, (2, 25))
        ours, theirs = random.lognormal(0, 0.3, (2, 25))
        a = intervals.share(text * ours * tokens, tokens)
        b = intervals.share((text if paired else other) * theirs * tokens, tokens)
        cov = intervals.covariance(a, b, every, every) if paired else 0.0
        wrong += intervals.ratio_interval(a, b, cov, t)[0] > 1
    assert wrong / runs < tail * 1.3  # three standard errors of the count above what is stated


# ---------------------------------------------------------------- decisions


def test_three_outcomes_against_full_precision() -> None:
    report = make_report()
    mean = report.number("metrics", "kld", "mean")
    for bound, outcome in ((mean * 2, PASS), (mean / 2, FAILED), (mean * 1.01, UNDECIDED), (mean * 0.99, UNDECIDED)):
        decision = decide_one(report, absolute={"kld_mean": bound})
        assert decision.outcome == outcome
        assert decision.found == mean
        assert (decision.tokens_needed is not None) == (outcome == UNDECIDED)
    for bound, outcome in ((0.8, PASS), (0.999, FAILED), (report.number("metrics", "top1", "mean"), UNDECIDED)):
        assert decide_one(report, absolute={"top1": bound}).outcome == outcome


def test_three_outcomes_against_a_baseline() -> None:
    baseline = make_report()
    assert decide_one(make_report(1.0), baseline, baseline={"kld_mean_ratio": 1.05}).outcome == PASS
    assert decide_one(make_report(1.2), baseline, baseline={"kld_mean_ratio": 1.05}).outcome == FAILED
    assert decide_one(make_report(1.2), baseline, baseline={"kld_mean_ratio": 1.25}).outcome == PASS
    assert decide_one(make_report(1.2), baseline, baseline={"tv_mean_ratio": 1.05}).outcome == FAILED
    assert decide_one(make_report(1.2), baseline, baseline={"bpb_rise": 1e-5}).outcome == FAILED
    assert decide_one(make_report(3), baseline, baseline={"top1_drop": 0.02}).outcome == FAILED
    assert decide_one(make_report(3), baseline, baseline={"top5_drop": 0.2}).outcome == PASS
    assert decide_one(make_report(3), baseline, baseline={"kld_p99_ratio": 1.2}).outcome == FAILED
    unpaired = decide_one(make_report(1.2, seed=5), baseline, baseline={"kld_mean_ratio": 1.05})
    assert unpaired.outcome == UNDECIDED
    assert unpaired.note.startswith("other tokens")


def test_the_stated_number_of_tokens_decides() -> None:
    baseline, report = make_report(seed=1), make_report(1.15, seed=2)
    decision = decide_one(report, baseline, baseline={"kld_mean_ratio": 1.05})
    assert decision.outcome == UNDECIDED
    assert decision.tokens_needed > decision.tokens
    repeats = math.ceil(1.05 * decision.tokens_needed / decision.tokens)
    pair = []
    for each in (report, baseline):
        data = copy.deepcopy(dict(each.data))
        for text in data["sums"]:
            text |= {key: value * repeats for key, value in text.items() if isinstance(value, list)}
        pair.append(parse_report(data, "longer.json"))
    assert decide_one(*pair, baseline={"kld_mean_ratio": 1.05}).outcome != UNDECIDED


def test_more_limits_make_each_more_careful() -> None:
    report = make_report()
    alone = decide_one(report, absolute={"kld_mean": 1})
    every = {"kld_mean": 1, "kld_p99": 1, "top1": 0.1, "ppl_ratio": 2, "tv_mean": 1}
    together = decide(report, parse_limits({"absolute": every}, "limits")).decisions[0]
    assert together.high > alone.high > alone.found


def test_undecided_fails_only_where_that_was_asked_for() -> None:
    report = make_report()
    absolute = {"kld_mean": report.number("metrics", "kld", "mean")}
    lenient = decide(report, parse_limits({"absolute": absolute}, "limits"))
    assert (lenient.is_accepted, lenient.count(UNDECIDED)) == (True, 1)
    assert "1 undecided (not counted as broken)" in lenient.summary
    assert "no amount of text will decide it" in verdict_to_markdown(lenient, None)
    assert not decide(report, parse_limits({"absolute": absolute}, "limits"), strict=True).is_accepted
    assert not decide(report, parse_limits({"absolute": absolute, "undecided": "fail"}, "limits")).is_accepted


def test_domains_are_decided_one_by_one() -> None:
    baseline = make_report()
    data = copy.deepcopy(dict(baseline.data))
    data["sums"][1]["kld"] = [3 * value for value in data["sums"][1]["kld"]]
    report = parse_report(data, "report.json")
    verdict = decide(report, parse_limits({"baseline": {"domain_kld_mean_ratio": 1.5}}, "limits"), baseline)
    outcomes = {each.limit: each.outcome for each in verdict.decisions}
    assert outcomes["baseline.domain_kld_mean_ratio[code]"] == FAILED
    assert outcomes["baseline.domain_kld_mean_ratio[prose]"] == PASS
    assert [(each.domain, each.ratio) for each in find_moved(report, baseline).domains] == [("code", pytest.approx(3))]
    del data["sums"][1]
    verdict = decide(parse_report(data, "r"), parse_limits({"baseline": {"domain_kld_mean_ratio": 9}}, "l"), baseline)
    (missing,) = [each for each in verdict.decisions if each.outcome == FAILED]
    assert missing.limit == "baseline.domain_kld_mean_ratio[code]"
    found = decide(report, parse_limits({"absolute": {"domain_top1": 0.2, "domain_kld_mean": 9}}, "limits"))
    assert [each.limit for each in found.decisions if "[code]" in each.limit] == [
        "absolute.domain_top1[code]",
        "absolute.domain_kld_mean[code]",
    ]


def test_broken_numbers_fail_unless_allowed() -> None:
    data = dict(make_report().data) | {"non_finite_model": 2}
    report = parse_report(data, "report.json")
    assert not decide(report, parse_limits({"absolute": {"kld_mean": 1}}, "limits")).is_accepted
    assert decide(report, parse_limits({"absolute": {"kld_mean": 1, "non_finite": 2}}, "limits")).is_accepted


def tensor(name: str, rmse: float | None, largest: float, **changes: Any) -> dict[str, Any]:
    known = {"role": name.split(".")[2], "layer": int(name[4]), "format": "Q4_K", "weights": 100, "cosine": 0.9}
    return {"name": name, "sha256": f"{rmse}", "relative_rmse": rmse, "max_abs_error": largest} | known | changes


def with_tensors(*tensors: dict[str, Any]) -> Evidence:
    return parse_report(dict(make_report().data) | {"tensors": list(tensors)}, "report.json")


def test_tensors_are_exact_and_named() -> None:
    names = "blk.0.ffn_up.weight", "blk.1.ffn_up.weight", "blk.1.attn_norm.weight"
    baseline = with_tensors(tensor(names[0], 0.07, 0.1), tensor(names[1], 0.07, 0.1), tensor(names[2], 0.0, 0.0))
    worse = with_tensors(
        tensor(names[0], 0.07, 0.1), tensor(names[1], 0.14, 0.9, format="Q3_K"), tensor(names[2], None, 1.0)
    )
    limits = {"tensor_rmse_ratio": 1.2, "tensor_max_error_ratio": 2}
    found = {each.limit: each for each in decide(worse, parse_limits({"baseline": limits}, "l"), baseline).decisions}
    ratio = found["baseline.tensor_rmse_ratio"]
    assert (ratio.outcome, ratio.tokens) == (FAILED, 0)
    assert ratio.note == f"{names[2]}, {names[1]}; lossless in the baseline: {names[2]}"
    same = decide(baseline, parse_limits({"baseline": limits, "absolute": {"tensor_rmse": 0.08}}, "l"), baseline)
    assert same.is_accepted
    assert decide_one(worse, absolute={"tensor_rmse": 0.08}).note == f"{names[2]}, {names[1]}"
    moved = find_moved(worse, baseline)
    assert [(each.name, each.growth) for each in moved.tensors] == [(names[2], math.inf), (names[1], pytest.approx(9))]
    assert [each.role for each in moved.roles] == ["attn_norm", "ffn_up"]
    text = "\n".join(describe_moved(moved))
    assert "tensor blk.1.ffn_up.weight (ffn_up, layer 1): changed, Q4_K -> Q3_K, relative error 0.07 -> 0.14" in text
    with pytest.raises(EvalError, match="says nothing about tensors"):
        decide_one(make_report(), absolute={"tensor_rmse": 1})
    assert "tensors: not known" in describe_moved(find_moved(make_report(), baseline))[-1]


def test_metadata_is_compared_but_for_where_a_file_is_from() -> None:
    baseline = make_report()
    metadata = {"general.name": "other", "tokenizer.chat_template": "ff"}
    report = make_report(model_metadata=metadata)
    limits: dict[str, Any] = {"kld_mean_ratio": 1.05}
    verdict = decide(report, parse_limits({"baseline": limits}, "limits"), baseline)
    assert [each.limit for each in verdict.decisions if each.outcome == FAILED] == ["baseline.metadata"]
    assert "tokenizer.chat_template" in verdict_to_markdown(verdict, None)
    assert find_moved(report, baseline).metadata == ("tokenizer.chat_template",)
    limits["allow_metadata"] = ["tokenizer.chat_template"]
    assert decide(report, parse_limits({"baseline": limits}, "limits"), baseline).is_accepted


# ---------------------------------------------------------------- what is refused


def test_reports_of_different_things_are_refused_by_name() -> None:
    limits = parse_limits({"baseline": {"kld_mean_ratio": 1.05}}, "limits")
    pack = {"kind": "top", "top": 64, "model": {"name": "other.gguf", "sha256": "9" * 64}}
    other = make_report(context=64, vocabulary="xx", like="llama-perplexity", reference_pack=pack)
    with pytest.raises(EvalError) as caught:
        decide(other, limits, make_report())
    for name in ("vocabulary", "context", "rounding like", "kind of reference", "reference: other.gguf (999999999999)"):
        assert name in str(caught.value)
    # a pack of hidden states gives the numbers of the file behind it
    same = {"kind": "states", "model": {"name": "reference.gguf", "sha256": "bb"}}
    assert decide(make_report(reference_pack=same), limits, make_report()).is_accepted
    with pytest.raises(EvalError, match="no baseline; give --baseline"):
        decide(make_report(), limits)


def test_limits_that_are_not_understood_are_refused_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "limits.toml"
    path.write_text(
        'confidence = 2\nundecided = "maybe"\nmore = 1\n[absolute]\nkld_meen = 1\nkld_mean = true\ntop1 = 95\n'
        "kld_p99 = nan\n[baseline]\nkld_mean_ratio = 0.9\nallow_metadata = 3\n"
    )
    with pytest.raises(EvalError) as caught:
        read_limits(path)
    text = str(caught.value)
    for fault in ("confidence = 2", "'maybe'", "more: not known", "[absolute] kld_meen: not known; there is: kld_mean"):
        assert fault in text
    for fault in ("kld_mean = True", "top1 = 95", "kld_p99 = nan", "kld_mean_ratio = 0.9", "allow_metadata = 3"):
        assert fault in text
    path.write_text("[absolute]\n")
    with pytest.raises(EvalError, match="no limit at all"):
        read_limits(path)
    path.write_text("absolute = 3\n")
    with pytest.raises(EvalError, match="a table of limits"):
        read_limits(path)
    path.write_text("= 3")
    with pytest.raises(EvalError, match="not valid TOML"):
        read_limits(path)
    path.write_text("#" * 70_000)
    with pytest.raises(EvalError, match="larger than"):
        read_limits(path)
    with pytest.raises(EvalError, match="cannot be read"):
        read_limits(tmp_path / "absent.toml")


def test_every_limit_can_be_decided() -> None:
    tensors = [tensor("blk.0.ffn_up.weight", 0.07, 0.1)]
    report = with_tensors(*tensors)
    limits = {"absolute": dict.fromkeys(ABSOLUTE, 0.5), "baseline": dict.fromkeys(BASELINE, 1)}
    verdict = decide(report, parse_limits(limits, "limits"), report)
    decided = {each.limit.partition("[")[0] for each in verdict.decisions}
    assert decided == {f"absolute.{key}" for key in ABSOLUTE} | {f"baseline.{key}" for key in [*BASELINE, "metadata"]}


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "other/1"},
        {"metrics": 3},
        {"sums": 3},
        {"sums": [3]},
        {"sums": [{"domain": "x"}]},
        {"sums": [{name: [1, 2] if name == "kld" else [1] for name in COLUMNS}]},
        {"sums": [{name: [10**400] for name in COLUMNS}]},
        {"tensors": [{"name": 3}]},
        {"tensors": [tensor("blk.0.ffn_up.weight", 0.1, 0.1) | {"layer": "x"}]},
        {"tensors": "x"},
    ],
)
def test_reports_that_are_none_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    data = dict(make_report().data) | change
    path = tmp_path / "report.json"
    path.write_text(json.dumps(data))
    with pytest.raises(EvalError, match=r"report\.json: (no report|damaged|values of another kind)"):
        read_report(path)


def test_numbers_that_are_missing_are_named(tmp_path: Path) -> None:
    data = copy.deepcopy(dict(make_report().data))
    data["metrics"]["kld"]["se"] = None
    data["metrics"]["bpb"] = None
    data.pop("sums")
    report = parse_report(data, "report.json")
    for key, name in {"kld_mean": "metrics.kld.se", "bpb_difference": "metrics.bpb.difference"}.items():
        with pytest.raises(EvalError, match=f"report.json: {name} is None"):
            decide_one(report, absolute={key: 1})
    with pytest.raises(EvalError, match="no sums by window"):
        decide_one(report, report, baseline={"kld_mean_ratio": 1.05})
    path = tmp_path / "report.json"
    path.write_text("{")
    with pytest.raises(SourceError, match="broken JSON"):
        read_report(path)


# ---------------------------------------------------------------- what is kept and printed


def test_sums_are_those_of_the_metrics() -> None:
    positions = make_positions(3, 30, 1.0)
    positions["is_finite_model"][4, :5] = False
    found = sum_clusters(positions, "prose", "digest")
    kept = positions[positions["is_finite_model"]]
    assert (sum(found.tokens), len(found.tokens), found.tokens[4]) == (595, 30, 15)
    assert sum(found.kld) == pytest.approx(kept["kld_nats"].sum())
    assert sum(found.top1) == kept["is_same_top"].sum()
    assert sum(found.bytes) == 4 * 595
    # few windows are cut into blocks
    few = sum_clusters(positions[:3], "prose", "")
    assert (len(few.tokens), sum(few.tokens)) == (21, 60)
    assert sum(few.kld[7:14]) == pytest.approx(positions["kld_nats"][1].sum())


def test_a_verdict_is_json_junit_and_markdown() -> None:
    report, baseline = make_report(1.3), make_report()
    limits = {"absolute": {"kld_mean": 1, "kld_p99": 0.0}, "baseline": {"kld_mean_ratio": 1.05, "top1_drop": 0.02}}
    verdict: Verdict = decide(report, parse_limits(limits, "limits"), baseline)
    moved = find_moved(report, baseline)
    data = json.loads(json.dumps(to_json(verdict, moved), allow_nan=False))
    assert data["schema"] == "pocketquant.gate/1"
    assert data["is_accepted"] is False
    assert data["baseline"] == {"name": "model.gguf", "sha256": "1.0"}
    outcomes = {each["limit"]: each["outcome"] for each in data["decisions"]}
    assert outcomes["absolute.kld_p99"] == outcomes["baseline.kld_mean_ratio"] == FAILED
    suite = ElementTree.fromstring(to_junit(verdict, moved))
    assert (suite.get("tests"), suite.get("failures")) == ("6", str(verdict.count(FAILED)))
    assert len(suite.findall("testcase")) == 6
    assert "domain prose" in (suite.find("testcase/failure").text or "")
    text = verdict_to_markdown(verdict, moved)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 7
    assert all(line.count("|") == 7 for line in rows)
    assert rows[1].startswith("| absolute.kld_p99 | ❌ fail |")
    assert "window by window" in text
    assert [row[1] for row in table(verdict)] == sorted((row[1] for row in table(verdict)), key="fup".find)


# ---------------------------------------------------------------- kernels

ONE = {"llama_cpp_features": "CPU : AVX2 = 1", "llama_cpp_kernels": "CPU", "llama_cpp_batch": "512"}
OTHER = {**ONE, "llama_cpp_extra_kernels": "not used"}


def test_a_difference_that_kernels_alone_can_make_is_no_regression() -> None:
    accepted = make_report(versions=ONE)
    limits = {"baseline": {"kld_mean_ratio": 1 + FLOOR["kld_mean_ratio"] / 2}}
    assert decide_one(make_report(versions=ONE), accepted, **limits).outcome == PASS
    other = decide_one(make_report(versions=OTHER), accepted, **limits)
    assert (other.outcome, other.tokens_needed) == (UNDECIDED, None)
    assert "other kernels than the baseline's (whether its extra kernels are used): wider by 0.0" in other.note
    worse = decide_one(make_report(1.5, versions=OTHER), accepted, **limits)
    assert worse.outcome == FAILED


@pytest.mark.parametrize("key", sorted(FLOOR))
def test_every_sampled_limit_has_a_floor(key: str) -> None:
    accepted, report = make_report(versions=ONE), make_report(versions=OTHER)
    limits = parse_limits({"baseline": {key: 3.0 if key.endswith("_ratio") else 0.5}}, "limits")
    for decision in decide(report, limits, accepted).decisions:
        assert ("wider by" in decision.note) == (decision.tokens > 0)


def test_one_that_says_nothing_of_its_kernels_counts_as_another() -> None:
    assert differing({}, {}) == []
    assert differing(ONE, ONE) == []
    assert differing(ONE, {}) == [NAMES[key] for key in NAMES if key in ONE]


def test_types_of_one_machine_may_lie_in_other_buffers_and_a_gpu_is_another_machine() -> None:
    assert differing(ONE, {**ONE, "llama_cpp_kernels": "CPU CPU_REPACK"}) == []
    assert differing(ONE, {**ONE, "llama_cpp_kernels": "CPU CUDA0"}) == ["the device"]


def test_every_kind_of_limit_that_is_compared_has_a_floor() -> None:
    assert set(FLOOR) == set(BASELINE) - {"tensor_rmse_ratio", "tensor_max_error_ratio"}

"""The gate on its first day: limits to start with, no baseline yet, reports of `make`; packs of top tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_gate import make_report
from typer.testing import CliRunner

from pocketquant.cli.app import app
from pocketquant.errors import EvalError
from pocketquant.eval.gate.decide import decide, read_report
from pocketquant.eval.gate.limits import parse_limits, read_limits
from pocketquant.eval.gate.output import verdict_to_markdown
from pocketquant.eval.gate.verdict import PASS

TENSOR = {"name": "blk.0.ffn_up.weight", "role": "ffn_up", "layer": 0, "format": "Q4_K", "cosine": 0.99, "snr_db": 20.0}
TENSOR |= {"relative_rmse": 0.1, "max_abs_error": 0.2}
PACK = {"kind": "top", "top": 64, "is_lower_bound": True, "floor": {"captured": 0.8}}


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["gate", *map(str, words)])
    return result.exit_code, f"{result.output} {result.exception}"


def write_report(path: Path, scale: float = 1.0, **changes: Any) -> Path:
    path.write_text(json.dumps(make_report(scale, **changes).data))
    return path


def write_release(path: Path, *scales: float, schema: str = "pocketquant.make/1") -> Path:
    variants = [
        {"recipe": f"q{i}", "file": f"q{i}.gguf", "evaluation": dict(make_report(scale).data), "weights": [TENSOR]}
        for i, scale in enumerate(scales)
    ]
    path.write_text(json.dumps({"schema": schema, "variants": variants}))
    return path


@pytest.mark.parametrize("scale", [1.0, 0.01, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_starters_limits_are_kept_for_certain(scale: float, seed: int, tmp_path: Path) -> None:
    report = write_report(tmp_path / "report.json", scale, seed=seed)
    assert run(report, "--init", tmp_path / "limits.toml")[0] == 0
    limits = read_limits(tmp_path / "limits.toml")
    assert {"kld_mean", "kld_p99", "top1", "domain_kld_mean"} <= limits.absolute.keys()
    verdict = decide(read_report(report), limits, first=True)
    assert {each.outcome for each in verdict.decisions} == {PASS}
    worse = write_report(tmp_path / "worse.json", 3 * scale, seed=seed)
    assert run(worse, "--limits", tmp_path / "limits.toml", "--first")[0] == 1


def test_a_starter_never_replaces_limits(tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text("mine")
    _, said = run(write_report(tmp_path / "report.json"), "--init", tmp_path / "limits.toml")
    assert "exists" in said
    assert (tmp_path / "limits.toml").read_text() == "mine"


def test_a_first_run_needs_no_baseline_and_says_so(tmp_path: Path) -> None:
    report = write_report(tmp_path / "report.json")
    (tmp_path / "limits.toml").write_text("[absolute]\nkld_mean = 1\n[baseline]\nkld_mean_ratio = 1.05\n")
    code, said = run(report, "--limits", tmp_path / "limits.toml", "--first")
    assert code == 0
    assert "1 against a baseline left out: there is none yet" in said
    assert "--first while there is none" in run(report, "--limits", tmp_path / "limits.toml")[1]
    code, said = run(report, "--limits", tmp_path / "limits.toml", "--first", "--baseline", report)
    assert code == 2


@pytest.mark.parametrize("schema", ["pocketquant.make/1", "pocketquant.sweep/1"])
def test_reports_of_make_and_sweep_are_read(schema: str, tmp_path: Path) -> None:
    release = write_release(tmp_path / "report.json", 1.0, 3.0, schema=schema)
    (tmp_path / "limits.toml").write_text(
        "[absolute]\nkld_mean = 0.018\ntensor_rmse = 0.15\n[baseline]\nkld_mean_ratio = 1.05\n"
    )
    options = ("--limits", tmp_path / "limits.toml", "--baseline", release, "--explain")
    code, said = run(release, "--file", "q0.gguf", *options)
    assert (code, "nothing moved" in said) == (0, True), said
    assert run(release, "--file", "q1", *options)[0] == 1
    assert "q0.gguf (q0)" in run(release, *options)[1]
    assert "q0.gguf (q0)" in run(release, "--file", "nope", *options)[1]


def test_a_release_of_one_file_needs_no_name(tmp_path: Path) -> None:
    release = write_release(tmp_path / "report.json", 1.0)
    assert read_report(release).tensors is not None
    with pytest.raises(EvalError, match="none to choose"):
        read_report(write_report(tmp_path / "one.json"), "q0")


def test_a_lower_bound_is_called_one() -> None:
    limits = {"kld_mean": 1, "kld_p99": 9, "tv_mean": 1, "top1": 0.1, "domain_kld_mean": 1, "domain_top1": 0.1}
    for pack, expected in ((PACK, {"kld_mean", "kld_p99", "tv_mean", "domain_kld_mean"}), (None, set())):
        verdict = decide(make_report(reference_pack=pack), parse_limits({"absolute": limits}, "limits"))
        said = {each.limit.split(".")[1].split("[")[0] for each in verdict.decisions if "a lower bound" in each.note}
        assert said == expected
    assert "a lower bound: the reference keeps the 64 most likely tokens" in verdict_to_markdown(
        decide(make_report(reference_pack=PACK), parse_limits({"absolute": limits}, "limits")), None
    )

"""Benchmarks on local task files: the embedded model knows something, quantization flips a little, damage a lot."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from math import comb
from pathlib import Path
from typing import Any

import gguf
import pytest
from task_maker import write_tasks

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

COMMAND = """
import sys
from pocketquant.cli import main
try:
    main()
finally:
    assert not {"torch", "transformers"} & set(sys.modules)
"""
ITEMS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), items=ITEMS)


def run(folder: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    # the shortest way for a hub that cannot be reached, and a cache that is not the user's
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == code, result.stderr
    return result


def compare(folder: Path, model: Path, reference: Path, tasks: str, *more: object) -> dict[str, Any]:
    options = ("--include-path", folder, "--threads", 1, "--context", 256, "--json", "--quiet")
    return json.loads(run(folder, "tasks", model, "--reference", reference, "--tasks", tasks, *options, *more).stdout)


@pytest.fixture(scope="module")
def report(folder: Path, demo_gguf: Callable[[str], Path]) -> dict[str, Any]:
    out = folder / "report.json"
    found = compare(folder, demo_gguf("q4_0"), demo_gguf("f32"), "cloze,next_word,whole_text", "--out", out)
    assert json.loads(out.read_text(encoding="utf-8")) == found
    return found


def results(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(each["task"], each["metric"]): each for each in report["results"]}


def test_the_model_gets_more_right_than_guessing_would(report: dict[str, Any]) -> None:
    right = round(results(report)["cloze", "acc"]["answers"]["reference"] * ITEMS)
    by_chance = sum(comb(ITEMS, n) * 0.25**n * 0.75 ** (ITEMS - n) for n in range(right, ITEMS + 1))
    assert by_chance < 1e-4
    assert results(report)["next_word", "exact_match (first-word)"]["answers"]["reference"] > 0.05


def test_four_bits_cost_this_model_nothing_that_shows(report: dict[str, Any]) -> None:
    for answers in (each["answers"] for each in report["results"] if each["answers"]):
        assert answers["items"] == ITEMS
        assert answers["lost"] + answers["gained"] < ITEMS / 10
        assert answers["p_value"] > 0.01
        assert 0 < answers["smallest_effect"] < 0.15


def test_measures_that_are_numbers_are_compared_by_their_mean(report: dict[str, Any]) -> None:
    difference, error = results(report)["whole_text", "ln p a byte"]["mean_difference"]
    assert -0.01 < difference < 0  # Q4_0 costs this model 0.006 nats a token
    assert 0 < error < 0.005


def test_the_report_says_what_was_run(report: dict[str, Any], demo_gguf: Callable[[str], Path]) -> None:
    from pocketquant.files.reading import sha256_of

    assert report["schema"] == "pocketquant.tasks/1"
    assert report["model"]["sha256"] == sha256_of(demo_gguf("q4_0"))
    assert report["reference"]["sha256"] == sha256_of(demo_gguf("f32"))
    assert set(report["tasks"]) == {"cloze", "next_word", "whole_text"}
    assert len(set(report["tasks"].values())) == 3
    assert report["versions"]["lm_eval"]
    cost = report["cost"]["model"]
    assert cost["requests"] == 6 * ITEMS
    assert cost["decoded_tokens"] < 0.6 * cost["asked_tokens"]


@pytest.fixture(scope="module")
def damage(folder: Path, demo_gguf: Callable[[str], Path]) -> dict[str, Any]:
    """The report on a file whose second matrices of each block have their rows in the wrong order."""
    damaged = folder / "damaged.gguf"
    shutil.copy(demo_gguf("f32"), damaged)
    reader = gguf.GGUFReader(damaged, "r+")
    for tensor in reader.tensors:
        if tensor.name.endswith(("ssm_out.weight", "ffn_down.weight")):
            tensor.data[:] = tensor.data[::-1].copy()
    reader.data.flush()
    return compare(folder, damaged, demo_gguf("f32"), "cloze")


def test_damage_shows(damage: dict[str, Any]) -> None:
    answers = results(damage)["cloze", "acc"]["answers"]
    assert answers["items"] == ITEMS
    assert answers["p_value"] < 0.01
    assert answers["lost"] > answers["gained"]


def test_flips_are_listed_item_by_item(damage: dict[str, Any], folder: Path) -> None:
    data = [json.loads(line) for line in (folder / "cloze.jsonl").read_text(encoding="utf-8").splitlines()]
    result = results(damage)["cloze", "acc"]
    answers, flips = result["answers"], result["flips"]
    assert answers["lost"] + answers["gained"] == len(flips) > 0
    assert answers["difference"] == pytest.approx((answers["gained"] - answers["lost"]) / ITEMS)
    for flip in flips:
        item = data[flip["item"]]
        right = f" {item['choices'][item['label']]}"
        assert flip["question"] == item["context"][-300:]
        assert (flip["reference"] if flip["was_lost"] else flip["model"]) == right
        assert (flip["model"] if flip["was_lost"] else flip["reference"]) != right


def test_a_file_against_itself_flips_nothing(folder: Path, demo_gguf: Callable[[str], Path]) -> None:
    same = results(compare(folder, demo_gguf("f32"), demo_gguf("f32"), "cloze", "--limit", 10))["cloze", "acc"]
    assert (same["answers"]["lost"], same["answers"]["gained"], same["answers"]["p_value"]) == (0, 0, 1)


def test_examples_and_chat_templates_are_put_before_a_question(folder: Path, demo_gguf: Callable[[str], Path]) -> None:
    options = ("--limit", 3, "--num-fewshot", 2, "--chat")
    report = compare(folder, demo_gguf("q4_0"), demo_gguf("f32"), "cloze", *options)
    plain = compare(folder, demo_gguf("q4_0"), demo_gguf("f32"), "cloze", "--limit", 3)
    assert report["uses_chat_template"] is True
    assert report["num_fewshot"] == 2
    assert report["cost"]["model"]["asked_tokens"] > 2 * plain["cost"]["model"]["asked_tokens"]
    assert report["tasks"]["cloze"] != plain["tasks"]["cloze"]


def test_a_dry_run_states_the_cost(folder: Path, report: dict[str, Any], demo_gguf: Callable[[str], Path]) -> None:
    arguments = ("tasks", demo_gguf("q4_0"), "--reference", demo_gguf("f32"), "--tasks", "cloze", "--context", 256)
    result = run(folder, *arguments, "--include-path", folder, "--dry-run", "--json")
    cost = json.loads(result.stdout)
    assert cost["requests"] == 4 * ITEMS
    assert cost["decoded_tokens"] < cost["asked_tokens"]
    assert f"{cost['decoded_tokens']} tokens" in result.stderr


def test_what_cannot_be_run_is_refused_with_advice(folder: Path, demo_gguf: Callable[[str], Path]) -> None:
    files = (demo_gguf("f32"), "--reference", demo_gguf("f32"), "--threads", 1, "--context", 128)
    for tasks, *messages in (
        ("arc_easy", "task arc_easy", "cannot be reached from here", "--include-path DIR"),
        ("arc_eesy,hellaswig", "arc_eesy: did you mean arc_easy", "hellaswig: did you mean hellaswag"),
        ("humaneval", "task humaneval", ""),
    ):
        result = run(folder, "tasks", *files, "--tasks", tasks, code=2)
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        assert all(message in result.stderr for message in messages), result.stderr


def test_a_reference_that_is_quantized_is_called_one(folder: Path, demo_gguf: Callable[[str], Path]) -> None:
    files = (demo_gguf("q4_0"), "--reference", demo_gguf("q8_0"))
    some = ("--tasks", "cloze", "--include-path", folder, "--context", 256, "--limit", 2)
    for arguments in (("smoke", *files, "--max-tokens", 2), ("tasks", *files, *some)):
        for options in ((), ("--json",)):
            result = run(folder, *arguments, "--threads", 1, *options)
            assert re.search(r"note: .*is itself quantized \(\d+ % Q8_0\)", result.stderr)
        assert re.fullmatch(r"\d+ % Q8_0", json.loads(result.stdout)["reference_quantized"])


def test_smoke_counts_faults_against_the_reference(folder: Path, demo_gguf: Callable[[str], Path]) -> None:
    files = (demo_gguf("q4_0"), "--reference", demo_gguf("f32"))
    report = json.loads(run(folder, "smoke", *files, "--threads", 1, "--max-tokens", 40, "--json", "--quiet").stdout)
    assert report["schema"] == "pocketquant.smoke/1"
    assert len(report["answers"]) == 24
    # it has never seen JSON, and both of its files fail at it alike
    invalid = report["faults"]["invalid_json"]
    assert (invalid["model"], invalid["reference"], invalid["p_value"]) == (4 / 24, 4 / 24, 1)
    for prompt, ours, theirs in report["answers"]:
        assert ("invalid_json" in ours["faults"]) == prompt["is_json"]
        assert theirs["text"]

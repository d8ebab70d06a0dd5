"""The gate on the embedded model: five planted regressions are caught and named, honest re-runs raise no alarm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.demo import checkpoint_dir, text_path
from pocketquant.eval import compare
from pocketquant.eval.gate.decide import decide
from pocketquant.eval.gate.limits import parse_limits
from pocketquant.eval.gate.report_diff import Moved, find_moved
from pocketquant.eval.gate.verdict import FAILED, Decision, Verdict
from pocketquant.eval.metrics import Positions
from pocketquant.eval.report.evidence import describe_tensors, digest_stream
from pocketquant.eval.report.reading import Evidence, parse_report
from pocketquant.eval.report.schema import Provenance, ScoredText, summarize
from pocketquant.eval.windows import score_windows
from pocketquant.formats import FORMATS
from pocketquant.gguf_file.identity import FileIdentity
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.gguf_file.reading import read_header
from pocketquant.llama.runtime import open_runtime
from pocketquant.model import Value
from pocketquant.quant.recipe import Rule
from pocketquant.texts.corpus import Corpus, Text, cut_corpus
from pocketquant.texts.embedded import domain_texts

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

CONTEXT = 128
CHUNKS = 24
LIMITS = {
    "absolute": {"kld_mean": 0.02, "top1": 0.85},
    "baseline": {
        "kld_mean_ratio": 1.05,
        "top1_drop": 0.01,
        "domain_kld_mean_ratio": 1.25,
        "tensor_rmse_ratio": 1.25,
        "tensor_max_error_ratio": 2,
    },
}
OUTPUTS_ONLY = {
    "absolute": {"kld_mean": 0.02, "kld_p99": 0.2, "top1": 0.85, "ppl_ratio": 1.1},
    "baseline": {"kld_mean_ratio": 1.05, "kld_p99_ratio": 1.2, "tv_mean_ratio": 1.05, "top1_drop": 0.01},
}
"""Limits on what a model says: those that chance could break."""


@dataclass(frozen=True)
class Gate:
    """The reference, the accepted file, and its report."""

    reference: Path
    accepted: Path
    baseline: Evidence

    def judge(self, candidate: Path) -> tuple[Verdict, Moved]:
        report = measure(candidate, self.reference)
        return decide(report, parse_limits(LIMITS, "limits"), self.baseline), find_moved(report, self.baseline)


def measure(model: Path, reference: Path) -> Evidence:
    """What `eval --weights --json` prints, read back."""
    texts = [Text("held out", text_path("evaluation")), *(each for each in domain_texts() if each.domain == "dialogue")]
    report = compare(model, reference, texts, context=CONTEXT, chunks=CHUNKS, threads=2)
    report = replace(report, tensors=describe_tensors(open_gguf(model), open_gguf(reference)))
    return parse_report(json.loads(json.dumps(report.to_json())), model.name)


@pytest.fixture(scope="module")
def gate(demo_gguf: Callable[[str], Path]) -> Gate:
    reference, accepted = demo_gguf("f32"), demo_gguf("q4_k_m")
    return Gate(reference, accepted, measure(accepted, reference))


def patched(path: Path, target: Path, name: str, change: Callable[[np.ndarray], None]) -> Path:
    """A copy with the bytes of one tensor changed, u8[rows, bytes of a row], and nothing else."""
    data = np.fromfile(path, np.uint8)
    (entry,) = [each for each in read_header(path).tensors if each.name == name]
    rows = data[entry.offset : entry.offset + entry.nbytes].reshape(-1, entry.format.row_bytes(entry.shape[-1]))
    before = rows.copy()
    change(rows)
    assert (before != rows).any()
    data.tofile(target)
    return target


def lines(verdict: Verdict) -> set[str]:
    return {decision.limit for decision in verdict.decisions if decision.outcome == FAILED}


def test_the_accepted_file_itself_passes(gate: Gate) -> None:
    verdict, moved = gate.judge(gate.accepted)
    assert verdict.is_accepted
    assert not lines(verdict)
    assert verdict.is_paired == "yes"
    ratio = _ratio(verdict)
    assert (ratio.found, ratio.low, ratio.high) == pytest.approx((1, 1, 1))
    assert (moved.tensors, moved.roles, moved.domains, moved.metadata) == ((), (), (), ())


def test_a_permuted_head_is_caught_and_named(gate: Gate, tmp_path: Path) -> None:
    def swap_heads(rows: np.ndarray) -> None:
        # 4 query heads, each with 64 rows and as many of its gate
        rows[:] = rows.reshape(4, -1, rows.shape[1])[[0, 2, 1, 3]].reshape(rows.shape)

    verdict, moved = gate.judge(patched(gate.accepted, tmp_path / "head.gguf", "blk.3.attn_q.weight", swap_heads))
    assert {"baseline.kld_mean_ratio", "baseline.tensor_rmse_ratio"} <= lines(verdict)
    assert [(each.name, each.role, each.layer) for each in moved.tensors] == [("blk.3.attn_q.weight", "attn_q", 3)]
    assert [each.role for each in moved.roles] == ["attn_q"]
    assert {each.domain for each in moved.domains} == {"held out", "dialogue"}


def test_a_tensor_at_three_bits_is_caught_and_named(gate: Gate, tmp_path: Path) -> None:
    recipe = open_recipe("q4_k_m")
    starved = next(tensor.role for tensor in open_gguf(gate.accepted).tensors if tensor.name == "blk.1.ssm_out.weight")
    rule = Rule(FORMATS["Q3_K"], "a mistake", roles=frozenset({starved}), layers=("1",))
    write(plan(open_model(checkpoint_dir()), replace(recipe, rules=(rule, *recipe.rules))), tmp_path / "three.gguf")
    verdict, moved = gate.judge(tmp_path / "three.gguf")
    assert {"baseline.kld_mean_ratio", "baseline.tensor_rmse_ratio"} <= lines(verdict)
    (tensor,) = moved.tensors
    assert (tensor.name, tensor.formats) == ("blk.1.ssm_out.weight", ("Q4_K", "Q3_K"))
    assert tensor.growth == pytest.approx(tensor.rmse[1] / tensor.rmse[0], rel=0.5)
    assert [each.role for each in moved.roles] == ["delta_out"]


def test_a_wrong_norm_is_caught_and_named(gate: Gate, tmp_path: Path) -> None:
    def forget_one(rows: np.ndarray) -> None:
        rows.view("<f4")[:] -= 1

    target = patched(gate.accepted, tmp_path / "norm.gguf", "blk.2.post_attention_norm.weight", forget_one)
    verdict, moved = gate.judge(target)
    assert {"baseline.kld_mean_ratio", "baseline.tensor_rmse_ratio", "absolute.kld_mean"} <= lines(verdict)
    (tensor,) = moved.tensors
    assert (tensor.name, tensor.role, tensor.growth) == ("blk.2.post_attention_norm.weight", "norm", np.inf)


def test_a_swapped_scale_is_caught_and_named(gate: Gate, tmp_path: Path) -> None:
    def swap_scales(rows: np.ndarray) -> None:
        # a block of Q4_K starts with the f16 scale of its scales
        scales = rows.reshape(-1, 144)[:, :2].copy().view("<f2").ravel()
        low, high = int(scales.argmin()), int(scales.argmax())
        blocks = rows.reshape(-1, 144)
        blocks[[low, high], :2] = blocks[[high, low], :2]

    verdict, moved = gate.judge(patched(gate.accepted, tmp_path / "scale.gguf", "blk.0.ffn_gate.weight", swap_scales))
    assert "baseline.tensor_max_error_ratio" in lines(verdict)
    (tensor,) = moved.tensors
    assert (tensor.name, tensor.role) == ("blk.0.ffn_gate.weight", "ffn_gate")
    assert tensor.growth == pytest.approx(tensor.largest[1] / tensor.largest[0])


def test_a_changed_chat_template_is_caught_and_named(gate: Gate, tmp_path: Path) -> None:
    model = open_model(checkpoint_dir())
    key = "tokenizer.chat_template"
    template = model.metadata[key].value.replace("<|im_start|>", "### ")
    assert template != model.metadata[key].value
    metadata = dict(model.metadata) | {key: Value("str", template)}
    write(plan(replace(model, metadata=metadata), open_recipe("q4_k_m")), tmp_path / "chat.gguf")
    verdict, moved = gate.judge(tmp_path / "chat.gguf")
    assert "baseline.metadata" in lines(verdict)
    assert moved.metadata == (key,)
    assert moved.tensors == ()
    assert [(each.domain, each.same_tokens) for each in moved.domains] == [("dialogue", False)]
    assert verdict.is_paired == "in part"
    allowed = parse_limits({"baseline": {"kld_mean_ratio": 1.3, "allow_metadata": [key]}}, "limits")
    report = measure(tmp_path / "chat.gguf", gate.reference)
    assert decide(report, allowed, gate.baseline).is_accepted


# ---------------------------------------------------------------- honest re-runs


@dataclass(frozen=True)
class Rerun:
    """Two builds of equal quality, scored once on all windows of the long text."""

    corpus: Corpus
    scored: Mapping[str, Positions]

    def report(self, name: str, windows: np.ndarray) -> Evidence:
        """The report that `compare` would have given for these windows alone."""
        provenance = Provenance(
            model=FileIdentity(f"{name}.gguf", 1, name),
            reference=FileIdentity("f32.gguf", 1, "f32"),
            corpus=FileIdentity("text", 1, "text"),
            vocabulary="same",
            text_tokens=windows.size,
            context=CONTEXT,
            chunks=None,
            seed=0,
            threads=2,
            gpu_layers=0,
            versions={},
        )
        stream = digest_stream(self.corpus.windows[windows])
        text = ScoredText("held out", provenance.corpus, windows.size, len(windows), stream)
        report = summarize(self.scored[name][windows], provenance, texts=[text])
        return parse_report(report.to_json(), name)


@pytest.fixture(scope="module")
def rerun(demo_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Rerun:
    folder = tmp_path_factory.mktemp("rerun")
    text = text_path("calibration").read_text(encoding="utf-8")
    builds = {}
    for name, part in {"one": text[:8_000], "two": text[-8_000:]}.items():
        (folder / f"{name}.txt").write_text(part, encoding="utf-8")
        matrix, builds[name] = folder / f"{name}.imatrix.gguf", folder / f"{name}.gguf"
        run("imatrix", demo_gguf("f32"), "--text", folder / f"{name}.txt", "--context", 128, "--out", matrix, "-q")
        options = ["--recipe", "q4_k_m", "--imatrix", matrix, "--rounding", "none", "-q"]
        run("quantize", checkpoint_dir(), "--out", builds[name], *options)
    scored = {}
    with open_runtime(demo_gguf("f32"), context=CONTEXT, threads=1) as reference:
        corpus = cut_corpus(text_path("evaluation"), reference, context=CONTEXT, chunks=140)
        for name, path in builds.items():
            with open_runtime(path, context=CONTEXT, threads=1) as model:
                with reference.twin(threads=1) as second, model.twin(threads=1) as twin:
                    found = score_windows(model, reference, corpus, n_threads=2, twins=(twin, second))
            found["n_bytes"] = 4
            scored[name] = found
    return Rerun(corpus, scored)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("pocketquant")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_fifty_honest_reruns_raise_no_alarm(rerun: Rerun) -> None:
    n = len(rerun.corpus.windows)
    limits = parse_limits(OUTPUTS_ONLY, "limits")
    draws = [np.sort(np.random.default_rng(seed).choice(n, 60, replace=False)) for seed in range(51)]
    accepted = rerun.report("one", draws[50])
    paired, unpaired = [], []
    for windows in draws[:50]:
        again = rerun.report("two", windows)
        paired.append(decide(again, limits, rerun.report("one", windows)))
        unpaired.append(decide(again, limits, accepted))
    assert [verdict.is_paired for verdict in paired + unpaired] == ["yes"] * 50 + ["no"] * 50
    assert [lines(verdict) for verdict in paired + unpaired if not verdict.is_accepted] == []
    # and that is no empty promise: on the same tokens the ratio is known far better
    known, guessed = ([_ratio(verdict) for verdict in verdicts] for verdicts in (paired, unpaired))
    widths, wide = ([ratio.high - ratio.low for ratio in ratios] for ratios in (known, guessed))
    assert max(widths) < 0.2
    assert 3 * np.median(widths) < np.median(wide)
    assert all(ratio.tokens_needed is None or ratio.tokens_needed > ratio.tokens for ratio in known + guessed)


def test_limits_at_the_truth_itself_raise_no_alarm(rerun: Rerun) -> None:
    """The hardest honest case: nothing to spare."""
    n = len(rerun.corpus.windows)
    whole = {name: rerun.report(name, np.arange(n)) for name in ("one", "two")}
    truth = {name: report.number("metrics", "kld", "mean") for name, report in whole.items()}
    ratio = max(truth["two"] / truth["one"], 1.0)
    limits = parse_limits({"absolute": {"kld_mean": truth["two"]}, "baseline": {"kld_mean_ratio": ratio}}, "limits")
    for seed in range(50):
        mine, other = np.random.default_rng(seed).choice(n, (2, 40), replace=True)
        again = rerun.report("two", mine)
        assert decide(again, limits, rerun.report("one", mine)).is_accepted
        assert decide(again, limits, rerun.report("one", other)).is_accepted


def _ratio(verdict: Verdict) -> Decision:
    return next(each for each in verdict.decisions if each.limit == "baseline.kld_mean_ratio")


# ---------------------------------------------------------------- the command


def test_the_command_exits_with_what_it_found(gate: Gate, tmp_path: Path) -> None:
    def forget_one(rows: np.ndarray) -> None:
        rows.view("<f4")[:] -= 1

    norm = patched(gate.accepted, tmp_path / "norm.gguf", "blk.2.post_attention_norm.weight", forget_one)
    limits = tmp_path / "limits.toml"
    limits.write_text("[absolute]\nkld_mean = 0.02\n[baseline]\nkld_mean_ratio = 1.05\n")
    for name, model in {"good": gate.accepted, "bad": norm}.items():
        options = ["--reference", gate.reference, "--text", text_path("evaluation"), "--context", CONTEXT]
        done = run("eval", model, *options, "--chunks", 24, "--weights", "--json", "-q")
        (tmp_path / f"{name}.json").write_text(done.stdout)
    against = ["--limits", limits, "--baseline", tmp_path / "good.json"]
    command = [str(Path(sys.executable).with_name("pocketquant")), "gate"]
    outputs = ["--explain", "--junit", tmp_path / "junit.xml", "--markdown", tmp_path / "summary.md", "--json"]

    def judge(report: str, *more: object) -> tuple[int, str, str]:
        arguments = [*command, tmp_path / report, *against, *more]
        done = subprocess.run([*map(str, arguments)], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    assert judge("good.json")[0] == 0
    code, out, talk = judge("bad.json", *outputs)
    found: dict[str, Any] = json.loads(out)
    assert (code, found["is_accepted"]) == (1, False)
    assert "2 broken" in talk
    assert found["moved"]["tensors"][0]["name"] == "blk.2.post_attention_norm.weight"
    assert "❌" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert 'failures="2"' in (tmp_path / "junit.xml").read_text(encoding="utf-8")
    limits.write_text("[absolute]\nkld_meen = 0.02\n")
    code, out, talk = judge("good.json")
    assert (code, out) == (2, "")
    assert "kld_meen: not known; there is: kld_mean" in talk

"""`pocketquant calibrate` on the embedded model: against sums known otherwise, in groups, interrupted, with experts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from moe_checkpoint import golden_checkpoint
from rounded_inputs import rounding_errors

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.calibration.importance import importance_of
from pocketquant.calibration.statistics import check_statistics, open_statistics
from pocketquant.demo import checkpoint_dir, text_path
from pocketquant.errors import EvalError
from pocketquant.formats import FORMATS
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.quant.prediction import PredictSettings, predict_losses
from pocketquant.quant.recipe_text import recipe_of_types
from pocketquant.texts.calibration import CalibrationSettings, cut_texts

pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")

from pocketquant.calibration.imatrix import collect_importance
from pocketquant.calibration.statistics_run import collect_statistics, plan_statistics
from pocketquant.eval import compare
from pocketquant.llama.observing import Matmul, Observer
from pocketquant.llama.runtime import open_runtime

COMMAND = str(Path(sys.executable).with_name("pocketquant"))
TEXT = text_path("calibration")
CONTEXT, CHUNKS = 64, 3


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def stats(demo_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stats") / "demo.stats"
    collect_statistics(demo_gguf("f32"), [TEXT], out, CalibrationSettings(CONTEXT, CHUNKS, threads=1))
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return out


def test_the_diagonal_is_the_importance_matrix(stats: Path, demo_gguf: Callable[[str], Path]) -> None:
    statistics = open_statistics(stats)
    sums, _ = collect_importance(demo_gguf("f32"), TEXT, CalibrationSettings(CONTEXT, CHUNKS, threads=1))
    importance = importance_of(sums).weights
    assert statistics.shared.keys() == importance.keys()
    assert statistics.tokens == CONTEXT * CHUNKS
    for name, squares in importance.items():
        moment = statistics.input(name)
        assert moment is not None
        np.testing.assert_allclose(np.diag(moment), squares, rtol=1e-4, atol=1e-9, err_msg=name)
        np.testing.assert_array_equal(moment, moment.T)
        assert np.linalg.eigvalsh(moment.astype(np.float64))[0] > -1e-5 * np.trace(moment), name
    check_statistics(statistics, open_model(checkpoint_dir()).tensors)  # of the checkpoint, not only of its GGUF
    assert not statistics.has_outputs


def test_the_head_is_what_the_logits_say(stats: Path, demo_gguf: Callable[[str], Path]) -> None:
    statistics = open_statistics(stats)
    head = statistics.head()
    assert head is not None
    model = demo_gguf("f32")
    windows, _, _ = cut_texts(model, [TEXT], CalibrationSettings(CONTEXT, CHUNKS, threads=1))
    with open_runtime(model, context=CONTEXT, threads=1) as runtime:
        logits = np.concatenate([rows.copy() for window in windows for _, rows in runtime.logits(window.tolist())])
    p = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(statistics.array("head/variance"), (p * (1 - p)).mean(axis=0), rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(head.frequency, np.bincount(windows.reshape(-1), minlength=p.shape[1]) / windows.size)
    # a logit is a row of the matrix times the hidden state, so the logits' moments tell those of the hidden states
    rows = next(tensor for tensor in open_gguf(model).tensors if tensor.name == "token_embd.weight").rows(0, 9)
    for group in (0, 5, head.n_group - 1):
        of_group = head.row_group == group
        weights = (p * (1 - p))[:, of_group].mean(axis=1)
        expected = (logits[:, :9].T.astype(np.float64) * weights) @ logits[:, :9] / len(logits)
        np.testing.assert_allclose(rows @ head.hessian(group) @ rows.T, expected, rtol=2e-3, atol=1e-3 * expected.max())


class Inputs:
    """Keeps all inputs of every weight of the blocks, those of experts by expert, and the output matrix's."""

    def __init__(self, model: Path) -> None:
        self.rows: dict[tuple[str, int], list[np.ndarray]] = {}
        observer = Observer(self)
        windows, _, _ = cut_texts(model, [TEXT], CalibrationSettings(CONTEXT, CHUNKS, threads=1))
        with open_runtime(model, context=CONTEXT, threads=1, observe=observer.see) as runtime:
            for window in windows:
                for _ in runtime.logits(window.tolist()):
                    pass

    def wants(self, weight: str) -> bool:
        return weight.startswith("blk.")

    def is_past(self, weight: str) -> bool:
        return False

    def wants_hidden(self) -> bool:
        return True

    def add_hidden(self, hidden: np.ndarray) -> None:
        self.rows.setdefault(("head", 0), []).append(hidden.copy())

    def add(self, product: Matmul) -> None:
        inputs = product.inputs
        if product.chosen is None:
            self.rows.setdefault((product.weight, 0), []).append(inputs.reshape(-1, inputs.shape[3]).copy())
            return
        for token, experts in enumerate(product.chosen):
            for place, expert in enumerate(experts):
                row = inputs[0, token, place % inputs.shape[2]].copy()
                self.rows.setdefault((product.weight, int(expert)), []).append(row[None])

    def check(self, key: tuple[str, int], found: np.ndarray) -> None:
        rows = np.concatenate(self.rows[key])
        n_cols = rows.shape[1]
        for ours, block in zip(found, (256, 32), strict=True):
            expected = rounding_errors(rows, block if n_cols % block == 0 else n_cols, is_half=block == 32) / len(rows)
            np.testing.assert_allclose(ours, expected, rtol=1e-5, err_msg=str(key))


def test_rounding_errors_are_those_of_the_inputs(stats: Path, demo_gguf: Callable[[str], Path]) -> None:
    statistics, inputs = open_statistics(stats), Inputs(demo_gguf("f32"))
    assert {name for name, _ in inputs.rows} == {*statistics.shared, "head"}
    for name in statistics.shared:
        inputs.check((name, 0), statistics.rounding(name))
    inputs.check(("head", 0), statistics.head_rounding())


@pytest.mark.parametrize("kind", ["Q6_K", "Q8_0"])
def test_what_kernels_lose_beside_the_head_is_predicted(
    kind: str, demo_gguf: Callable[[str], Path], demo_text: Path, tmp_path: Path
) -> None:
    source, name = demo_gguf("f32"), "token_embd.weight"
    collect_statistics(source, [TEXT], tmp_path / "s", CalibrationSettings(256, 8, threads=1))
    model, statistics = open_gguf(source), open_statistics(tmp_path / "s")
    bare, whole = (
        predict_losses(
            model, statistics, PredictSettings(rounding=None, formats=("Q4_K", kind), activations=flag)
        ).losses[name][kind]
        for flag in (False, True)
    )
    types = {(t.role, t.layer): FORMATS[kind if t.name == name else "F32"] for t in model.tensors if not t.keep_f32}
    write(plan(model, recipe_of_types("one", "one", types, "one")), tmp_path / "native.gguf", threads=1)
    write(plan(open_gguf(tmp_path / "native.gguf"), open_recipe("f32")), tmp_path / "decoded.gguf", threads=1)
    report = compare(tmp_path / "native.gguf", tmp_path / "decoded.gguf", demo_text, context=256, chunks=12, threads=1)
    assert 0.5 < report.metrics.kld.mean / (whole - bare) < 2, (report.metrics.kld, whole - bare)


def test_in_one_pass_or_in_many_the_file_is_the_same(
    stats: Path, demo_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    small = 6 << 20
    passes = plan_statistics(open_gguf(demo_gguf("f32")), memory_bytes=small).passes
    assert len(passes) > 5
    assert max(one.sum_bytes for one in passes) <= small
    collect_statistics(
        demo_gguf("f32"), [TEXT], tmp_path / "s", CalibrationSettings(CONTEXT, CHUNKS, threads=1), memory_bytes=small
    )
    assert (tmp_path / "s").read_bytes() == stats.read_bytes()
    with pytest.raises(EvalError, match="too few for the largest matrix; give 4718592 or more"):
        plan_statistics(open_gguf(demo_gguf("f32")), memory_bytes=1 << 20)


@pytest.mark.parametrize("stop_after", [2, 7, 8])  # in the first pass, behind the second, in the last one
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    stop_after: int, stats: Path, demo_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    seen: list[int] = []

    def collect(stop: int | None, chunks: int = CHUNKS) -> None:
        def count(done: int, _: int) -> None:
            seen.append(done)
            if done == stop:
                raise KeyboardInterrupt

        collect_statistics(
            demo_gguf("f32"),
            [TEXT],
            tmp_path / "s",
            CalibrationSettings(CONTEXT, chunks, threads=1, save_seconds=0),
            memory_bytes=12 << 20,
            resume=True,
            progress=count,
        )

    with pytest.raises(KeyboardInterrupt):
        collect(stop_after)
    assert not (tmp_path / "s").exists()
    with pytest.raises(EvalError, match=r"other settings \(header\)"):
        collect(None, chunks=2)
    del seen[:]
    collect(None)
    assert seen[0] == stop_after - 1  # the last window was interrupted before it was saved
    assert (tmp_path / "s").read_bytes() == stats.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_each_expert_has_the_moments_of_its_own_tokens(tmp_path: Path) -> None:
    model = tmp_path / "moe.gguf"
    write(plan(open_model(golden_checkpoint(tmp_path / "checkpoint")), open_recipe("f32")), model)
    collect_statistics(model, [TEXT], tmp_path / "s", CalibrationSettings(CONTEXT, CHUNKS, threads=1))
    parts = plan_statistics(open_gguf(model), memory_bytes=2_200_000).passes
    assert any(matrices.first for one in parts for matrices in one.ranges), "no tensor's experts are in several passes"
    collect_statistics(
        model, [TEXT], tmp_path / "parts", CalibrationSettings(CONTEXT, CHUNKS, threads=1), memory_bytes=2_200_000
    )
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "s").read_bytes()
    statistics = open_statistics(tmp_path / "s")
    sums, _ = collect_importance(model, TEXT, CalibrationSettings(CONTEXT, CHUNKS, threads=1))
    sizes = open_gguf(model).sizes
    experts = range(sizes["n_expert"])
    for name in ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"):
        for expert in experts:
            moment, count = statistics.input(name, expert), sums.counts[name][expert]
            assert statistics.share(name, expert) == count / (CONTEXT * CHUNKS)
            assert (moment is None) == (count == 0)
            if moment is not None:
                np.testing.assert_allclose(np.diag(moment), sums.sums[name][expert] / count, rtol=1e-4, atol=1e-9)
    inputs = Inputs(model)
    for name in ("blk.0.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"):
        for expert in experts:
            if (name, expert) in inputs.rows:
                inputs.check((name, expert), statistics.rounding(name, expert))
            else:
                assert not statistics.rounding(name, expert).any()
    # every token passes n_expert_used experts, so together they have seen the input of all that many times
    name = "blk.0.ffn_up_exps.weight"
    together = sum(
        statistics.share(name, e) * moment for e in experts if (moment := statistics.input(name, e)) is not None
    )
    shared = statistics.input("blk.0.ffn_up_shexp.weight")
    np.testing.assert_allclose(together, sizes["n_expert_used"] * shared, rtol=1e-3, atol=1e-4)


def test_the_command_takes_a_checkpoint_and_several_texts(tmp_path: Path) -> None:
    text = TEXT.read_text()
    for name, piece in (("a", text[:4000]), ("b", text[4000:8000])):
        (tmp_path / f"{name}.txt").write_text(piece)
    common = ["--context", CONTEXT, "--chunks", 2, "--threads", 1, "--quiet"]
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    both = ["--text", texts[0], "--text", texts[1]]
    cost = json.loads(run("calibrate", checkpoint_dir(), "-o", tmp_path / "ab", "--dry-run", "--json").stdout)
    made = json.loads(run("calibrate", checkpoint_dir(), *both, "-o", tmp_path / "ab", *common, "--json").stdout)
    assert [(item["name"], item["tokens"]) for item in made["texts"]] == [("a.txt", 128), ("b.txt", 128)]
    assert (made["tokens"], made["curvature"], made["experts_without_input"]) == (256, False, 0)
    assert abs(cost["file_bytes"] / made["file_bytes"] - 1) < 0.01
    for path in texts:
        run("calibrate", checkpoint_dir(), "--text", path, "-o", path.with_suffix(".stats"), *common)
    parts = [path.with_suffix(".stats") for path in texts]
    run("calibrate", "--merge", *parts, "-o", tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.txt", "a.stats", "b.stats", "ab", "merged"}
    merged, whole = open_statistics(tmp_path / "merged"), open_statistics(tmp_path / "ab")
    assert (merged.tokens, merged.texts, merged.shared) == (whole.tokens, whole.texts, whole.shared)
    for name in ("blk.0.attn_qkv.weight", "blk.1.ssm_out.weight", "blk.3.attn_v.weight", "blk.2.ffn_down.weight"):
        np.testing.assert_allclose(merged.input(name), whole.input(name), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(merged.rounding(name), whole.rounding(name), rtol=1e-5)
    np.testing.assert_allclose(merged.head_rounding(), whole.head_rounding(), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{model}", "{model}", "-o", "{out}"], "--merge"),
        (["--merge", "{model}", "-o", "{out}"], "no statistics"),
        (["{model}", "--text", "{absent}", "-o", "{out}"], "cannot be read"),
        (["{model}", "--text", "{text}", "--text", "{text}", "--chunks", "1", "-o", "{out}"], "given twice"),
        (["{model}", "--memory", "1MB", "-o", "{out}"], "too few for the largest matrix"),
        (["{model}", "--reference-type", "q8_0", "-o", "{out}"], "f32 or bf16"),
    ],
)
def test_refusals(arguments: list[str], said: str, demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    places = {"model": demo_gguf("f32"), "out": tmp_path / "out", "text": TEXT, "absent": tmp_path / "absent.txt"}
    result = run("calibrate", *(argument.format(**places) for argument in arguments), code=2)
    assert said in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())

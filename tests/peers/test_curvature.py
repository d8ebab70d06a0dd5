"""Gradients against transformers' own, inputs against torch's, and the KL divergence they predict against measured."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from moe_checkpoint import golden_checkpoint

from pocketquant import open_model, open_recipe, write
from pocketquant.calibration.fisher import cost_of_gradients
from pocketquant.calibration.statistics import Statistics, open_statistics
from pocketquant.calibration.statistics_writing import merge_statistics
from pocketquant.demo import checkpoint_dir, text_path
from pocketquant.formats import FORMATS
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.gguf_file.reading import read_header
from pocketquant.quant.planning import plan
from pocketquant.quant.prediction import PredictSettings, predict_losses
from pocketquant.quant.recipe_text import recipe_of_types
from pocketquant.texts.calibration import CalibrationSettings, cut_texts

pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")

from pocketquant.calibration.statistics_run import collect_statistics
from pocketquant.eval import compare

CONTEXT, CHUNKS, WHOLE = 128, 96, 8
N_K, N_V, HEAD_DIM = 2, 4, 64  # the embedded model's


@dataclass(frozen=True)
class Made:
    model: Path
    statistics: Statistics
    few: Statistics
    inputs: Statistics
    whole: dict[str, np.ndarray]


def collect(python: Path, model: Path, checkpoint: Path, folder: Path) -> Made:
    if subprocess.run([python, "-c", "import numba"], capture_output=True).returncode:
        pytest.skip("the interpreter with torch has no numba, which pocketquant needs; pip install numba there")
    text = text_path("calibration")
    windows, _, _ = cut_texts(model, [text], CalibrationSettings(CONTEXT, CHUNKS, threads=1))
    np.save(folder / "windows.npy", windows)
    script, root = Path(__file__).with_name("curvature_run.py"), Path(__file__).parents[2]
    command = [python, script, root, model, checkpoint, folder / "windows.npy", folder, WHOLE]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    collect_statistics(model, [text], folder / "inputs", CalibrationSettings(CONTEXT, CHUNKS, threads=1))
    collect_statistics(model, [text], folder / "few-inputs", CalibrationSettings(CONTEXT, WHOLE, threads=1))
    merge_statistics([folder / "inputs", folder / "gradients"], folder / "all")
    return Made(
        model,
        open_statistics(folder / "all"),
        open_statistics(folder / "few"),
        open_statistics(folder / "few-inputs"),
        dict(np.load(folder / "whole.npz")),
    )


@pytest.fixture(scope="module")
def made(oracle_python: Path, demo_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return collect(oracle_python, demo_gguf("f32"), checkpoint_dir(), tmp_path_factory.mktemp("curvature"))


@pytest.fixture(scope="module")
def experts(oracle_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("experts")
    checkpoint = golden_checkpoint(folder / "checkpoint")
    write(plan(open_model(checkpoint), open_recipe("f32")), folder / "f32.gguf")
    return collect(oracle_python, folder / "f32.gguf", checkpoint, folder)


def tiled(matrix: np.ndarray, size: int, first: int = 0) -> np.ndarray:
    """Value heads [k0v0 k0v1 k1v0 k1v1] -> [k0v0 k1v0 k0v1 k1v1] on both sides, written out."""
    heads = [head * (N_V // N_K) + repeat for repeat in range(N_V // N_K) for head in range(N_K)]
    order = np.concatenate([np.arange(first), *(first + head * size + np.arange(size) for head in heads)])
    return matrix[np.ix_(order, order)]


SAME = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_out": "linear_attn.out_proj",
}
OUTPUTS = {
    "attn_qkv": (HEAD_DIM, 2 * N_K * HEAD_DIM),
    "attn_gate": (HEAD_DIM, 0),
    "ssm_beta": (1, 0),
    "ssm_alpha": (1, 0),
}


def pairs(statistics: Statistics) -> list[tuple[str, str, str]]:
    """(name in GGUF, its short name, name in the checkpoint) of every tensor."""
    return [(n, n.split(".")[2], f"layers.{n.split('.')[1]}.{SAME[n.split('.')[2]]}") for n in statistics.shared]


def close(ours: np.ndarray | None, expected: np.ndarray, name: str) -> None:
    assert ours is not None, name
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max(), err_msg=name)


def test_inputs_are_those_of_torch(made: Made) -> None:
    for name, short, source in pairs(made.inputs):
        expected = made.whole[f"input {source}"]
        close(made.inputs.input(name), tiled(expected, HEAD_DIM) if short == "ssm_out" else expected, name)


def test_gradients_are_those_of_the_whole_model(made: Made) -> None:
    for name, short, source in pairs(made.inputs):
        expected = made.whole[f"output {source}"]
        close(made.few.output(name), tiled(expected, *OUTPUTS[short]) if short in OUTPUTS else expected, name)
    close(made.few.matrix("embed/output"), made.whole["output embed"], "embed")


def test_gradients_of_experts_are_those_of_the_whole_model(experts: Made) -> None:
    n_expert = experts.few.entries["blk.0.ffn_up_exps.weight/output"].shape[0]
    n_tokens, seen = WHOLE * CONTEXT, 0
    for name in experts.inputs.shared:
        layer, short = name.split(".")[1:3]
        if not short.endswith("_exps"):
            continue
        source = f"layers.{layer}.mlp.experts." + ("down_proj" if short == "ffn_down_exps" else "gate_up_proj")
        for expert in range(n_expert):
            expected = experts.whole.get(f"output {source} {expert}")
            if expected is None:
                found = experts.few.output(name, expert)
                assert found is not None
                assert not found.any()
                continue
            half = len(expected) // 2
            if short == "ffn_gate_exps":
                expected = expected[:half, :half]
            elif short == "ffn_up_exps":
                expected = expected[half:, half:]
            close(experts.few.output(name, expert), expected, f"{name} {expert}")
            inputs = experts.whole[f"input {source} {expert}"] / experts.inputs.share(name, expert)
            close(experts.inputs.input(name, expert), inputs, f"{name} {expert}")
            seen += 1
    assert seen > 3 * n_expert
    shared = experts.whole["output layers.1.mlp.shared_expert.down_proj"]
    close(experts.few.output("blk.1.ffn_down_shexp.weight"), shared, "shared expert")
    assert experts.few.array("blk.0.ffn_up_exps.weight/output.count").tolist() == [n_tokens] * n_expert


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("blk.0.ffn_down.weight", 0.8, 1.3),
        ("blk.1.ssm_out.weight", 0.8, 1.3),
        ("blk.1.attn_qkv.weight", 0.8, 1.3),
        ("blk.3.attn_v.weight", 0.8, 2.5),  # its errors add up over the positions that attend to it
    ],
)
def test_predicted_divergence_is_what_is_measured(
    name: str, low: float, high: float, made: Made, tmp_path: Path, demo_text: Path
) -> None:
    predicted, measured = loss_of_rounding(name, made, tmp_path, demo_text)
    assert low < measured / predicted < high, (measured, predicted)


def test_what_gradients_take_in_the_file_is_known_before(made: Made, experts: Made) -> None:
    for each in (made, experts):
        of_file, _ = cost_of_gradients(open_gguf(each.model), set(each.inputs.shared))
        assert of_file == sum(e.nbytes for name, e in each.few.entries.items() if name.endswith("/output"))


# in the last block: an error below another router sends tokens to other experts, which no second derivative sees
@pytest.mark.parametrize("name", ["blk.3.ffn_down_exps.weight", "blk.3.ffn_up_exps.weight"])
def test_predicted_divergence_of_experts_is_what_is_measured(
    name: str, experts: Made, tmp_path: Path, demo_text: Path
) -> None:
    predicted, measured = loss_of_rounding(name, experts, tmp_path, demo_text)
    assert 0.7 < measured / predicted < 1.5, (measured, predicted)


def loss_of_rounding(name: str, made: Made, folder: Path, text: Path) -> tuple[float, float]:
    """KL divergence from one tensor rounded to Q4_K: predicted by the statistics, and measured."""
    tensor = next(tensor for tensor in open_gguf(made.model).tensors if tensor.name == name)
    weights, q4_k = tensor.rows(0, tensor.n_rows), FORMATS["Q4_K"]
    rounded = q4_k.decode(q4_k.encode(weights, None), tensor.n_cols)
    errors = (rounded - weights).astype(np.float64).reshape(-1, *tensor.shape[-2:])
    predicted = 0.0
    for number, error in enumerate(errors):
        expert = number if len(errors) > 1 else None
        h, g = made.statistics.input(name, expert), made.statistics.output(name, expert)
        assert h is not None
        assert g is not None
        predicted += 0.5 * np.trace(g @ error @ h @ error.T)
    changed = folder / "changed.gguf"
    shutil.copy(made.model, changed)
    with open(changed, "rb+") as file:
        file.seek(next(entry.offset for entry in read_header(made.model).tensors if entry.name == name))
        file.write(rounded.astype("<f4").tobytes())
    report = compare(changed, made.model, text, context=CONTEXT, chunks=60, threads=1)
    return predicted, report.metrics.kld.mean


@pytest.mark.parametrize("name", ["blk.0.ffn_down.weight", "token_embd.weight"])
@pytest.mark.parametrize("kind", ["Q6_K", "Q8_0"])
def test_predicted_loss_beside_a_format_is_what_its_kernel_loses(
    kind: str, name: str, made: Made, tmp_path: Path, demo_text: Path
) -> None:
    model = open_gguf(made.model)
    bare, whole = (
        predict_losses(
            model, made.statistics, PredictSettings(rounding=None, formats=(kind,), activations=flag)
        ).losses[name][kind]
        for flag in (False, True)
    )
    types = {(t.role, t.layer): FORMATS[kind if t.name == name else "F32"] for t in model.tensors if not t.keep_f32}
    write(plan(model, recipe_of_types("one", "one", types, "one")), tmp_path / "native.gguf", threads=1)
    assert {t.name for t in open_gguf(tmp_path / "native.gguf").tensors if t.dtype == kind} == {name}
    decoded = plan(open_gguf(tmp_path / "native.gguf"), open_recipe("f32"))
    write(decoded, tmp_path / "decoded.gguf", threads=1)  # the same weights, multiplied by inputs as they are
    report = compare(tmp_path / "native.gguf", tmp_path / "decoded.gguf", demo_text, context=256, chunks=16, threads=1)
    measured = report.metrics.kld.mean
    assert 0.5 < measured / (whole - bare) < 2, (measured, whole - bare)

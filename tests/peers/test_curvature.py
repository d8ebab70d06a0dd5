"""Gradients against transformers' own, inputs against torch's, and the KL divergence they predict against measured."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pocketquant import open_recipe, write
from pocketquant.demo import checkpoint_dir, text_path
from pocketquant.formats import FORMATS
from pocketquant.gguf_file import open_gguf, read_header
from pocketquant.quant.planning import plan
from pocketquant.quant.prediction import predict_losses
from pocketquant.quant.recipe_text import recipe_of_types
from pocketquant.quant.statistics import Statistics, open_statistics
from pocketquant.quant.statistics_writing import merge_statistics

pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")

from pocketquant.eval import compare
from pocketquant.quant.calibrating import calibrate, cut_texts

CONTEXT, CHUNKS, WHOLE = 128, 96, 8
N_K, N_V, HEAD_DIM = 2, 4, 64  # the embedded model's


@dataclass(frozen=True)
class Made:
    model: Path
    statistics: Statistics
    few: Statistics
    inputs: Statistics
    whole: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def made(oracle_python: Path, demo_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    if subprocess.run([oracle_python, "-c", "import numba"], capture_output=True).returncode:
        pytest.skip("the interpreter with torch has no numba, which pocketquant needs; pip install numba there")
    folder, model, text = tmp_path_factory.mktemp("curvature"), demo_gguf("f32"), text_path("calibration")
    windows, _ = cut_texts(model, [text], CONTEXT, CHUNKS, 1, 0, 0)
    np.save(folder / "windows.npy", windows)
    script, root = Path(__file__).with_name("curvature_run.py"), Path(__file__).parents[2]
    command = [oracle_python, script, root, model, checkpoint_dir(), folder / "windows.npy", folder, WHOLE]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    calibrate(model, [text], folder / "inputs", context=CONTEXT, chunks=CHUNKS, threads=1)
    calibrate(model, [text], folder / "few-inputs", context=CONTEXT, chunks=WHOLE, threads=1)
    merge_statistics([folder / "inputs", folder / "gradients"], folder / "all")
    few = open_statistics(folder / "few")
    return Made(
        model,
        open_statistics(folder / "all"),
        few,
        open_statistics(folder / "few-inputs"),
        dict(np.load(folder / "whole.npz")),
    )


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
    tensor = next(tensor for tensor in open_gguf(made.model).tensors if tensor.name == name)
    weights, q4_k = tensor.rows(0, tensor.n_rows), FORMATS["Q4_K"]
    rounded = q4_k.decode(q4_k.encode(weights, None), tensor.n_cols)
    error = (rounded - weights).astype(np.float64)
    h, g = made.statistics.input(name), made.statistics.output(name)
    assert h is not None
    assert g is not None
    predicted = 0.5 * np.trace(g @ error @ h @ error.T)
    changed = tmp_path / "changed.gguf"
    shutil.copy(made.model, changed)
    with open(changed, "rb+") as file:
        file.seek(next(entry.offset for entry in read_header(made.model).tensors if entry.name == name))
        file.write(rounded.astype("<f4").tobytes())
    report = compare(changed, made.model, demo_text, context=CONTEXT, chunks=60, threads=1)
    measured = report.to_json()["metrics"]["kld"]["mean"]
    assert low < measured / predicted < high, (measured, predicted)


@pytest.mark.parametrize("name", ["blk.0.ffn_down.weight", "token_embd.weight"])
@pytest.mark.parametrize("kind", ["Q6_K", "Q8_0"])
def test_predicted_loss_beside_a_format_is_what_its_kernel_loses(
    kind: str, name: str, made: Made, tmp_path: Path, demo_text: Path
) -> None:
    model = open_gguf(made.model)
    bare, whole = (
        predict_losses(model, made.statistics, rounding=None, formats=(kind,), activations=flag).losses[name][kind]
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

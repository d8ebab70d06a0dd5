"""Rounding of experts, each with its own importance, against llama.cpp's quantizer: same file, types, importance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf_maker import changed
from moe_checkpoint import golden_checkpoint, golden_ids
from other_tools import GATE_UP, QKV
from test_weights_llama_quantize import llama_quantize

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.check import ERROR, check_gguf
from pocketquant.eval import weight_errors
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.gguf_file.reading import read_header
from pocketquant.llama.runtime import open_runtime
from pocketquant.model import Model, Tensor
from pocketquant.quant import Importance

pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")


def importance_by_expert(model: Model) -> Importance:
    """Log-normal, wide, and other columns for every expert: a row of another expert's would cost far more."""
    rng = np.random.default_rng(11)
    matrices = [tensor for tensor in model.tensors if len(tensor.shape) > 1 and not tensor.keep_f32]
    shapes = {tensor.name: (*tensor.shape[:-2], tensor.n_cols) for tensor in matrices}
    return Importance(
        {name: rng.lognormal(0.0, 2.0, shape).astype(np.float32) for name, shape in shapes.items()}, "test"
    )


def errors_by_expert(tensor: Tensor, original: Tensor, importance: np.ndarray) -> np.ndarray:
    """Weighted squared error of each expert."""
    difference = (tensor.rows(0, tensor.n_rows) - original.rows(0, original.n_rows)).astype(np.float64)
    return (importance[:, None, :] * difference.reshape(tensor.shape) ** 2).sum(axis=(1, 2))


@pytest.mark.parametrize("name", ["q4_k_m", "q4_0", "iq4_xs", "q5_k_s"])
def test_no_expert_is_worse(name: str, tmp_path: Path) -> None:
    write(plan(open_model(golden_checkpoint(tmp_path / "c")), open_recipe("f32")), tmp_path / "f32.gguf")
    source, recipe = open_gguf(tmp_path / "f32.gguf"), open_recipe(name)
    importance = importance_by_expert(source)
    write(plan(source, recipe, importance), tmp_path / "ours.gguf")
    llama_quantize(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", recipe.file_type, importance)
    originals, theirs = (
        {tensor.name: tensor for tensor in model.tensors} for model in (source, open_gguf(tmp_path / "theirs.gguf"))
    )
    experts = [tensor for tensor in open_gguf(tmp_path / "ours.gguf").tensors if len(tensor.shape) == 3]
    assert len(experts) == 12
    for tensor in experts:
        assert tensor.dtype == theirs[tensor.name].dtype, tensor.name
        weights = importance.weights[tensor.name]
        ours = errors_by_expert(tensor, originals[tensor.name], weights)
        peers = errors_by_expert(theirs[tensor.name], originals[tensor.name], weights)
        assert (ours <= 1.001 * peers).all(), (tensor.name, ours / peers)


@pytest.mark.parametrize(("kind", "file_type"), [("f16", 1), ("q8_0", 7)])
def test_the_quantizers_own_file_is_clean(kind: str, file_type: int, tmp_path: Path) -> None:
    """It keeps the shared expert's gate as a vector, which is right."""
    checkpoint = golden_checkpoint(tmp_path / "c")
    write(plan(open_model(checkpoint), open_recipe("f32")), tmp_path / "f32.gguf")
    llama_quantize(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", file_type, None)
    gates = [t for t in read_header(tmp_path / "theirs.gguf").tensors if "ffn_gate_inp_shexp" in t.name]
    assert {len(tensor.shape) for tensor in gates} == {1}
    report = check_gguf(tmp_path / "theirs.gguf", open_model(checkpoint))
    assert [(finding.code, finding.tensor) for finding in report.findings if finding.severity == ERROR] == []
    errors = weight_errors(open_gguf(tmp_path / "theirs.gguf"), open_gguf(tmp_path / "f32.gguf"))
    assert {error.snr_db for error in errors if "shexp" not in error.name or error.format == "F32"} >= {None}
    assert all(error.snr_db is None or error.snr_db > 30 for error in errors)


@pytest.mark.parametrize("fused", [("attn_qkv", 3), ("ffn_gate_up_exps", 0)], ids=["qkv", "experts"])
def test_llama_cpp_runs_the_fused_file_alike(fused: tuple[str, int], tmp_path: Path) -> None:
    """What we take apart is what it computes with."""
    name, layer = fused
    write(plan(open_model(golden_checkpoint(tmp_path / "c")), open_recipe("f32")), tmp_path / "plain.gguf")
    changed(tmp_path / "plain.gguf", tmp_path / "fused.gguf", QKV if name == "attn_qkv" else GATE_UP)
    assert f"blk.{layer}.{name}.weight" in {t.name for t in read_header(tmp_path / "fused.gguf").tensors}
    write(plan(open_model(tmp_path / "fused.gguf"), open_recipe("f32")), tmp_path / "apart.gguf")
    tokens, logits = golden_ids().tolist(), {}
    for file in ("plain", "fused", "apart"):
        with open_runtime(tmp_path / f"{file}.gguf", context=len(tokens)) as run:
            logits[file] = np.concatenate([rows.copy() for _, rows in run.logits(tokens)])
    assert np.array_equal(logits["plain"], logits["apart"])
    np.testing.assert_allclose(logits["fused"], logits["plain"], atol=1e-4)

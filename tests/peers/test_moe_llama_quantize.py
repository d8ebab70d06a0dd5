"""Rounding of experts, each with its own importance, against llama.cpp's quantizer: same file, types, importance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from moe_checkpoint import golden_checkpoint
from test_weights_llama_quantize import llama_quantize

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.gguf_file import open_gguf
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

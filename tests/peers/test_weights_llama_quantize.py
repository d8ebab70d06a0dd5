"""Rounding error against llama.cpp's quantizer: the same file, types and importance, tensor for tensor.

The measure is the squared error weighted by the same importance. llama.cpp's kernels weight it further, by the size of
the weights, so this is what we minimise and not quite what it does; divergence on text is `make bench-quality`'s job.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.quant import Importance, builtin_recipes

llama = pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")
RECIPES = [name for name in builtin_recipes() if not name.startswith("pocket_") and name not in ("f32", "f16", "bf16")]
SIZE_TOLERANCE = 4096


def importance_of(source: Path) -> Importance:
    """An importance for every matrix: log-normal, as mean squares of activations are."""
    rng = np.random.default_rng(7)
    matrices = [tensor for tensor in open_gguf(source).tensors if len(tensor.shape) > 1 and not tensor.keep_f32]
    return Importance(
        {tensor.name: rng.lognormal(0.0, 1.0, tensor.n_cols).astype(np.float32) for tensor in matrices}, "test"
    )


def llama_quantize(source: Path, target: Path, file_type: int, importance: Importance | None) -> None:
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, 2
    if importance is not None:
        matrix = (llama.llama_model_imatrix_data * (len(importance.weights) + 1))()
        for entry, (name, array) in zip(matrix, importance.weights.items(), strict=False):
            entry.name, entry.size = name.encode(), array.size
            entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = matrix
    assert llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("name", RECIPES)
def test_no_tensor_is_worse(name: str, weighted: bool, demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    source, recipe = demo_gguf("f32"), open_recipe(name)
    importance = importance_of(source) if weighted else None
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    write(plan(open_model(source), recipe, importance), ours)
    llama_quantize(source, theirs, recipe.file_type, importance)
    assert abs(ours.stat().st_size - theirs.stat().st_size) <= SIZE_TOLERANCE
    originals = {tensor.name: tensor for tensor in open_gguf(source).tensors}
    peers = {tensor.name: tensor for tensor in open_gguf(theirs).tensors}
    ratios = {}
    for tensor in open_gguf(ours).tensors:
        peer = peers[tensor.name]
        assert tensor.dtype == peer.dtype, tensor.name
        original = originals[tensor.name].rows(0, tensor.n_rows)
        weights = importance.weights.get(tensor.name, np.float32(1)) if importance else np.float32(1)
        our_error, peer_error = (
            float((weights * (each.rows(0, each.n_rows) - original).astype(np.float64) ** 2).sum())
            for each in (tensor, peer)
        )
        if peer_error or our_error:
            ratios[tensor.name] = our_error / peer_error
    assert ratios
    worse = {name: ratio for name, ratio in ratios.items() if ratio > 1.001}
    assert not worse
    assert np.mean(list(ratios.values())) <= 1.0

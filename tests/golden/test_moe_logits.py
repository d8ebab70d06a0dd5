"""A mixture of experts in F32 in llama.cpp against transformers in f32, kept as golden logits.

The test model has two value heads per key head and distinct numbers in every head and expert; every expert of every
block is used. `tools/make_moe_golden.py` made the golden with transformers; this test needs no torch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, one_by_one
from moe_checkpoint import golden_checkpoint, golden_weights

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.llama.runtime import open_runtime

GOLDEN = Path(__file__).with_name("moe_logits.npz")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergence(path: Path, ids: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """KL divergence in nats at every position."""
    with open_runtime(path, context=len(ids), threads=1) as runtime:
        rows = [logits.copy() for _, logits in runtime.logits(ids.tolist())]
    theirs = log_softmax(expected)
    return (np.exp(theirs) * (theirs - log_softmax(np.concatenate(rows)))).sum(axis=-1)


def test_logits_equal_transformers(tmp_path: Path) -> None:
    golden = np.load(GOLDEN)
    checkpoint = golden_checkpoint(tmp_path / "Tiny-MoE")
    digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert str(golden["sha256"]) == digest, "the test model changed: run tools/make_moe_golden.py"
    write(plan(open_model(checkpoint), open_recipe("f32")), tmp_path / "f32.gguf")
    found = divergence(tmp_path / "f32.gguf", golden["ids"], golden["logits"])
    assert len(found) == 64
    assert found.mean() <= 1e-6
    assert found.max() <= 1e-5


@pytest.mark.parametrize("damage", ["experts in another order", "gate and up exchanged"])
def test_golden_notices_a_wrong_expert(damage: str, tmp_path: Path) -> None:
    golden = np.load(GOLDEN)
    weights = golden_weights()
    name = "model.layers.2.mlp.experts.gate_up_proj"
    if damage == "experts in another order":
        weights[name] = weights[name][[1, 0, 2, 3, 4, 5]]
    else:
        weights[name] = np.concatenate(np.split(weights[name], 2, axis=1)[::-1], axis=1)
    checkpoint = make_checkpoint(tmp_path / "Tiny-MoE", weights=one_by_one(weights), num_experts=6)
    write(plan(open_model(checkpoint), open_recipe("f32")), tmp_path / "f32.gguf")
    assert divergence(tmp_path / "f32.gguf", golden["ids"], golden["logits"]).mean() > 1e-4

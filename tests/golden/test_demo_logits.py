"""The embedded model's F32 file in llama.cpp against transformers in f32, kept as golden logits.

`tools/make_goldens.py` made the goldens with transformers; this test needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pocketquant.demo import checkpoint_dir
from pocketquant.llama.runtime import open_runtime

HERE = Path(__file__).parent
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_logits_equal_transformers(demo_gguf: Callable[[str], Path]) -> None:
    golden = np.load(HERE / "demo_logits.npz")
    digest = hashlib.sha256((checkpoint_dir() / "model.safetensors").read_bytes()).hexdigest()
    assert str(golden["sha256"]) == digest, "the model changed: run tools/make_goldens.py"
    assert golden["kl_floor"][0] < 1e-7
    expected = golden["codes"].astype(np.float32) * golden["step"][..., None] + golden["offset"][..., None]
    divergences = []
    with open_runtime(demo_gguf("f32"), context=golden["ids"].shape[1]) as runtime:
        for ids, rows in zip(golden["ids"], expected, strict=True):
            for start, logits in runtime.logits(ids.tolist()):
                theirs = log_softmax(rows[start : start + len(logits)])
                divergences.append((np.exp(theirs) * (theirs - log_softmax(logits))).sum(axis=-1))
    divergence = np.concatenate(divergences)
    assert divergence.size >= 1000
    assert divergence.mean() <= 1e-6


def test_token_ids_equal_the_tokenizers_library(demo_gguf: Callable[[str], Path]) -> None:
    golden = json.loads((HERE / "hard_text.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256((checkpoint_dir() / "tokenizer.json").read_bytes()).hexdigest()
    assert golden["tokenizer_sha256"] == digest, "the tokenizer changed: run tools/make_goldens.py"
    with open_runtime(demo_gguf("q8_0"), context=64) as runtime:
        ours = {name: runtime.tokenize(case["text"], special=True) for name, case in golden["cases"].items()}
    assert ours == {name: case["ids"] for name, case in golden["cases"].items()}

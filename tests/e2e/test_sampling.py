"""Texts that a model goes on with, side by side: drawn from its own probabilities, each behind its own beginning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pocketquant.errors import EvalError
from pocketquant.llama.runtime import open_runtime
from pocketquant.llama.sampling import sample_on

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
START, CONTEXT = 20, 48


@pytest.fixture(scope="module")
def beginnings(demo_gguf: Callable[[str], Path], demo_text: Path) -> np.ndarray:
    """More than are written side by side."""
    with open_runtime(demo_gguf("f32"), context=CONTEXT, threads=1) as runtime:
        tokens = runtime.tokenize(demo_text.read_text(encoding="utf-8"))[: 53 * START]
    return np.array(tokens, np.int32).reshape(53, START)


def surprise(path: Path, texts: np.ndarray) -> np.ndarray:
    """For each token drawn, -ln p less what that is on average over tokens drawn: f64[n, CONTEXT - START]."""
    found = np.empty((len(texts), CONTEXT - START))
    with open_runtime(path, context=CONTEXT, threads=1) as runtime:
        for i, text in enumerate(texts):
            rows = np.concatenate([rows.copy() for _, rows in runtime.logits(text[:-1].tolist(), first=START - 1)])
            logits = rows.astype(np.float64) - rows.max(axis=1, keepdims=True)
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            entropy = -(np.exp(log_p) * log_p).sum(axis=1)
            found[i] = -log_p[np.arange(len(log_p)), text[START:]] - entropy
    return found


def test_tokens_are_as_likely_as_the_model_says(demo_gguf: Callable[[str], Path], beginnings: np.ndarray) -> None:
    path = demo_gguf("f32")
    texts = sample_on(path, beginnings, CONTEXT, threads=1)
    assert texts.shape == (53, CONTEXT)
    np.testing.assert_array_equal(texts[:, :START], beginnings)
    found = surprise(path, texts)
    error = found.std() / np.sqrt(found.size)
    assert abs(found.mean()) < 4 * error < 0.5
    exchanged = np.concatenate([beginnings, np.roll(texts[:, START:], 1, axis=0)], axis=1)
    assert surprise(path, exchanged).mean() > 5 * error


def test_a_seed_decides(demo_gguf: Callable[[str], Path], beginnings: np.ndarray) -> None:
    one, again, other = (
        sample_on(demo_gguf("f32"), beginnings[:3], CONTEXT, threads=threads, seed=seed)
        for threads, seed in ((1, 5), (2, 5), (1, 6))
    )
    np.testing.assert_array_equal(one, again)
    assert (one[:, START:] != other[:, START:]).any(axis=1).all()
    assert len(np.unique(sample_on(demo_gguf("f32"), beginnings[[0] * 5], CONTEXT, threads=1), axis=0)) == 5


def test_what_cannot_be_written_is_refused(
    demo_gguf: Callable[[str], Path], beginnings: np.ndarray, tmp_path: Path
) -> None:
    with pytest.raises(EvalError, match="no such file"):
        sample_on(tmp_path / "none.gguf", beginnings, CONTEXT)
    with pytest.raises(EvalError, match="made for"):
        sample_on(demo_gguf("f32"), beginnings, 1 << 20)
    with pytest.raises(ValueError, match="beginnings"):
        sample_on(demo_gguf("f32"), beginnings, START)

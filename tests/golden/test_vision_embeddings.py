"""A vision-language model's F32 files in llama.cpp against transformers in f32, kept as golden numbers.

`tools/make_vision_goldens.py` made the goldens with transformers; this test needs no torch. The pictures need no
resizing, so both see the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from vision_maker import AFTER, BEFORE, PICTURES, make_vision_checkpoint, picture, weights_digest

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.convert.vision import open_vision
from pocketquant.llama.vision import VisionRuntime, open_vision_runtime

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
GOLDEN = np.load(Path(__file__).with_name("vision.npz"))


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VisionRuntime]:
    folder = tmp_path_factory.mktemp("vision")
    checkpoint = make_vision_checkpoint(folder / "Tiny-1M")
    assert str(GOLDEN["sha256"]) == weights_digest(checkpoint), "the model changed: run tools/make_vision_goldens.py"
    tower = open_vision(checkpoint)
    assert tower is not None
    write(plan(open_model(checkpoint), open_recipe("f32")), folder / "text.gguf")
    write(plan(tower, open_recipe("f32")), folder / "mmproj.gguf")
    with open_vision_runtime(folder / "text.gguf", folder / "mmproj.gguf", context=256) as opened:
        yield opened


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """f64[n, n]: of every row of the first with every row of the second."""
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (first.astype(float), second.astype(float))]
    return unit[0] @ unit[1].T


@pytest.mark.parametrize("i", range(len(PICTURES)))
def test_embeddings_equal_transformers(i: int, runtime: VisionRuntime) -> None:
    expected = GOLDEN[f"embeddings_{i}"]
    found = runtime.embeddings(picture(*PICTURES[i], seed=i))
    assert found.shape == expected.shape == (PICTURES[i][0] * PICTURES[i][1] // 1024, 256)
    alike = cosines(found, expected)
    assert alike.diagonal().min() >= 0.99999
    # no other token would pass: an order of patches that is wrong shows
    assert (alike - np.eye(len(alike)) * 2).max() < 0.999
    assert np.abs(found - expected).max() <= 0.002 * np.abs(expected).max()


@pytest.mark.parametrize("i", range(len(PICTURES)))
def test_logits_after_image_and_text_equal_transformers(i: int, runtime: VisionRuntime) -> None:
    expected = GOLDEN[f"logits_{i}"].astype(float)
    found = runtime.logits([BEFORE, picture(*PICTURES[i], seed=i), AFTER]).astype(float)
    assert kl_divergence(expected, found) <= 1e-6
    others = [kl_divergence(GOLDEN[f"logits_{j}"].astype(float), found) for j in range(len(PICTURES)) if j != i]
    assert min(others) > 1e-2  # the picture matters


def kl_divergence(first: np.ndarray, second: np.ndarray) -> float:
    logs = [logits - np.logaddexp.reduce(logits) for logits in (first, second)]
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum())

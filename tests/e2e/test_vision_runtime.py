"""Vision towers of every recipe in llama.cpp's own loader, beside the text model of the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoint_maker import write_safetensors
from vision_maker import (
    both_config,
    make_vision_checkpoint,
    picture,
    vision_config,
    vision_weights,
    write_vision_files,
)

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.convert.vision import open_vision
from pocketquant.errors import EvalError
from pocketquant.llama.vision import open_vision_runtime

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
WIDE = vision_config(hidden_size=256, intermediate_size=512)
"""Rows of 256 and more, so that K-quants stay K-quants."""
LARGEST_LOSS = {"f32": 0.0, "f16": 1e-5, "bf16": 1e-3, "q8_0": 5e-3, "pocket_mmproj": 0.03, "q4_k_m": 0.1}
"""Of 1 - cosine of a token's embedding; these weights are random, a trained tower loses less."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.gguf and mmproj-<recipe>.gguf of one checkpoint."""
    folder = tmp_path_factory.mktemp("vision")
    checkpoint = make_vision_checkpoint(folder / "Tiny-1M", vision=WIDE, dtype="BF16")
    tower = open_vision(checkpoint)
    assert tower is not None
    write(plan(open_model(checkpoint), open_recipe("bf16")), folder / "text.gguf")
    for recipe in LARGEST_LOSS:
        write(plan(tower, open_recipe(recipe)), folder / f"mmproj-{recipe}.gguf")
    return folder


def embeddings(files: Path, recipe: str, image: np.ndarray) -> np.ndarray:
    with open_vision_runtime(files / "text.gguf", files / f"mmproj-{recipe}.gguf", context=128) as runtime:
        return runtime.embeddings(image)


@pytest.mark.parametrize("recipe", [name for name in LARGEST_LOSS if name != "f32"])
def test_every_recipe_runs_and_stays_close(recipe: str, files: Path) -> None:
    image = picture(96, 160)
    expected, found = embeddings(files, "f32", image), embeddings(files, recipe, image)
    assert found.shape == expected.shape == (15, 256)
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    loss = 1 - ((expected * found).sum(axis=1) / lengths).min()
    assert loss <= LARGEST_LOSS[recipe]
    assert recipe == "bf16" or not np.array_equal(expected, found)


def test_the_small_recipe_uses_the_types_it_names(files: Path) -> None:
    types = {tensor.role.value: tensor.dtype for tensor in open_model(files / "mmproj-pocket_mmproj.gguf").tensors}
    assert types["vision_up"] == "Q4_K"
    assert types["vision_down"] == "Q5_K"
    assert types["vision_qkv"] == types["vision_out"] == types["vision_merge"] == "Q8_0"
    assert types["vision_patch"] == "F16"


def test_prompts_with_several_images_depend_on_their_order(files: Path) -> None:
    first, second = picture(64, 128, seed=1), picture(64, 128, seed=2)
    with open_vision_runtime(files / "text.gguf", files / "mmproj-f16.gguf", context=128) as runtime:
        logits = runtime.logits(["A ", first, " or ", second, "?"])
        assert logits.shape == (320,)
        assert np.isfinite(logits).all()
        assert np.array_equal(logits, runtime.logits(["A ", first, " or ", second, "?"]))
        assert not np.allclose(logits, runtime.logits(["A ", second, " or ", first, "?"]), atol=1e-3)
        with pytest.raises(ValueError, match="tokens do not fit a window of 128"):
            runtime.logits([picture(512, 512)])
        with pytest.raises(ValueError, match="expected u8"):
            runtime.embeddings(first.astype(np.float32))
        # a prompt in words that llama.cpp's own tools would take for an image stays text
        assert np.isfinite(runtime.logits(["<__media__>"])).all()


def test_odd_sizes_are_resized_not_refused(files: Path) -> None:
    assert len(embeddings(files, "f16", picture(70, 141))) == 8


def test_files_that_do_not_belong_together_are_refused(files: Path, tmp_path: Path) -> None:
    wider = both_config(vision_config(out_hidden_size=512), hidden_size=512)
    write_safetensors(tmp_path / "model.safetensors", vision_weights(wider["vision_config"]))
    write_vision_files(tmp_path, wider)
    tower = open_vision(tmp_path)
    assert tower is not None
    write(plan(tower, open_recipe("f16")), tmp_path / "wider.gguf")
    raw = (files / "mmproj-f16.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(raw[: len(raw) // 2])
    for mmproj, message in (
        (tmp_path / "wider.gguf", "mismatch between text model"),
        (files / "text.gguf", "cannot load the vision tower"),
        (tmp_path / "cut.gguf", "cannot load the vision tower"),
        (tmp_path / "absent.gguf", "no such file"),
    ):
        with pytest.raises(EvalError, match=message):
            open_vision_runtime(files / "text.gguf", mmproj, context=64)

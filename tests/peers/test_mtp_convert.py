"""The multi-token-prediction block against llama.cpp: its converter's bytes and keys, its quantizer's types."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, moe_config, mtp_weights_for, text_config, weights_for

from pocketquant import open_recipe, plan, write
from pocketquant.convert.checkpoint import open_checkpoint, open_mtp
from pocketquant.files.reading import read_at
from pocketquant.gguf_file.reading import GgufHeader, read_header
from pocketquant.model import Model
from pocketquant.quant import Importance, builtin_recipes

OURS_ONLY = {"pocketquant.recipe", "pocketquant.version"}
CASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "the config does not announce it": {"mtp_num_hidden_layers": None},
    "mixture of experts": {"num_experts": 6},
}


def checkpoint_with_mtp(folder: Path, prefix: str = "mtp.", **changes: Any) -> Path:
    changes = {"mtp_num_hidden_layers": 1, **changes}
    changes = {key: value for key, value in changes.items() if value is not None}
    config = moe_config(**changes) if "num_experts" in changes else text_config(**changes)
    weights = weights_for(config) | mtp_weights_for(config, prefix)
    return make_checkpoint(folder, weights=weights, **changes)


def opened(checkpoint: Path, part: str) -> Model:
    if part == "embed":
        return open_checkpoint(checkpoint, mtp="embed")
    if part == "":
        return open_checkpoint(checkpoint)
    model = open_mtp(checkpoint)
    assert model is not None
    return model


def metadata_of(header: GgufHeader) -> dict[str, Any]:
    return {key: (value.kind, value.value) for key, value in header.metadata.items() if key not in OURS_ONLY}


@pytest.mark.parametrize("case", CASES)
def test_bytes_and_metadata_equal_the_converters(case: str, tmp_path: Path, oracle_python: Path) -> None:
    checkpoint = checkpoint_with_mtp(tmp_path / "Tiny-1M", **CASES[case])
    kinds = [f"{number_type}{part}" for number_type in ("bf16", "f32") for part in ("", "+embed", "+sidecar")]
    script = Path(__file__).with_name("llama_convert.py")
    run = subprocess.run([oracle_python, script, checkpoint, tmp_path, *kinds], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    for kind in kinds:
        number_type, _, part = kind.partition("+")
        ours, theirs = tmp_path / f"ours-{kind}.gguf", tmp_path / f"theirs-{kind}.gguf"
        write(plan(opened(checkpoint, part), open_recipe(number_type)), ours)
        mine, others = read_header(ours), read_header(theirs)
        assert metadata_of(mine) == metadata_of(others), kind
        by_name = {tensor.name: tensor for tensor in others.tensors}
        assert {tensor.name: (tensor.shape, tensor.format) for tensor in mine.tensors} == {
            name: (tensor.shape, tensor.format) for name, tensor in by_name.items()
        }
        for tensor in mine.tensors:
            first = read_at(ours, tensor.offset, tensor.nbytes)
            second = read_at(theirs, by_name[tensor.name].offset, tensor.nbytes)
            if tensor.name.endswith(".ssm_a"):  # torch's exp may be one unit in the last place off
                np.testing.assert_array_max_ulp(first.view("<f4"), second.view("<f4"), maxulp=1)
            else:
                assert np.array_equal(first, second), (kind, tensor.name)


# Layers so few that one more makes an eighth; so many that it moves the last eighth.
SHAPES: dict[str, dict[str, Any]] = {
    "7 layers": {"num_hidden_layers": 7},
    "20 layers, untied": {"num_hidden_layers": 20, "tie_word_embeddings": False},
    "7 layers, 8 experts": {"num_hidden_layers": 7, "num_experts": 8, "moe_intermediate_size": 64},
}
LIKE_LLAMA = [
    name for name in builtin_recipes() if not name.startswith("pocket") and name not in ("f32", "f16", "bf16")
]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Model, Path]]:
    """Shape -> an opened checkpoint with its block embedded, and the F32 file of it."""
    made = {}
    for i, (shape, changes) in enumerate(SHAPES.items()):
        folder = tmp_path_factory.mktemp("mtp")
        types = (["linear_attention"] * 3 + ["full_attention"]) * 5
        sizes = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 320}
        layers = changes["num_hidden_layers"]
        checkpoint = checkpoint_with_mtp(folder / f"{i}", **{**sizes, **changes, "layer_types": types[:layers]})
        model = open_checkpoint(checkpoint, mtp="embed")
        write(plan(model, open_recipe("f32")), folder / "f32.gguf")
        made[shape] = model, folder / "f32.gguf"
    return made


@pytest.mark.parametrize("importance", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("recipe_name", LIKE_LLAMA)
@pytest.mark.parametrize("shape", SHAPES)
def test_types_equal_the_quantizers_but_for_the_blocks_floor(
    shape: str, recipe_name: str, importance: bool, embedded: dict[str, tuple[Model, Path]], tmp_path: Path
) -> None:
    llama = pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")
    model, source = embedded[shape]
    recipe = open_recipe(recipe_name)
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = recipe.file_type, 1
    entry = "blk.0.ffn_down_shexp.weight" if "experts" in shape else "blk.0.ffn_down.weight"
    ones = np.ones(next(tensor.n_cols for tensor in model.tensors if tensor.name == entry), np.float32)
    if importance:  # of one tensor, as a matrix of the trunk has none of the block's either
        matrix = (llama.llama_model_imatrix_data * 2)()
        pointer = ones.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        matrix[0].name, matrix[0].data, matrix[0].size = entry.encode(), pointer, len(ones)
        params.imatrix = matrix
    target = tmp_path / "theirs.gguf"
    assert llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
    ours = plan(model, recipe, Importance({entry: ones}) if importance else None)
    mine = {item.tensor.name: item.format for item in ours.tensors}
    theirs = {tensor.name: tensor.format for tensor in read_header(target).tensors}
    assert mine.keys() == theirs.keys()
    different = {name for name in mine if mine[name] is not theirs[name]}
    assert all(name.startswith(f"blk.{model.sizes['n_layer']}.") for name in different)
    for name in mine.keys() - different:
        assert not name.startswith(f"blk.{model.sizes['n_layer']}.") or mine[name].bits_per_weight >= 5.5, name
    for name in different:  # 64 columns are no multiple of 256: a fallback on both sides
        assert mine[name].name in ("Q5_K", "Q5_1"), name
        assert theirs[name].bits_per_weight < mine[name].bits_per_weight, name
    assert bool(different) == (recipe_name not in ("q5_k_m", "q5_k_s", "q6_k", "q8_0"))

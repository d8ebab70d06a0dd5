"""Weights that an adapter brings along whole, and embedding and head that the base model ties.

The names are those that PEFT 0.21.2 saves (`tests/golden/peft_names.json`); that the numbers are what its loaded model
computes with is tested against PEFT itself, in tests/peers.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from adapter_maker import matrices_for, rows_of, write_adapter
from checkpoint_maker import make_checkpoint, text_config, weights_for

from pocketquant import open_model
from pocketquant.convert.adapter import open_adapter
from pocketquant.convert.adapter_gguf import plan_adapter
from pocketquant.errors import SourceError

NAMES = json.loads((Path(__file__).parents[1] / "golden/peft_names.json").read_text())["cases"]
PREFIX = "base_model.model."
EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens", f"{PREFIX}lm_head"
WEIGHTS = weights_for(text_config())
STORED = WEIGHTS["model.embed_tokens.weight"]
CHANGED = np.random.default_rng(4).standard_normal(STORED.shape).astype(np.float32)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tied") / "base", dtype="F32", weights=WEIGHTS)


def adapter_of(folder: Path, case: str, values: dict[str, np.ndarray]) -> Path:
    """An adapter with all the names that PEFT saved in a case; numbers by name, random ones where none are given."""
    rng = np.random.default_rng(3)
    saved = NAMES[case]
    tensors = {name: values.get(name, 0.1 * rng.standard_normal(shape)) for name, shape in saved["tensors"].items()}
    as_f32 = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    return write_adapter(folder, as_f32, r=4, lora_alpha=8, **saved["settings"])


def product(folder: Path, module: str) -> np.ndarray:
    """scale * B @ A of a module, in f64."""
    change = next(change for change in open_adapter(folder).changes if change.module == module)
    a, b = (matrix.words(0, matrix.shape[0]).view("<f4").astype(np.float64) for matrix in (change.a, change.b))
    return change.scale * ((b @ a).T if change.is_embedding else b @ a)


def test_tied_head_adapter_changes_the_head_alone(tied: Path, tmp_path: Path) -> None:
    folder = adapter_of(tmp_path / "lora", "head", {f"{HEAD}.base_layer.weight": STORED})
    model = open_model(tied, adapter=folder)
    assert np.array_equal(rows_of(model, "token_embd.weight"), STORED)
    assert np.abs(rows_of(model, "output.weight") - STORED - product(folder, "lm_head")).max() < 1e-6


def test_tied_head_adapter_with_an_older_base_weight(tied: Path, tmp_path: Path) -> None:
    """PEFT loads it into the weight that both share."""
    folder = adapter_of(tmp_path / "lora", "head", {f"{HEAD}.base_layer.weight": CHANGED})
    model = open_model(tied, adapter=folder)
    assert np.array_equal(rows_of(model, "token_embd.weight"), CHANGED)
    assert np.abs(rows_of(model, "output.weight") - CHANGED - product(folder, "lm_head")).max() < 1e-6


def test_both_changed_with_base_weights_that_differ_are_refused(tied: Path, tmp_path: Path) -> None:
    values = {f"{HEAD}.base_layer.weight": STORED, f"{EMBEDDING}.base_layer.weight": CHANGED}
    with pytest.raises(SourceError, match="two different base weights"):
        open_model(tied, adapter=adapter_of(tmp_path / "lora", "embedding and head", values))
    values[f"{EMBEDDING}.base_layer.weight"] = STORED
    model = open_model(tied, adapter=adapter_of(tmp_path / "same", "embedding and head", values))
    assert not np.allclose(rows_of(model, "output.weight"), rows_of(model, "token_embd.weight"), atol=0.01)


def test_modules_to_save_of_tied_embedding_and_head(tied: Path, tmp_path: Path) -> None:
    values = {f"{EMBEDDING}.weight": CHANGED, f"{HEAD}.weight": 2 * CHANGED}
    model = open_model(tied, adapter=adapter_of(tmp_path / "lora", "embedding and head trained whole", values))
    assert np.array_equal(rows_of(model, "token_embd.weight"), CHANGED)
    assert np.array_equal(rows_of(model, "output.weight"), 2 * CHANGED)


@pytest.mark.parametrize("copy", ["modules_to_save", "modules_to_save.default"])
def test_copies_that_peft_saves_beside_the_plain_names(copy: str, tied: Path, tmp_path: Path) -> None:
    tensors = {f"{EMBEDDING}.weight": CHANGED, f"{HEAD}.weight": 2 * CHANGED}
    for module in (EMBEDDING, HEAD):
        tensors |= {f"{module}.{copy}.weight": 7 * CHANGED, f"{module}.original_module.weight": STORED}
    folder = write_adapter(tmp_path / "lora", tensors, modules_to_save=["embed_tokens", "lm_head"])
    model = open_model(tied, adapter=folder)
    assert np.array_equal(rows_of(model, "token_embd.weight"), CHANGED)
    assert np.array_equal(rows_of(model, "output.weight"), 2 * CHANGED)


def test_a_copy_without_the_plain_name_is_refused(tied: Path, tmp_path: Path) -> None:
    tensors = {f"{HEAD}.modules_to_save.weight": CHANGED, **matrices_for({"model.layers.0.mlp.up_proj": (512, 256)}, 4)}
    with pytest.raises(SourceError, match=r"a copy of lm_head\.weight, which PEFT loads, and which is missing"):
        open_model(tied, adapter=write_adapter(tmp_path / "lora", tensors, modules_to_save=["lm_head"]))


@pytest.mark.parametrize("case", ["one embedding", "one embedding trained whole"])
def test_embedding_and_head_trained_as_one_stay_one(case: str, tied: Path, tmp_path: Path) -> None:
    tensors = NAMES[case]["tensors"]
    rng = np.random.default_rng(3)
    values: dict[str, np.ndarray] = dict.fromkeys((name for name in tensors if name.endswith("layer.weight")), STORED)
    if case == "one embedding":
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 320), (256, 4)))
        values |= {f"{EMBEDDING}.lora_embedding_A": a, f"{EMBEDDING}.lora_embedding_B": b}
        values |= {f"{HEAD}.lora_A.weight": b.T, f"{HEAD}.lora_B.weight": a.T}
    else:
        values |= {f"{EMBEDDING}.weight": CHANGED, f"{HEAD}.weight": CHANGED}
    folder = adapter_of(tmp_path / "lora", case, values)
    model = open_model(tied, adapter=folder)
    assert model.is_tied
    expected = CHANGED if "whole" in case else STORED + product(folder, "model.embed_tokens")
    assert np.abs(rows_of(model, "token_embd.weight") - expected).max() < 1e-5


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_one_of_two_trained_as_one(module: str, tied: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", matrices_for({module: (320, 256)}, 4), ensure_weight_tying=True)
    if module == "lm_head":
        with pytest.raises(SourceError, match="trained as one with the embedding"):
            open_model(tied, adapter=folder)
        return
    model = open_model(tied, adapter=folder)
    assert model.is_tied
    assert not np.allclose(rows_of(model, "token_embd.weight"), STORED, atol=0.01)


@pytest.mark.parametrize("case", ["norms", "DeltaNet"])
def test_norms_and_other_weights_trained_whole(case: str, tied: Path, tmp_path: Path) -> None:
    folder = adapter_of(tmp_path / "lora", case, {})
    model, base = open_model(tied, adapter=folder), open_model(tied)
    trained = open_adapter(folder).trained_weights
    changed = [t.name for t in base.tensors if not np.array_equal(rows_of(base, t.name), rows_of(model, t.name))]
    assert len(trained) == NAMES[case]["trained"]
    assert len(changed) == len(trained) + 1  # and LoRA on q_proj
    name = "model.layers.2.input_layernorm" if case == "norms" else "model.layers.2.linear_attn.A_log"
    numbers = trained[name].words(0, 1).view("<f4")[0]
    if case == "norms":
        assert np.array_equal(rows_of(model, "blk.2.attn_norm.weight")[0], 1 + numbers)
    else:
        assert np.allclose(rows_of(model, "blk.2.ssm_a")[0], -np.exp(numbers)[[0, 2, 1, 3]], rtol=1e-6)


@pytest.mark.parametrize("case", ["resized", "resized, trained whole"])
def test_adapters_with_a_resized_vocabulary_are_refused_for_that_reason(case: str, tied: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"a vocabulary of 328 rows, and the checkpoint's embedding has 320(.|\n)*lm_h"
    ):
        open_model(tied, adapter=adapter_of(tmp_path / "lora", case, {}))


def test_lora_on_a_resized_embedding_is_refused_for_that_reason(tied: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", matrices_for({"model.embed_tokens": (328, 256)}, 4))
    with pytest.raises(SourceError, match="a vocabulary of 328 rows"):
        open_model(tied, adapter=folder)


def test_weights_of_the_vision_tower_trained_whole_are_noted(tmp_path: Path) -> None:
    weights = WEIGHTS | {"model.visual.merger.norm.weight": np.ones(64, np.float32)}
    base = make_checkpoint(tmp_path / "base", weights=weights)
    tensors = {f"{PREFIX}model.visual.merger.norm.weight": np.zeros(64, np.float32)}
    model = open_model(base, adapter=write_adapter(tmp_path / "lora", tensors, modules_to_save=["merger"]))
    assert any("1 of these belong to the vision tower, which this file leaves out" in note for note in model.notes)


def test_an_adapter_beside_a_tied_model_is_refused_for_the_tie(tied: Path, tmp_path: Path) -> None:
    folder = adapter_of(tmp_path / "lora", "head", {f"{HEAD}.base_layer.weight": STORED})
    with pytest.raises(SourceError, match="embedding and head are tied") as refused:
        plan_adapter(open_adapter(folder), open_model(tied))
    assert "differs from the base model" not in str(refused.value)

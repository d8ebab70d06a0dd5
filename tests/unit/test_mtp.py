"""Multi-token prediction: the tensors decide, the block is taken in, put beside, or left out; never half."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, moe_config, mtp_weights_for, text_config, weights_for

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.convert.checkpoint import open_checkpoint, open_mtp
from pocketquant.convert.mtp import sidecar_path
from pocketquant.errors import ArchitectureError, RecipeError, SourceError
from pocketquant.formats import FORMATS
from pocketquant.gguf_file.header import encode_table
from pocketquant.gguf_file.reading import read_header
from pocketquant.model import Model, Role, Value
from pocketquant.quant import builtin_recipes, choose_formats, parse_recipe

BLOCK = {
    "attn_norm.weight",
    "attn_q.weight",
    "attn_k.weight",
    "attn_v.weight",
    "attn_output.weight",
    "attn_q_norm.weight",
    "attn_k_norm.weight",
    "post_attention_norm.weight",
    "ffn_gate.weight",
    "ffn_up.weight",
    "ffn_down.weight",
    "nextn.eh_proj.weight",
    "nextn.enorm.weight",
    "nextn.hnorm.weight",
    "nextn.shared_head_norm.weight",
}


OURS = [name for name in builtin_recipes() if name.startswith("pocket") and "mmproj" not in name]


def checkpoint_with_mtp(folder: Path, prefix: str = "mtp.", dtype: str = "BF16", **changes: Any) -> Path:
    config = text_config(**changes)
    weights = weights_for(config) | mtp_weights_for(config, prefix)
    return make_checkpoint(folder, weights=weights, dtype=dtype, **changes)


def names_of(model: Model | None) -> set[str]:
    assert model is not None
    return {tensor.name for tensor in model.tensors}


def rows_of(model: Model, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in model.tensors if tensor.name == name)
    return tensor.rows(0, tensor.n_rows)


@pytest.mark.parametrize("mtp", ["sidecar", "embed"])
def test_breaks_today_01_announced_but_dropped_on_save(mtp: Any, tmp_path: Path, checkpoint: Path) -> None:
    model = open_checkpoint(make_checkpoint(tmp_path / "Tiny-1M", mtp_num_hidden_layers=1), mtp=mtp)
    expected = open_checkpoint(checkpoint)
    assert names_of(model) == names_of(expected)
    assert dict(model.metadata) == dict(expected.metadata)
    assert model.metadata["qwen35.block_count"].value == 4
    assert model.notes == (
        "config.json announces a multi-token-prediction block, but the checkpoint has no tensors of one: a model "
        "without it",
    )
    assert open_mtp(tmp_path / "Tiny-1M") is None


def test_breaks_today_01_neither_announced_nor_there(checkpoint: Path) -> None:
    model = open_checkpoint(checkpoint, mtp="embed")
    assert "qwen35.nextn_predict_layers" not in model.metadata
    assert model.notes == ()
    assert open_mtp(checkpoint) is None


@pytest.mark.parametrize("announced", [0, 1, None])
def test_breaks_today_01_the_tensors_decide(announced: int | None, tmp_path: Path) -> None:
    changes = {} if announced is None else {"mtp_num_hidden_layers": announced}
    model = open_checkpoint(checkpoint_with_mtp(tmp_path / "c", **changes), mtp="embed")
    assert model.metadata["qwen35.block_count"] == Value("u32", 5)
    assert model.metadata["qwen35.nextn_predict_layers"] == Value("u32", 1)


def test_breaks_today_02_the_default_is_the_trunk_alone(tmp_path: Path, checkpoint: Path) -> None:
    folder = checkpoint_with_mtp(tmp_path / "Tiny-1M", mtp_num_hidden_layers=1)
    model, expected = open_model(folder), open_model(checkpoint)
    assert names_of(model) == names_of(expected)
    assert dict(model.metadata) == dict(expected.metadata)
    assert model.notes == ("15 tensors of the multi-token-prediction block: left out",)
    assert open_checkpoint(folder, mtp="drop").metadata == expected.metadata


@pytest.mark.parametrize("recipe_name", OURS)
@pytest.mark.parametrize("config", [text_config(), moe_config()], ids=["dense", "experts"])
def test_breaks_today_02_no_importance_so_q5_k_or_better(
    recipe_name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "c", weights=weights_for(config) | mtp_weights_for(config), **config)
    for model in (open_checkpoint(folder, mtp="embed"), open_mtp(folder)):
        assert model is not None
        for has_importance in (False, True):
            chosen = choose_formats(model, open_recipe(recipe_name), has_importance)
            block = {tensor.name: format for tensor, format, _ in chosen if tensor.name.startswith("blk.4.")}
            assert len(block) >= len(BLOCK)
            for name, format in block.items():
                assert format.block_bytes / format.block_len >= FORMATS["Q5_K"].block_bytes / 256, name


def test_embedded_block_holds_the_checkpoints_numbers(tmp_path: Path) -> None:
    config = text_config()
    trunk, block = weights_for(config), mtp_weights_for(config)
    folder = make_checkpoint(tmp_path / "c", dtype="F32", weights=trunk | block)
    model = open_checkpoint(folder, mtp="embed")
    assert names_of(model) == names_of(open_checkpoint(folder)) | {f"blk.4.{name}" for name in BLOCK}
    pairs = {
        "nextn.eh_proj.weight": ("fc.weight", 0),
        "nextn.enorm.weight": ("pre_fc_norm_embedding.weight", 1),
        "nextn.hnorm.weight": ("pre_fc_norm_hidden.weight", 1),
        "nextn.shared_head_norm.weight": ("norm.weight", 1),
        "attn_norm.weight": ("layers.0.input_layernorm.weight", 1),
        "attn_q_norm.weight": ("layers.0.self_attn.q_norm.weight", 1),
        "attn_q.weight": ("layers.0.self_attn.q_proj.weight", 0),
        "attn_output.weight": ("layers.0.self_attn.o_proj.weight", 0),
        "ffn_down.weight": ("layers.0.mlp.down_proj.weight", 0),
    }
    for name, (source, added) in pairs.items():
        expected = block[f"mtp.{source}"] + np.float32(added)
        assert np.array_equal(rows_of(model, f"blk.4.{name}"), np.atleast_2d(expected)), name
    assert next(tensor for tensor in model.tensors if tensor.role is Role.MTP_JOIN).shape == (256, 512)
    assert model.sizes["n_layer"] == 4
    assert model.sizes["n_mtp"] == 1


@pytest.mark.parametrize("prefix", ["model.mtp.", "language_model.mtp."])
def test_every_prefix_gives_the_same_block(prefix: str, tmp_path: Path) -> None:
    ours = open_checkpoint(checkpoint_with_mtp(tmp_path / "a", prefix), mtp="embed")
    expected = open_checkpoint(checkpoint_with_mtp(tmp_path / "b"), mtp="embed")
    assert names_of(ours) == names_of(expected)
    for tensor in expected.tensors:
        assert np.array_equal(rows_of(ours, tensor.name), tensor.rows(0, tensor.n_rows)), tensor.name


@pytest.mark.parametrize("tied", [True, False])
def test_sidecar_holds_the_block_and_what_it_shares(tied: bool, tmp_path: Path) -> None:
    folder = checkpoint_with_mtp(tmp_path / "c", tie_word_embeddings=tied)
    sidecar, embedded = open_mtp(folder), open_checkpoint(folder, mtp="embed")
    shared = {"token_embd.weight", "output_norm.weight"} | (set() if tied else {"output.weight"})
    assert names_of(sidecar) == shared | {f"blk.4.{name}" for name in BLOCK}
    assert sidecar is not None
    assert sidecar.metadata["qwen35.block_count"] == Value("u32", 5)
    assert sidecar.metadata["qwen35.nextn_predict_layers"] == Value("u32", 1)
    for tensor in sidecar.tensors:
        assert np.array_equal(rows_of(embedded, tensor.name), tensor.rows(0, tensor.n_rows)), tensor.name


def test_sidecar_leaves_the_vision_tower_out(tmp_path: Path) -> None:
    config = text_config()
    weights = weights_for(config, "model.language_model.") | mtp_weights_for(config)
    weights["model.visual.merger.norm.weight"] = np.ones(8, np.float32)
    weights["model.visual.blocks.0.norm1.weight"] = np.ones(8, np.float32)
    sidecar = open_mtp(make_checkpoint(tmp_path / "c", weights=weights))
    assert len(names_of(sidecar)) == 2 + len(BLOCK)


def test_sidecars_name() -> None:
    assert sidecar_path(Path("out/Qwen3.5-4B-Q4_K_M.gguf")) == Path("out/mtp-Qwen3.5-4B-Q4_K_M.gguf")


@pytest.mark.parametrize("part", ["embed", "sidecar"])
def test_gguf_with_the_block_opens_as_the_same_model(part: str, tmp_path: Path) -> None:
    folder = checkpoint_with_mtp(tmp_path / "c")
    model = open_checkpoint(folder, mtp="embed") if part == "embed" else open_mtp(folder)
    assert model is not None
    write(plan(model, open_recipe("f32")), tmp_path / "f32.gguf")
    again = open_model(tmp_path / "f32.gguf")
    assert again.sizes == model.sizes
    write(plan(again, open_recipe("f32")), tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "f32.gguf").read_bytes()
    assert [(tensor.name, tensor.role, tensor.layer, tensor.shape) for tensor in again.tensors] == [
        (tensor.name, tensor.role, tensor.layer, tensor.shape) for tensor in model.tensors
    ]
    chosen = choose_formats(again, open_recipe("pocket_4bit"), False)
    assert {format.name for tensor, format, _ in chosen if tensor.role is Role.MTP_JOIN} == {"Q5_K"}


def test_irregular_layers_name_the_block_too(tmp_path: Path) -> None:
    types = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
    folder = checkpoint_with_mtp(tmp_path / "c", layer_types=types)
    for model in (open_checkpoint(folder, mtp="embed"), open_mtp(folder)):
        assert model is not None
        assert model.metadata["qwen35.attention.recurrent_layers"].value == [True, False, True, True, False]


def test_trunk_gets_the_same_types_with_and_without_the_block(tmp_path: Path) -> None:
    types = (["linear_attention"] * 3 + ["full_attention"]) * 8
    changes = {"num_hidden_layers": 32, "layer_types": types, "hidden_size": 256, "intermediate_size": 256}
    folder = checkpoint_with_mtp(tmp_path / "c", **changes)
    with_block, without = (
        {tensor.name: format.name for tensor, format, _ in choose_formats(model, open_recipe("pocket_4bit"), True)}
        for model in (open_checkpoint(folder, mtp="embed"), open_checkpoint(folder))
    )
    assert without.items() <= with_block.items()


# ---------------------------------------------------------------- refused


def test_half_a_block_is_refused_with_its_names(tmp_path: Path) -> None:
    config = text_config()
    block = mtp_weights_for(config)
    del block["mtp.layers.0.mlp.up_proj.weight"], block["mtp.norm.weight"]
    block["mtp.layers.0.extra.weight"] = np.ones((4, 4), np.float32)
    folder = make_checkpoint(tmp_path / "c", weights=weights_for(config) | block)
    for open_it in (open_mtp, lambda source: open_checkpoint(source, mtp="embed")):
        with pytest.raises(ArchitectureError) as caught:
            open_it(folder)
        for line in (
            "2 tensors missing",
            "mtp.layers.0.mlp.up_proj.weight [512, 256]",
            "mtp.norm.weight [256]",
            "1 tensors that no qwen35 model has",
            "mtp.layers.0.extra.weight",
        ):
            assert line in str(caught.value)
    assert len(open_checkpoint(folder, mtp="drop").tensors) == len(weights_for(config))


def test_more_blocks_than_runtimes_use_are_refused(tmp_path: Path) -> None:
    config = text_config()
    block = mtp_weights_for(config)
    more = {name.replace("layers.0", "layers.1"): values for name, values in block.items()}
    folder = make_checkpoint(tmp_path / "c", weights=weights_for(config) | block | more)
    with pytest.raises(ArchitectureError, match=r"blocks \[0, 1\], and llama.cpp runs block 0 alone"):
        open_mtp(folder)
    assert open_checkpoint(folder, mtp="drop").sizes["n_layer"] == 4


def test_unknown_modes_are_refused(checkpoint: Path) -> None:
    with pytest.raises(SourceError, match="mtp 'both': expected one of sidecar, embed, drop"):
        open_checkpoint(checkpoint, mtp="both")  # type: ignore[arg-type]


@pytest.mark.parametrize("stated", [5, 99])
def test_a_gguf_of_nothing_but_mtp_blocks_is_refused(stated: int, tmp_path: Path) -> None:
    folder = checkpoint_with_mtp(tmp_path / "c")
    write(plan(open_checkpoint(folder, mtp="embed"), open_recipe("bf16")), tmp_path / "a.gguf")
    header = read_header(tmp_path / "a.gguf")
    metadata = {**header.metadata, "qwen35.nextn_predict_layers": Value("u32", stated)}
    raw = (tmp_path / "a.gguf").read_bytes()[header.data_offset :]
    table = encode_table(metadata, header.tensors)
    (tmp_path / "b.gguf").write_bytes(table.ljust(header.data_offset, b"\0") + raw)
    with pytest.raises(ArchitectureError, match=f"nextn_predict_layers: {stated} of 5 blocks"):
        open_model(tmp_path / "b.gguf")


def test_recipes_speak_of_the_block(tmp_path: Path) -> None:
    text = """
        name = "two"
        description = "one for the block, one for the rest"
        file_type = 7
        default = "Q8_0"
        [[rules]]
        mtp = true
        layers = ["4"]
        format = "Q6_K"
        reason = "the block"
        [[rules]]
        mtp = false
        roles = ["attn_q"]
        layers = ["-1"]
        format = "Q4_K"
        reason = "the trunk's last block"
    """
    model = open_checkpoint(checkpoint_with_mtp(tmp_path / "c"), mtp="embed")
    chosen = {tensor.name: format.name for tensor, format, _ in choose_formats(model, parse_recipe(text, "x"), False)}
    assert chosen["blk.4.attn_q.weight"] == "Q6_K"
    assert chosen["blk.4.nextn.eh_proj.weight"] == "Q6_K"
    assert chosen["blk.3.attn_q.weight"] == "Q4_K"
    assert chosen["blk.3.attn_k.weight"] == "Q8_0"
    with pytest.raises(RecipeError, match="mtp: expected true or false, got 1"):
        parse_recipe(text.replace("mtp = true", "mtp = 1"), "x")


def test_config_keeps_no_say(tmp_path: Path) -> None:
    folder = checkpoint_with_mtp(tmp_path / "c", mtp_num_hidden_layers=3)
    assert json.loads((folder / "config.json").read_text())["mtp_num_hidden_layers"] == 3
    assert open_checkpoint(folder, mtp="embed").sizes["n_mtp"] == 1

"""Checkpoints: what maps, what is refused, and that every offender is named before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, text_config, weights_for, write_safetensors

from pocketquant import open_model
from pocketquant.architectures import ARCHITECTURES
from pocketquant.architectures.hybrid import layer_kinds, tiled_after_qk, tiled_heads
from pocketquant.architectures.table import ATTENTION, DELTA
from pocketquant.errors import ArchitectureError, PocketquantError, SourceError
from pocketquant.model import Model, Role


def rows_of(model: Model, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in model.tensors if tensor.name == name)
    return tensor.rows(0, tensor.n_rows)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model.", ""])
@pytest.mark.parametrize("n_shards", [1, 3])
def test_every_prefix_gives_the_same_model(prefix: str, n_shards: int, tmp_path: Path, checkpoint: Path) -> None:
    config = text_config()
    other = make_checkpoint(tmp_path / "c", prefix=prefix, n_shards=n_shards, weights=weights_for(config, prefix))
    ours, expected = open_model(other), open_model(checkpoint)
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in expected.tensors]
    for tensor in expected.tensors:
        assert np.array_equal(rows_of(ours, tensor.name), tensor.rows(0, tensor.n_rows)), tensor.name


@pytest.mark.parametrize("n_v", [2, 4, 8])
def test_value_heads_go_from_grouped_to_tiled(n_v: int, tmp_path: Path) -> None:
    config = text_config(linear_num_value_heads=n_v)
    weights = weights_for(config)
    model = open_model(make_checkpoint(tmp_path / "c", dtype="F32", weights=weights, linear_num_value_heads=n_v))
    layer = "model.layers.0.linear_attn"
    r, dim = n_v // 2, 64
    for key_head in range(2):
        for i in range(r):
            grouped, tiled = key_head * r + i, i * 2 + key_head
            source, target = slice(grouped * dim, (grouped + 1) * dim), slice(tiled * dim, (tiled + 1) * dim)
            values = slice(256 + source.start, 256 + source.stop), slice(256 + target.start, 256 + target.stop)
            qkv = weights[f"{layer}.in_proj_qkv.weight"]
            assert np.array_equal(rows_of(model, "blk.0.attn_qkv.weight")[values[1]], qkv[values[0]])
            conv = weights[f"{layer}.conv1d.weight"][:, 0]
            assert np.array_equal(rows_of(model, "blk.0.ssm_conv1d.weight")[values[1]], conv[values[0]])
            gate = weights[f"{layer}.in_proj_z.weight"]
            assert np.array_equal(rows_of(model, "blk.0.attn_gate.weight")[target], gate[source])
            out = weights[f"{layer}.out_proj.weight"]
            assert np.array_equal(rows_of(model, "blk.0.ssm_out.weight")[:, target], out[:, source])
            for name, ours in (("in_proj_a.weight", "ssm_alpha.weight"), ("in_proj_b.weight", "ssm_beta.weight")):
                assert np.array_equal(rows_of(model, f"blk.0.{ours}")[tiled], weights[f"{layer}.{name}"][grouped])
            assert rows_of(model, "blk.0.ssm_dt.bias")[0, tiled] == weights[f"{layer}.dt_bias"][grouped]
            decay = -np.exp(weights[f"{layer}.A_log"][grouped].astype(np.float64))
            assert rows_of(model, "blk.0.ssm_a")[0, tiled] == np.float32(decay)


def test_norms_gain_one_but_not_deltanets_own(tmp_path: Path) -> None:
    weights = weights_for(text_config())
    model = open_model(make_checkpoint(tmp_path / "c", dtype="F32", weights=weights))
    pairs = {
        "output_norm.weight": ("model.norm.weight", 1),
        "blk.0.attn_norm.weight": ("model.layers.0.input_layernorm.weight", 1),
        "blk.3.attn_q_norm.weight": ("model.layers.3.self_attn.q_norm.weight", 1),
        "blk.0.ssm_norm.weight": ("model.layers.0.linear_attn.norm.weight", 0),
    }
    for name, (source, added) in pairs.items():
        assert np.array_equal(rows_of(model, name)[0], weights[source] + np.float32(added)), name


@pytest.mark.parametrize(("n_k", "n_v", "dim"), [(2, 2, 4), (2, 4, 4), (4, 16, 8)])
def test_orders_are_bijections(n_k: int, n_v: int, dim: int) -> None:
    sizes = {"n_k": n_k, "n_v": n_v, "head_v_dim": dim, "k_dim": n_k * dim}
    for order in (tiled_heads(sizes), tiled_after_qk(sizes)):
        assert np.array_equal(np.sort(order), np.arange(len(order)))
    assert np.array_equal(tiled_heads(sizes), np.arange(n_v * dim)) == (n_k == n_v)


def test_rows_do_not_depend_on_the_chunk(checkpoint: Path) -> None:
    for tensor in open_model(checkpoint).tensors:
        whole = tensor.rows(0, tensor.n_rows)
        steps = range(0, tensor.n_rows, 7)
        pieces = [tensor.rows(start, min(start + 7, tensor.n_rows)) for start in steps]
        assert np.array_equal(whole, np.concatenate(pieces)), tensor.name


def test_layer_types_decide_before_the_interval() -> None:
    config = {"num_hidden_layers": 3, "layer_types": ["full_attention", "linear_attention", "linear_attention"]}
    assert layer_kinds(config) == (ATTENTION, DELTA, DELTA)
    assert layer_kinds({"num_hidden_layers": 4, "full_attention_interval": 2}) == (DELTA, ATTENTION, DELTA, ATTENTION)
    with pytest.raises(ArchitectureError, match="layer_types: expected 3 entries"):
        layer_kinds({"num_hidden_layers": 3, "layer_types": ["full_attention"]})


def test_irregular_layers_are_written_out(tmp_path: Path) -> None:
    types = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
    model = open_model(make_checkpoint(tmp_path / "c", layer_types=types))
    assert model.metadata["qwen35.attention.recurrent_layers"].value == [True, False, True, True]


def with_vision_and_mtp(config: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    weights["model.visual.blocks.0.norm1.weight"] = np.ones(8, np.float32)
    weights["mtp.fc.weight"] = np.ones((4, 8), np.float32)


def test_vision_and_mtp_are_left_out_and_said_so(tmp_path: Path) -> None:
    weights = weights_for(text_config())
    with_vision_and_mtp(text_config(), weights)
    model = open_model(make_checkpoint(tmp_path / "c", weights=weights))
    assert len(model.tensors) == len(weights) - 2
    assert model.notes == (
        "1 tensors of the vision tower: left out",
        "1 tensors of the multi-token-prediction block: left out",
    )


def test_text_config_under_a_vision_language_class(tmp_path: Path) -> None:
    prefix = "model.language_model."
    folder = make_checkpoint(tmp_path / "c", prefix=prefix, weights=weights_for(text_config(), prefix))
    outer = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "tie_word_embeddings": True,
        "text_config": {**text_config(), "architectures": None},
    }
    (folder / "config.json").write_text(json.dumps(outer))
    assert open_model(folder).is_tied


@pytest.mark.parametrize("equal", [True, False])
def test_saved_tied_head_is_dropped_when_equal_and_kept_when_not(equal: bool, tmp_path: Path) -> None:
    weights = weights_for(text_config())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + (0 if equal else 1)
    model = open_model(make_checkpoint(tmp_path / "c", weights=weights))
    assert model.is_tied == equal
    assert len(model.notes) == 1
    assert ("left out" if equal else "kept") in model.notes[0]


# ---------------------------------------------------------------- refused


def without_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut_shard(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def escaping_shard(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../../secret.safetensors")
    path.write_text(json.dumps(index))


def stale_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.gone.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))


def wrong_shard(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    index["weight_map"]["model.embed_tokens.weight"] = "model-00003-of-00003.safetensors"
    path.write_text(json.dumps(index))


def in_two_shards(folder: Path) -> None:
    """The same name with other numbers: which of them were read depended on the order of the files."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    write_safetensors(folder / "model-00004.safetensors", {"model.norm.weight": np.full(256, 7, np.float32)})
    index["weight_map"]["unused"] = "model-00004.safetensors"
    path.write_text(json.dumps(index))


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": ')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_shard, r"shards named in the index are missing(.|\n)*model-00002-of-00003\.safetensors"),
        (cut_shard, r"model-00002-of-00003\.safetensors: the header contradicts the file(.|\n)*truncated"),
        (escaping_shard, r"shards outside the folder(.|\n)*secret"),
        (stale_index, r"contradict each other(.|\n)*model\.gone\.weight"),
        (
            wrong_shard,
            r"contradict each other(.|\n)*embed_tokens\.weight: in model-00001-of-00003\.safetensors, the index says "
            r"model-00003-of-00003\.safetensors\n(.|\n)*norm\.weight: in model-0000[23](.|\n)*index says model-00001",
        ),
        (
            in_two_shards,
            r"download all of them again(.|\n)*model\.norm\.weight: in model-0000\d-of-00003\.safetensors and in "
            r"model-00004\.safetensors; the index says model-0000\d-of-00003",
        ),
        (broken_config, r"config\.json: broken JSON"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json: missing"),
    ],
)
def test_broken_folders_are_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", n_shards=3)
    damage(folder)
    with pytest.raises(PocketquantError, match=message):
        open_model(folder)


def changed(name: str, values: np.ndarray | None) -> dict[str, np.ndarray]:
    weights = weights_for(text_config())
    if values is None:
        del weights[name]
    else:
        weights[name] = values
    return weights


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "model.layers.0.mlp.up_proj.weight",
            None,
            r"1 tensors missing .*:\n  .*layers\.0\.mlp\.up_proj.* \[512, 256\]",
        ),
        ("model.layers.9.mlp.up_proj.weight", np.ones((2, 2)), r"1 tensors that no qwen35 model has:\n  .*layers\.9"),
        ("model.layers.0.linear_attn.in_proj_a.weight", np.ones((4, 2)), r"\[4, 2\], expected \[n_v=4 n_embd=256\]"),
        ("model.layers.0.linear_attn.conv1d.weight", np.ones((512, 4, 1)), "this looks like a checkpoint saved by MLX"),
        ("model.embed_tokens.weight", None, r"no embed_tokens\.weight under any known prefix"),
    ],
)
def test_wrong_tensors_are_refused(name: str, values: np.ndarray | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match=message):
        open_model(make_checkpoint(tmp_path / "c", weights=changed(name, values)))


def test_bitsandbytes_leftovers_are_named(tmp_path: Path) -> None:
    weights = weights_for(text_config())
    name = "model.layers.0.mlp.up_proj.weight"
    del weights[name]
    folder = make_checkpoint(tmp_path / "c", n_shards=2, weights=weights)
    header = json.dumps({name: {"dtype": "U8", "shape": [65536, 1], "data_offsets": [0, 65536]}}).encode()
    (folder / "extra.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(65536))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = "extra.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArchitectureError, match=r"U8 \[65536, 1\], expected .*bitsandbytes 4-bit"):
        open_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "model class 'LlamaForCausalLM' is not supported"),
        ({"architectures": []}, "'architectures' names no model class"),
        ({"hidden_size": -1, "vocab_size": "many"}, r"hidden_size: -1(.|\n)*vocab_size: 'many'"),
        ({"linear_value_head_dim": 32}, "llama.cpp has one size for both"),
        ({"linear_num_value_heads": 3}, "no multiple of linear_num_key_heads"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta: -1.0, expected a number above 0"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta: nan"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta: None"),
        (
            {"rope_parameters": {"rope_theta": 1e60}},
            r"rope_theta: 1e\+60, expected a number above 0 and at most 1e\+15",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 9}}, "partial_rotary_factor: 9, expected"),
        ({"rope_parameters": {"partial_rotary_factor": "all"}}, "partial_rotary_factor: 'all', expected"),
        ({"rope_parameters": {"partial_rotary_factor": 1e-9}}, "turns 0 of 64 dimensions"),
        ({"rope_parameters": {"partial_rotary_factor": 5 / 64}}, "turns 5 of 64 dimensions"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": -2.0}}, "factor: -2.0, expected a number above 0"),
        ({"rope_parameters": {"mrope_section": [10**12, 1, 1]}}, "none above head_dim"),
        ({"rope_parameters": {"mrope_section": [-1, 1, 1]}}, "none above head_dim"),
        ({"quantization_config": {"quant_method": "hqq"}}, r"already quantized \(hqq\)"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: 0, expected a number above 0 and at most 1"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: -1, expected a number"),
        ({"rms_norm_eps": 1e9}, "rms_norm_eps: 1000000000.0, expected a number"),
        ({"rms_norm_eps": float("nan"), "vocab_size": 0}, "vocab_size: 0(.|\n)*rms_norm_eps: nan, expected a number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: inf"),
        ({"rms_norm_eps": 1e-60}, "rms_norm_eps: 1e-60"),
        ({"rms_norm_eps": True}, "rms_norm_eps: True"),
        ({"rms_norm_eps": None}, "rms_norm_eps: None"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: '1e-6'"),
    ],
)
def test_configs_that_cannot_be_right_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    (folder / "config.json").write_text(json.dumps(text_config(**changes)))
    with pytest.raises(PocketquantError, match=message):
        open_model(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_non_finite_weights_are_named(bad: float, dtype: str, tmp_path: Path) -> None:
    weights = weights_for(text_config())
    weights["model.layers.1.mlp.down_proj.weight"][17, 3] = bad
    model = open_model(make_checkpoint(tmp_path / "c", dtype=dtype, weights=weights))
    tensor = next(tensor for tensor in model.tensors if tensor.name == "blk.1.ffn_down.weight")
    for read in (tensor.rows, tensor.source.stored):
        with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.down_proj\.weight rows 16 to 31: non-finite"):
            read(16, 32)


def test_overflow_in_a_transform_is_named(tmp_path: Path) -> None:
    weights = weights_for(text_config())
    weights["model.layers.0.linear_attn.A_log"][0] = 200.0
    model = open_model(make_checkpoint(tmp_path / "c", weights=weights))
    with pytest.raises(SourceError, match=r"A_log.*too large for its transform \(minus_exp\)"):
        rows_of(model, "blk.0.ssm_a")


def test_table_covers_every_role_once_per_place() -> None:
    for architecture in ARCHITECTURES:
        targets = [(rule.where, rule.target) for rule in architecture.tensors]
        assert len(targets) == len(set(targets))
    assert {rule.role for architecture in ARCHITECTURES for rule in architecture.tensors} == set(Role)


def test_two_files_of_which_none_is_the_model_by_its_name_are_ambiguous(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    write_safetensors(folder / "other.safetensors", {"x": np.ones(2, np.float32)})
    with pytest.raises(SourceError, match=r"2 \*\.safetensors files and no index"):
        open_model(folder)

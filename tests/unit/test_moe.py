"""Mixtures of experts: layouts, every expert in its place, importance by expert, real shapes planned in seconds."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_maker import (
    make_checkpoint,
    make_sparse_checkpoint,
    moe_config,
    one_by_one,
    weights_for,
    write_safetensors,
)
from qwen35_inventory import QWEN35_35B_A3B, build_model

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.errors import ArchitectureError, RecipeError, SourceError
from pocketquant.formats import FORMATS
from pocketquant.gguf_file import writing as pipeline
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.model import Model, Role, Tensor
from pocketquant.quant import Importance, builtin_recipes, choose_formats

EXPERTS = "model.layers.0.mlp.experts"
LAYOUTS: dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]] = {
    "fused": dict,
    "one by one": one_by_one,
}
CONFIG_35B = moe_config(
    architectures=["Qwen3_5MoeForConditionalGeneration"],
    hidden_size=2048,
    num_hidden_layers=40,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=256,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    layer_types=None,
    num_experts=256,
    num_experts_per_tok=8,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
    vocab_size=248320,
)


def make_moe(folder: Path, weights: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    weights = weights_for(moe_config()) if weights is None else weights
    return make_checkpoint(folder, weights=weights, num_experts=6, **changes)


def named(model: Model, name: str) -> Tensor:
    return next(tensor for tensor in model.tensors if tensor.name == name)


def rows_of(model: Model, name: str) -> np.ndarray:
    tensor = named(model, name)
    return tensor.rows(0, tensor.n_rows).reshape(tensor.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_expert_is_in_its_place(layout: str, tmp_path: Path) -> None:
    weights = weights_for(moe_config())
    model = open_model(make_moe(tmp_path / "c", LAYOUTS[layout](weights), dtype="F32"))
    fused = weights[f"{EXPERTS}.gate_up_proj"]
    assert np.array_equal(rows_of(model, "blk.0.ffn_gate_exps.weight"), fused[:, :256])
    assert np.array_equal(rows_of(model, "blk.0.ffn_up_exps.weight"), fused[:, 256:])
    assert np.array_equal(rows_of(model, "blk.0.ffn_down_exps.weight"), weights[f"{EXPERTS}.down_proj"])
    assert named(model, "blk.0.ffn_gate_inp.weight").role is Role.ROUTER
    assert named(model, "blk.0.ffn_gate_inp_shexp.weight").shape == (1, 256)
    shared = weights["model.layers.3.mlp.shared_expert.up_proj.weight"]
    assert np.array_equal(rows_of(model, "blk.3.ffn_up_shexp.weight"), shared)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model.", ""])
def test_every_prefix_and_layout_gives_the_same_model(prefix: str, tmp_path: Path) -> None:
    weights = weights_for(moe_config(), prefix)
    ours = open_model(make_moe(tmp_path / "a", one_by_one(weights), n_shards=3))
    expected = open_model(make_moe(tmp_path / "b"))
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in expected.tensors]
    for tensor in expected.tensors:
        assert np.array_equal(rows_of(ours, tensor.name), rows_of(expected, tensor.name)), tensor.name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", [1, 100, 256, 1000])
def test_rows_do_not_depend_on_the_chunk(layout: str, step: int, tmp_path: Path) -> None:
    model = open_model(make_moe(tmp_path / "c", LAYOUTS[layout](weights_for(moe_config()))))
    for name in ("blk.0.ffn_gate_exps.weight", "blk.3.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"):
        tensor = named(model, name)
        starts = range(0, tensor.n_rows, step)
        pieces = [tensor.rows(start, min(start + step, tensor.n_rows)) for start in starts]
        assert np.array_equal(np.concatenate(pieces), tensor.rows(0, tensor.n_rows))


def test_breaks_today_07_text_only_moe_declares_the_vision_language_class(tmp_path: Path) -> None:
    prefix = "model.language_model."
    folder = make_moe(tmp_path / "c", weights_for(moe_config(), prefix))
    outer = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False,
        "text_config": {**moe_config(), "architectures": None},
    }
    (folder / "config.json").write_text(json.dumps(outer))
    model = open_model(folder)
    assert model.architecture == "qwen35moe"
    assert not model.is_tied


def test_metadata(tmp_path: Path) -> None:
    model = open_model(make_moe(tmp_path / "Tiny-MoE"))
    values = {key.removeprefix("qwen35moe."): value.value for key, value in model.metadata.items()}
    assert values["expert_count"] == 6
    assert values["expert_used_count"] == 2
    assert values["expert_feed_forward_length"] == 256
    assert values["expert_shared_feed_forward_length"] == 512
    assert "feed_forward_length" not in values
    assert values["general.size_label"] == "6x3.6M"


# ---------------------------------------------------------------- refused


def without_an_expert(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    del weights[f"{EXPERTS}.0.up_proj.weight"]
    return weights


def with_one_too_many(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**weights, f"{EXPERTS}.6.up_proj.weight": weights[f"{EXPERTS}.5.up_proj.weight"]}


def with_a_narrow_one(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**weights, f"{EXPERTS}.4.down_proj.weight": np.ones((256, 128), np.float32)}


def without_experts(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values for name, values in weights.items() if not name.startswith(EXPERTS)}


def with_both_layouts(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**weights, f"{EXPERTS}.gate_up_proj": np.ones((6, 512, 256), np.float32)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_an_expert, r"1 tensors missing .*\n  .*experts\.0\.up_proj\.weight \[256, 256\]$"),
        (with_one_too_many, r"1 tensors that no qwen35moe model has:\n  .*experts\.6\.up_proj"),
        (with_a_narrow_one, r"experts\.4\.down_proj\.weight: BF16 \[256, 128\], expected \[n_embd=256 n_ff_exp=256\]"),
        (without_experts, r"2 tensors missing .*\n  .*gate_up_proj \[6, 512, 256\]\n  .*down_proj \[6, 256, 256\]$"),
        (with_both_layouts, r"12 tensors that no qwen35moe model has"),
    ],
)
def test_wrong_experts_are_refused(
    damage: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], message: str, tmp_path: Path
) -> None:
    folder = make_moe(tmp_path / "c", damage(one_by_one(weights_for(moe_config()))))
    with pytest.raises(ArchitectureError, match=message):
        open_model(folder)


def test_transposed_experts_are_named(tmp_path: Path) -> None:
    weights = weights_for(moe_config())
    weights[f"{EXPERTS}.gate_up_proj"] = weights[f"{EXPERTS}.gate_up_proj"].transpose(0, 2, 1)
    with pytest.raises(
        ArchitectureError, match=r"\[n_expert=6 2\*n_ff_exp=512 n_embd=256\]: the experts are transposed"
    ):
        open_model(make_moe(tmp_path / "c", weights))


def test_experts_of_two_data_types_are_refused(tmp_path: Path) -> None:
    weights = one_by_one(weights_for(moe_config()))
    folder = make_moe(tmp_path / "c", weights, n_shards=2)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = sorted(set(index["weight_map"].values()))[1]
    write_safetensors(
        folder / shard, {name: weights[name] for name, at in index["weight_map"].items() if at == shard}, "F16"
    )
    with pytest.raises(ArchitectureError, match=r"experts\.0\..* to .*experts\.5\..*differ in data type \(BF16, F16\)"):
        open_model(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_broken_number_is_named_where_it_stands(layout: str, tmp_path: Path) -> None:
    weights = weights_for(moe_config())
    weights[f"{EXPERTS}.gate_up_proj"][4, 256 + 7, 9] = np.nan
    model = open_model(make_moe(tmp_path / "c", LAYOUTS[layout](weights)))
    tensor = named(model, "blk.0.ffn_up_exps.weight")
    place = {"fused": r"gate_up_proj rows 2304 to 2559", "one by one": r"experts\.4\.up_proj\.weight rows 0 to 255"}
    with pytest.raises(SourceError, match=place[layout]):
        tensor.rows(3 * 256, 6 * 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": "six"}, r"num_experts: 'six'"),
        ({"num_experts": 100_000}, r"num_experts: 100000, expected an integer from 1 to 1024"),
        ({"num_experts_per_tok": 7}, r"num_experts_per_tok 7 is more than num_experts 6"),
        ({"moe_intermediate_size": None}, r"moe_intermediate_size"),
        ({"shared_expert_intermediate_size": 0}, r"shared_expert_intermediate_size: 0"),
    ],
)
def test_configs_that_cannot_be_right_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = make_moe(tmp_path / "c")
    (folder / "config.json").write_text(json.dumps(moe_config(**changes)))
    with pytest.raises(ArchitectureError, match=message):
        open_model(folder)


# ---------------------------------------------------------------- recipes and importance


@pytest.mark.parametrize("recipe", builtin_recipes())
def test_routers_stay_f32(recipe: str) -> None:
    formats = {tensor.role: format.name for tensor, format, _ in choose_formats(MODEL_35B, open_recipe(recipe), True)}
    assert formats[Role.ROUTER] == formats[Role.SHARED_ROUTER] == "F32"


MODEL_35B = build_model(QWEN35_35B_A3B)


def test_pocket_4bit_spends_less_than_q4_k_m_and_more_where_every_token_passes() -> None:
    sizes = {name: plan(MODEL_35B, open_recipe(name)).file_bytes for name in ("pocket_4bit", "q4_k_m")}
    assert sizes["pocket_4bit"] < sizes["q4_k_m"]
    formats = {
        (tensor.role, tensor.layer): format.name
        for tensor, format, _ in choose_formats(MODEL_35B, open_recipe("pocket_4bit"), False)
    }
    assert {formats[Role.EXPERT_GATE, layer] for layer in range(5, 40)} == {"Q4_K"}
    assert {formats[Role.EXPERT_DOWN, layer] for layer in (0, 4, 38, 39)} == {"Q5_K"}
    assert {formats[Role.SHARED_DOWN, layer] for layer in range(40)} == {"Q8_0"}
    assert formats[Role.DELTA_QKV, 1] == formats[Role.ATTN_Q, 3] == "Q6_K"


@pytest.mark.parametrize("format", ["Q4_K", "Q4_0", "IQ4_XS"])
def test_each_expert_is_rounded_with_its_own_importance(format: str, tmp_path: Path) -> None:
    tensor = named(open_model(make_moe(tmp_path / "c")), "blk.0.ffn_up_exps.weight")
    importance = np.random.default_rng(0).uniform(0.01, 30.0, (6, 256)).astype(np.float32)
    quant_format = FORMATS[format]
    expected = np.concatenate(
        [quant_format.encode(tensor.rows(256 * i, 256 * (i + 1)), importance[i]) for i in range(6)]
    )
    assert np.array_equal(pipeline.encode_rows(tensor, 0, 6 * 256, quant_format, importance), expected)
    assert np.array_equal(pipeline.encode_rows(tensor, 200, 900, quant_format, importance), expected[200:900])
    assert np.array_equal(pipeline.encode_rows(tensor, 300, 301, quant_format, importance), expected[300:301])
    same = pipeline.encode_rows(tensor, 0, 6 * 256, quant_format, np.tile(importance[:1], (6, 1)))
    assert np.array_equal(same, pipeline.encode_rows(tensor, 0, 6 * 256, quant_format, importance[0]))
    assert not np.array_equal(same, expected)


def test_importance_must_fit_the_experts(tmp_path: Path) -> None:
    model = open_model(make_moe(tmp_path / "c"))
    ones = np.ones((6, 256), np.float32)
    made = plan(model, open_recipe("q4_k_m"), Importance({"blk.0.ffn_up_exps.weight": ones}, "m.gguf"))
    assert made.importance["blk.0.ffn_up_exps.weight"].shape == (6, 256)
    for wrong in (ones[:5], ones[0], ones[:, :128]):
        with pytest.raises(RecipeError, match=r"blk\.0\.ffn_up_exps\.weight: has .* weights, the tensor wants 6 x 256"):
            plan(model, open_recipe("q4_k_m"), Importance({"blk.0.ffn_up_exps.weight": wrong}, "m.gguf"))


def test_bytes_depend_on_neither_layout_nor_chunks_nor_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_for(moe_config())
    models = [open_model(make_moe(tmp_path / layout / "Tiny", LAYOUTS[layout](weights))) for layout in LAYOUTS]
    rng = np.random.default_rng(1)
    importance = Importance(
        {
            tensor.name: rng.uniform(0.1, 9.0, (*tensor.shape[:-2], tensor.n_cols)).astype(np.float32)
            for tensor in models[0].tensors
            if tensor.role in (Role.EXPERT_GATE, Role.EXPERT_DOWN, Role.SHARED_DOWN)
        },
        "m.gguf",
    )
    files = []
    for model, threads, chunk in ((models[0], 1, 1 << 20), (models[1], 3, 30_000)):
        monkeypatch.setattr(pipeline, "CHUNK_WEIGHTS", chunk)
        write(plan(model, open_recipe("q4_k_m"), importance), tmp_path / "out.gguf", threads=threads)
        files.append((tmp_path / "out.gguf").read_bytes())
    assert files[0] == files[1]


def test_from_a_gguf_equals_from_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = make_moe(tmp_path / "Tiny")
    write(plan(open_model(checkpoint), open_recipe("bf16")), tmp_path / "bf16.gguf")
    back = open_gguf(tmp_path / "bf16.gguf")
    direct = open_model(checkpoint)
    assert [(t.name, t.role, t.layer, t.shape) for t in back.tensors] == [
        (t.name, t.role, t.layer, t.shape) for t in direct.tensors
    ]
    words = back.sizes.keys() & direct.sizes.keys()
    assert {"n_expert", "n_expert_used", "n_ff_exp", "n_ff_shared", "n_shared", "n_v"} <= words
    assert {word: direct.sizes[word] for word in words} == {word: back.sizes[word] for word in words}
    write(plan(back, open_recipe("pocket_4bit")), tmp_path / "two-steps.gguf")
    write(plan(direct, open_recipe("pocket_4bit")), tmp_path / "direct.gguf")
    assert (tmp_path / "two-steps.gguf").read_bytes() == (tmp_path / "direct.gguf").read_bytes()


# ---------------------------------------------------------------- real shapes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_35b_a3b_is_opened_and_planned_in_seconds(layout: str, tmp_path: Path) -> None:
    folder = make_sparse_checkpoint(tmp_path / "Qwen3.5-35B-A3B", CONFIG_35B, experts_one_by_one=layout == "one by one")
    started = time.process_time()  # another process on the machine must not decide
    model = open_model(folder)
    planned = plan(model, open_recipe("q4_k_m"))
    seconds = time.process_time() - started
    print(f"{layout}: {seconds:.2f} s")
    assert seconds < 5
    assert {tensor.name: (tensor.role, tensor.layer, tensor.shape) for tensor in model.tensors} == {
        tensor.name: (tensor.role, tensor.layer, tensor.shape) for tensor in MODEL_35B.tensors
    }
    assert sum(prod(tensor.shape) for tensor in model.tensors) == 34_660_610_688
    assert planned.file_bytes == pytest.approx(21.17e9, rel=0.01)
    if layout == "fused":
        largest = max(len(pickle.dumps(replace(tensor))) for tensor in model.tensors if len(tensor.shape) == 3)
        assert largest < 2000, "what reads half of a fused tensor must not grow with its rows"

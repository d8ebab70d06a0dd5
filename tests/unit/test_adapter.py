"""LoRA adapters: what merging gives, what a GGUF adapter holds, and what is refused before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_maker import SAVED_BY_PEFT, make_adapter, matrices_for, rows_of, targets, write_adapter
from checkpoint_maker import make_checkpoint, moe_config, one_by_one, text_config, weights_for

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.cli.app import app
from pocketquant.convert.adapter import open_adapter
from pocketquant.convert.adapter_gguf import plan_adapter
from pocketquant.convert.adapter_merge import add_product
from pocketquant.errors import PocketquantError, SourceError
from pocketquant.formats.plain import decode_bf16, encode_bf16
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.gguf_file.reading import read_header

PREFIX = "base_model.model."


def product(adapter: dict[str, np.ndarray], module: str, scale: float) -> np.ndarray:
    """scale * B @ A in f64."""
    a, b = (adapter[f"{PREFIX}{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    return scale * (b @ a)


def untied(folder: Path, dtype: str = "F32") -> tuple[Path, dict[str, np.ndarray]]:
    weights = weights_for(text_config(tie_word_embeddings=False))
    return make_checkpoint(folder, dtype=dtype, weights=weights, tie_word_embeddings=False), weights


def bf16(values: np.ndarray) -> np.ndarray:
    flat = np.ascontiguousarray(values, np.float32).reshape(1, -1)
    return decode_bf16(encode_bf16(flat), 0).reshape(values.shape)


def every_module(checkpoint: Path, weights: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    modules = [*targets(checkpoint), "model.embed_tokens", "lm_head"]
    return {module: weights[f"{module}.weight"].shape for module in modules if f"{module}.weight" in weights}


# ---------------------------------------------------------------- merging


def test_breaks_today_08_merging_while_reading_is_merging_first(tmp_path: Path) -> None:
    checkpoint, weights = untied(tmp_path / "base")
    shapes = every_module(checkpoint, weights)
    assert len({module.split(".")[-1] for module in shapes}) == 14  # 5 of DeltaNet, 4 of attention, 3, embedding, head
    adapter = matrices_for(shapes, 4)
    merged = dict(weights)
    for module in shapes:
        if module.endswith("embed_tokens"):
            a, b = (adapter[f"{PREFIX}{module}.lora_embedding_{side}"].astype(np.float64) for side in "AB")
            merged[f"{module}.weight"] = (weights[f"{module}.weight"] + 4.0 * (b @ a).T).astype(np.float32)
        else:
            total = weights[f"{module}.weight"] + product(adapter, module, 4.0)
            merged[f"{module}.weight"] = total.astype(np.float32)
    folder = write_adapter(tmp_path / "lora", adapter, lora_alpha=16, r=4)
    first = make_checkpoint(tmp_path / "merged", dtype="F32", weights=merged, tie_word_embeddings=False)
    ours, expected, base = (open_model(checkpoint, adapter=folder), open_model(first), open_model(checkpoint))
    changed = 0
    for tensor in expected.tensors:
        rows = tensor.rows(0, tensor.n_rows)
        assert np.allclose(rows_of(ours, tensor.name), rows, rtol=2**-23, atol=0), tensor.name
        changed += not np.allclose(rows_of(base, tensor.name), rows, atol=0.01)
    assert changed == len(shapes)
    assert ours.notes == (f"adapter lora: merged into {len(shapes)} tensors (rank 4, scale 4)",)


def test_bf16_output_is_within_one_ulp_of_merging_first_in_bf16(tmp_path: Path) -> None:
    checkpoint, weights = untied(tmp_path / "base", "BF16")
    shapes = {module: weights[f"{module}.weight"].shape for module in targets(checkpoint)}
    adapter = matrices_for(shapes, 4)
    folder = write_adapter(tmp_path / "lora", adapter)
    merged = dict(weights)
    for module in shapes:
        merged[f"{module}.weight"] = bf16(weights[f"{module}.weight"]) + product(adapter, module, 4.0)
    first = make_checkpoint(tmp_path / "merged", weights=merged, tie_word_embeddings=False)
    write(plan(open_model(checkpoint, adapter=folder), open_recipe("bf16")), tmp_path / "ours.gguf")
    ours, expected = open_gguf(tmp_path / "ours.gguf"), open_model(first)
    for tensor in expected.tensors:
        rows = tensor.rows(0, tensor.n_rows)
        ulp = np.spacing(np.abs(rows)) * 2.0**16  # of bf16: 8 bits where f32 has 24
        assert (np.abs(rows_of(ours, tensor.name) - rows) <= ulp).all(), tensor.name


@pytest.mark.parametrize("trained_as", ["model.", "model.language_model.", "language_model.model.", ""])
@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_prefixes_of_adapter_and_checkpoint_need_not_agree(trained_as: str, prefix: str, tmp_path: Path) -> None:
    weights = weights_for(text_config(), prefix)
    checkpoint = make_checkpoint(tmp_path / "base", dtype="F32", prefix=prefix, weights=weights)
    module = "layers.0.linear_attn.in_proj_qkv"
    adapter = matrices_for({trained_as + module: weights[f"{prefix}{module}.weight"].shape}, 4)
    merged = rows_of(open_model(checkpoint, adapter=write_adapter(tmp_path / "lora", adapter)), "blk.0.attn_qkv.weight")
    change = merged - rows_of(open_model(checkpoint), "blk.0.attn_qkv.weight")
    # queries and keys stand at the front in both orders
    assert np.allclose(change[:256], product(adapter, trained_as + module, 4.0)[:256], atol=1e-6)


def test_adapter_name_in_the_tensors_names(tmp_path: Path, checkpoint: Path) -> None:
    plain = matrices_for({"model.layers.0.mlp.up_proj": (512, 256)}, 4)
    named = {name.replace(".weight", ".default.weight"): values for name, values in plain.items()}
    models = [
        open_model(checkpoint, adapter=write_adapter(tmp_path / name, tensors))
        for name, tensors in {"plain": plain, "named": named}.items()
    ]
    assert np.array_equal(*(rows_of(model, "blk.0.ffn_up.weight") for model in models))


def test_scale_follows_rank_alpha_and_patterns(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.{name}_proj": (8, 8) for i in (1, 11) for name in ("up", "gate")}
    ranks = {module: 2 if "up" in module else 4 for module in shapes}
    tensors = matrices_for(shapes, ranks)
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"up_proj": 2}}
    # the whole of a name from a dot on, the first pattern that matches
    config |= {"alpha_pattern": {"layers.1.mlp.gate_proj": 12, r".*\.11\.mlp\.gate_proj": 20, "gate_proj": 40}}
    expected = {(1, "up"): 4.0, (11, "up"): 4.0, (1, "gate"): 3.0, (11, "gate"): 5.0}
    for use_rslora in (False, True):
        folder = write_adapter(tmp_path / f"rs{use_rslora}", tensors, use_rslora=use_rslora, **config)
        scales = {change.module: (change.scale, change.rank) for change in open_adapter(folder).changes}
        for (layer, name), scale in expected.items():
            found, rank = scales[f"model.layers.{layer}.mlp.{name}_proj"]
            assert found == pytest.approx(scale * rank**0.5 if use_rslora else scale)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_rows_do_not_depend_on_the_chunk(dtype: str, tmp_path: Path, checkpoint: Path) -> None:
    model = open_model(checkpoint, adapter=make_adapter(tmp_path / "lora", checkpoint, dtype=dtype, rank=5))
    for tensor in model.tensors:
        whole = tensor.rows(0, tensor.n_rows)
        pieces = [tensor.rows(at, min(at + 7, tensor.n_rows)) for at in range(0, tensor.n_rows, 7)]
        assert np.array_equal(whole, np.concatenate(pieces)), tensor.name


def test_sums_are_rounded_once() -> None:
    rng = np.random.default_rng(0)
    rows, left, right = (rng.standard_normal(shape).astype(np.float32) for shape in ((300, 333), (300, 9), (9, 333)))
    exact = rows.astype(np.float64) + (left.astype(np.float64) * 0.3) @ right.astype(np.float64)
    ours = add_product(rows, left, right, 0.3)
    assert (np.abs(ours - exact) <= np.spacing(np.abs(ours)) * 0.5000001).all()


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_changing_one_of_tied_embedding_and_head_makes_them_two(module: str, tmp_path: Path) -> None:
    weights = weights_for(text_config())
    checkpoint = make_checkpoint(tmp_path / "base", dtype="F32", weights=weights)
    folder = write_adapter(tmp_path / "lora", matrices_for({module: (320, 256)}, 4))
    model, stored = open_model(checkpoint, adapter=folder), weights["model.embed_tokens.weight"]
    assert not model.is_tied
    same = {name: np.array_equal(rows_of(model, name), stored) for name in ("token_embd.weight", "output.weight")}
    assert same == {"token_embd.weight": module == "lm_head", "output.weight": module != "lm_head"}
    assert any("now they are two" in note for note in model.notes)


def test_weights_trained_whole_replace_the_checkpoints(tmp_path: Path) -> None:
    checkpoint, weights = untied(tmp_path / "base")
    head = weights["lm_head.weight"] * 3
    tensors = {
        f"{PREFIX}lm_head.weight": head,
        **matrices_for({"model.embed_tokens": (320, 256)}, 4),
        f"{PREFIX}model.embed_tokens.base_layer.weight": weights["model.embed_tokens.weight"],
    }
    model = open_model(checkpoint, adapter=write_adapter(tmp_path / "lora", tensors, modules_to_save=["lm_head"]))
    assert np.array_equal(rows_of(model, "output.weight"), head)
    assert not np.allclose(rows_of(model, "token_embd.weight"), weights["model.embed_tokens.weight"], atol=0.01)
    assert [note for note in model.notes if "trained whole" in note and "1 weights" in note]


def test_targets_in_the_vision_tower_are_noted(tmp_path: Path) -> None:
    weights = weights_for(text_config()) | {"model.visual.blocks.0.attn.qkv.weight": np.ones((24, 8), np.float32)}
    checkpoint = make_checkpoint(tmp_path / "base", weights=weights)
    tensors = matrices_for({"model.visual.blocks.0.attn.qkv": (24, 8), "model.layers.0.mlp.up_proj": (512, 256)}, 4)
    notes = open_model(checkpoint, adapter=write_adapter(tmp_path / "lora", tensors)).notes
    assert "adapter lora: 1 of these belong to the vision tower, which this file leaves out" in notes


def test_experts_with_a_tensor_each(tmp_path: Path) -> None:
    weights = one_by_one(weights_for(moe_config()))
    checkpoint = make_checkpoint(tmp_path / "base", dtype="F32", weights=weights, num_experts=6)
    modules = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(6)]
    adapter = matrices_for({module: weights[f"{module}.weight"].shape for module in modules}, 4)
    model = open_model(checkpoint, adapter=write_adapter(tmp_path / "lora", adapter))
    expected = np.concatenate([weights[f"{module}.weight"] + product(adapter, module, 4.0) for module in modules])
    assert np.allclose(rows_of(model, "blk.0.ffn_up_exps.weight"), expected, atol=1e-6)


# ---------------------------------------------------------------- GGUF adapter


def matrix(planned: Any, name: str) -> np.ndarray:
    tensor = next(item.tensor for item in planned.tensors if item.tensor.name == name)
    return tensor.rows(0, tensor.n_rows)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"out_proj": 3}}])
@pytest.mark.parametrize("is_moe", [False, True])
def test_breaks_today_08_gguf_adapter_times_base_is_the_merged_model(
    is_moe: bool, config: dict[str, Any], tmp_path: Path
) -> None:
    """alpha / rank * B @ A of the file, as llama.cpp computes it, added to the base GGUF's weight."""
    changes = {"num_experts": 6} if is_moe else {"tie_word_embeddings": False}
    source = moe_config(**changes) if is_moe else text_config(**changes)
    checkpoint = make_checkpoint(tmp_path / "base", dtype="F32", weights=weights_for(source), **changes)
    ranks = {"in_proj_qkv": 3, "o_proj": 6}
    folder = make_adapter(tmp_path / "lora", checkpoint, more=("lm_head", "model.embed_tokens"), ranks=ranks, **config)
    base, merged = open_model(checkpoint), open_model(checkpoint, adapter=folder)
    planned = plan_adapter(open_adapter(folder), base)
    alpha = np.float32(planned.metadata["adapter.lora.alpha"].value)
    targeted = {item.tensor.name.rpartition(".")[0] for item in planned.tensors}
    for tensor in merged.tensors:
        expected = rows_of(base, tensor.name)
        if tensor.name in targeted:
            a, b = matrix(planned, f"{tensor.name}.lora_a"), matrix(planned, f"{tensor.name}.lora_b")
            change = alpha / b.shape[1] * (a @ b.T if tensor.name == "token_embd.weight" else b @ a)
            assert np.abs(change).max() > 0.01
            expected = expected + change
        assert np.allclose(rows_of(merged, tensor.name), expected, atol=2e-6), tensor.name
    assert len(targeted) == len(open_adapter(folder).changes)


def test_gguf_adapter_of_a_gguf_is_that_of_its_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    write(plan(open_model(checkpoint), open_recipe("bf16")), tmp_path / "base.gguf")
    adapter = open_adapter(make_adapter(tmp_path / "lora", checkpoint))
    for name, base in {"a": checkpoint, "b": tmp_path / "base.gguf"}.items():
        write(plan_adapter(adapter, open_model(base), "f16"), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    header = read_header(tmp_path / "a")
    assert {key: header.metadata[key].value for key in header.metadata if "adapter" in key} == {
        "adapter.type": "lora",
        "adapter.lora.alpha": 16.0,
    }
    assert header.metadata["general.type"].value == "adapter"
    assert {tensor.format.name for tensor in header.tensors} == {"F16"}


def test_matrices_of_uniform_adapters_are_kept_as_they_are(tmp_path: Path, checkpoint: Path) -> None:
    tensors = matrices_for({"model.layers.3.self_attn.q_proj": (512, 256)}, 4)
    for use_rslora, alpha in ((False, 16.0), (True, 32.0)):
        folder = write_adapter(tmp_path / f"rs{use_rslora}", tensors, use_rslora=use_rslora)
        planned = plan_adapter(open_adapter(folder), open_model(checkpoint))
        assert planned.metadata["adapter.lora.alpha"].value == alpha
        for side in "AB":
            stored = tensors[f"{PREFIX}model.layers.3.self_attn.q_proj.lora_{side}.weight"]
            assert np.array_equal(matrix(planned, f"blk.3.attn_q.weight.lora_{side.lower()}"), stored)


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        ("model.embed_tokens", (320, 256), "embedding and head are tied"),
        ("lm_head", (320, 256), "embedding and head are tied"),
        ("model.layers.0.self_attn.q_proj", (512, 256), "no such weight"),
        ("model.layers.7.mlp.up_proj", (512, 256), "no such weight"),
        ("model.visual.blocks.0.attn.qkv", (24, 8), "no such weight"),
        ("model.layers.0.mlp.up_proj", (512, 128), r"\[512, 128\], in the base model \[512, 256\]"),
    ],
)
def test_gguf_adapters_that_llama_cpp_cannot_use_are_refused(
    module: str, shape: tuple[int, int], message: str, tmp_path: Path, checkpoint: Path
) -> None:
    adapter = open_adapter(write_adapter(tmp_path / "lora", matrices_for({module: shape}, 4)))
    with pytest.raises(SourceError, match=rf"merge it instead(.|\n)*{module}: .*{message}"):
        plan_adapter(adapter, open_model(checkpoint))


@pytest.mark.parametrize("is_same", [True, False])
def test_base_embedding_saved_along_must_be_the_base_models(is_same: bool, tmp_path: Path) -> None:
    checkpoint, weights = untied(tmp_path / "base")
    saved = weights["model.embed_tokens.weight"].copy()
    saved[7, 7] += 0 if is_same else 1
    tensors = matrices_for({"model.embed_tokens": saved.shape}, 4)
    tensors[f"{PREFIX}model.embed_tokens.base_layer.weight"] = saved
    adapter, base = open_adapter(write_adapter(tmp_path / "lora", tensors)), open_model(checkpoint)
    if is_same:
        assert len(plan_adapter(adapter, base).tensors) == 2
    else:
        with pytest.raises(SourceError, match=r"embed_tokens: brings a base weight along that differs"):
            plan_adapter(adapter, base)


def test_command_plans_and_writes(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_adapter(tmp_path / "lora", checkpoint)
    command = ["adapter", str(folder), "--base", str(checkpoint), "--out", str(tmp_path / "lora.gguf"), "--json", "-q"]
    run = {}
    for options in ((), ("--dry-run",)):
        app(args=[*command, *options], prog_name="pocketquant", standalone_mode=False)
        run[options] = json.loads(capsys.readouterr().out)
    assert run["--dry-run",] == {key: value for key, value in run[()].items() if key != "out"}
    assert run[()]["file_bytes"] == (tmp_path / "lora.gguf").stat().st_size
    assert run[()]["alpha"] == 16
    names = [tensor["name"] for tensor in run[()]["tensors"]]
    assert names == [tensor.name for tensor in read_header(tmp_path / "lora.gguf").tensors]


# ---------------------------------------------------------------- refused

UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ensure_weight_tying": "x"}, "ensure_weight_tying 'x', expected true or false"),
        ({"use_rslora": 1}, "use_rslora '1', expected true or false"),
        ({"peft_type": "LOHA"}, r"peft_type 'LOHA', expected 'LORA'"),
        ({"use_dora": True}, r"use_dora 'True': not supported"),
        ({"lora_bias": True}, r"lora_bias 'True'"),
        ({"bias": "all"}, r"bias 'all'"),
        ({"fan_in_fan_out": True}, r"fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights 'pissa_niter_4': changes the base weights"),
        ({"init_lora_weights": "olora"}, r"init_lora_weights 'olora'"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens"),
        ({"trainable_token_indices": [5]}, r"trainable_token_indices"),
        ({"target_parameters": "mlp.experts.gate_up_proj"}, r"target_parameters .*, expected a list of names"),
        ({"layer_replication": [[0, 4], [2, 5]]}, r"layer_replication"),
        ({"some_new_method": {"x": 1}}, r"some_new_method .*: not supported"),
        ({"r": 0}, r"r 0, expected"),
        ({"lora_alpha": float("nan")}, r"lora_alpha nan"),
        ({"lora_alpha": True}, r"lora_alpha True"),
        ({"lora_alpha": 10**400}, r"lora_alpha inf"),
        ({"lora_alpha": 1e-300}, r"lora_alpha 1e-300"),
        ({"use_rslora": "yes"}, r"use_rslora 'yes'"),
        ({"alpha_pattern": {"(a+)+": 1}}, r"too intricate"),
        ({"alpha_pattern": {".*.*.*x": 1}}, r"too intricate"),
        ({"alpha_pattern": {"(?i)up_proj": 1}}, r"too intricate"),
        ({"alpha_pattern": {"up_(": 1}}, r"alpha_pattern 'up_\('"),
        ({"rank_pattern": {"up_proj": -1}}, r"rank_pattern 'up_proj': -1"),
        ({"rank_pattern": [1]}, r"rank_pattern: expected an object"),
        ({"modules_to_save": "lm_head"}, r"modules_to_save"),
    ],
)
def test_more_than_plain_lora_is_refused_by_name(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", matrices_for({UP: (512, 256)}, 4), **config)
    with pytest.raises(SourceError, match=rf"merge it with PEFT(.|\n)*{message}"):
        open_adapter(folder)


def test_all_offending_settings_are_listed(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", matrices_for({UP: (512, 256)}, 4), use_dora=True, bias="all", r=-1)
    with pytest.raises(SourceError, match=r"r -1(.|\n)*bias 'all'(.|\n)*use_dora"):
        open_adapter(folder)


def changed(**tensors: Any) -> dict[str, np.ndarray]:
    """The matrices of UP with others put in place of some; None takes one away."""
    all_tensors = matrices_for({UP: (512, 256)}, 4) | {
        name.replace("__", "."): value for name, value in tensors.items()
    }
    return {name: value for name, value in all_tensors.items() if value is not None}


A, B = f"{PREFIX}{UP}.lora_A.weight", f"{PREFIX}{UP}.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({A: None}, "its A matrix is missing"),
        ({B: None}, "its B matrix is missing"),
        ({B: np.ones((512, 3))}, r"A \[4, 256\], B \[512, 3\]: A's rows and B's columns differ"),
        ({A: np.ones((8, 256)), B: np.ones((512, 8))}, r"adapter_config\.json says rank 4"),
        ({A: np.ones((4, 1, 4)), B: np.ones((512, 4, 1))}, "LoRA on a convolution"),
        ({f"{PREFIX}{UP}.lora_magnitude_vector": np.ones(512)}, "lora_magnitude_vector"),
        ({f"{PREFIX}{UP}.lora_B.bias": np.ones(512)}, r"lora_B\.bias"),
        ({f"{PREFIX}{UP}.lora_A.other.weight": np.ones((4, 256))}, "a second A matrix"),
        ({f"{PREFIX}{UP}.hada_w1_a": np.ones((4, 256))}, "hada_w1_a"),
        ({f"{PREFIX}model.layers.{'1' * 300}.lora_A.weight": np.ones((4, 256))}, "layers.1111"),
    ],
)
def test_broken_matrices_are_refused(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=rf"no plain LoRA adapter has:\n(.|\n)*{message}"):
        open_adapter(write_adapter(tmp_path / "lora", changed(**tensors)))


def test_adapter_of_another_model_is_refused_with_every_offender(tmp_path: Path, checkpoint: Path) -> None:
    shapes = {UP: (512, 128), "model.layers.9.mlp.up_proj": (512, 256), "model.layers.0.conv": (4, 4)}
    folder = write_adapter(tmp_path / "lora", matrices_for(shapes, 4))
    with pytest.raises(SourceError, match=r"does not fit the checkpoint") as error:
        open_model(checkpoint, adapter=folder)
    assert "layers.0.mlp.up_proj: [512, 128], in the checkpoint [512, 256]" in str(error.value)
    assert "layers.9.mlp.up_proj: the checkpoint has no such weight" in str(error.value)
    assert "layers.0.conv: the checkpoint has no such weight" in str(error.value)


def test_non_finite_matrices_are_named(tmp_path: Path, checkpoint: Path) -> None:
    tensors = changed()
    tensors[A][2, 3] = np.inf
    model = open_model(checkpoint, adapter=write_adapter(tmp_path / "lora", tensors))
    with pytest.raises(SourceError, match=r"adapter_model\.safetensors: model\.layers\.0\.mlp\.up_proj: non-finite"):
        rows_of(model, "blk.0.ffn_up.weight")


def test_folders_that_are_no_adapter(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(SourceError, match=r"no adapter_config\.json"):
        open_adapter(checkpoint)
    folder = write_adapter(tmp_path / "empty", {})
    with pytest.raises(SourceError, match="holds no LoRA matrices"):
        open_adapter(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(SourceError, match=r"pickled adapter_model\.bin is not read"):
        open_adapter(folder)
    (folder / "adapter_config.json").write_text("[]")
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    with pytest.raises(SourceError, match="no JSON object"):
        open_adapter(folder)


def test_adapters_are_not_merged_into_a_gguf(tmp_path: Path, checkpoint: Path) -> None:
    write(plan(open_model(checkpoint), open_recipe("f16")), tmp_path / "base.gguf")
    with pytest.raises(PocketquantError, match="merged into a checkpoint, not into a GGUF"):
        open_model(tmp_path / "base.gguf", adapter=make_adapter(tmp_path / "lora", checkpoint))


def test_settings_of_every_kind_that_changes_nothing(tmp_path: Path) -> None:
    config = {"auto_mapping": {"unsloth_fixed": True}, "init_lora_weights": "gaussian", "eva_config": {"rho": 2.0}}
    folder = write_adapter(tmp_path / "lora", changed(), layers_to_transform=[0], **config)
    assert [change.module for change in open_adapter(folder).changes] == [UP]
    assert json.loads((folder / "adapter_config.json").read_text()).keys() >= SAVED_BY_PEFT.keys()

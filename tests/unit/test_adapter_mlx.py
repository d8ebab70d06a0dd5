"""Adapters of mlx-lm: merged by the rule that its `fuse` states, W + scale * (lora_a @ lora_b) turned; else refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_maker import MODULES, rows_of, targets
from checkpoint_maker import make_checkpoint, moe_config, one_by_one, text_config, weights_for, write_safetensors

from pocketquant import open_model
from pocketquant.convert.adapter import open_adapter
from pocketquant.convert.adapter_gguf import plan_adapter
from pocketquant.errors import SourceError

RANK, SCALE = 4, 0.75
SETTINGS: dict[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 4,
    "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.1},
    "model": "someone/base",
    "optimizer_config": {"adam": {}},
}


def write_mlx(folder: Path, tensors: Mapping[str, np.ndarray], dtype: str = "F32", **settings: Any) -> Path:
    """An adapter's folder as mlx_lm.lora leaves it, an older save beside it."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    write_safetensors(folder / "adapters.safetensors", tensors, dtype)
    (folder / "0000100_adapters.safetensors").write_bytes(b"x")
    return folder


def pair(rng: np.random.Generator, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """lora_a [cols, rank] and lora_b [rank, rows]."""
    a, b = rng.standard_normal((cols, RANK)) / cols**0.5, rng.standard_normal((RANK, rows))
    return a.astype(np.float32), b.astype(np.float32)


def make_pairs(shapes: Mapping[str, tuple[int, int]], prefix: str) -> dict[str, np.ndarray]:
    rng, tensors = np.random.default_rng(8), {}
    for module, (rows, cols) in shapes.items():
        a, b = pair(rng, rows, cols)
        if module.endswith("embed_tokens"):  # the lookup's order: lora_a [n_vocab, rank]
            a, b = pair(rng, cols, rows)
        name = prefix + module.removeprefix("model.") if module != "lm_head" else "language_model.lm_head"
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    return tensors


def merged_by_the_rule(
    weights: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray], prefix: str
) -> dict[str, np.ndarray]:
    """What `fuse` of LoRALinear and LoRAEmbedding computes, in f64."""
    result = dict(weights)
    for name, a in tensors.items():
        if not name.endswith(".lora_a"):
            continue
        module = name.removesuffix(".lora_a")
        a, b = a.astype(np.float64), tensors[f"{module}.lora_b"].astype(np.float64)
        key = "lm_head.weight" if module.endswith("lm_head") else f"model.{module.removeprefix(prefix)}.weight"
        change = SCALE * a @ b if module.endswith("embed_tokens") else (SCALE * b.T) @ a.T
        result[key] = (weights[key] + change).astype(np.float32)
    return result


@pytest.mark.parametrize("prefix", ["language_model.model.", "model."])
def test_every_module_is_merged_by_mlx_lms_rule(prefix: str, tmp_path: Path) -> None:
    weights = weights_for(text_config(tie_word_embeddings=False))
    base = make_checkpoint(tmp_path / "base", dtype="F32", weights=weights, tie_word_embeddings=False)
    modules = [*targets(base, MODULES), "model.embed_tokens", "lm_head"]
    tensors = make_pairs({module: weights[f"{module}.weight"].shape for module in modules}, prefix)
    if prefix == "model.":
        tensors = {name.replace("language_model.lm_head", "lm_head"): values for name, values in tensors.items()}
    folder = write_mlx(tmp_path / "lora", tensors)
    merged = merged_by_the_rule(weights, tensors, prefix)
    first = make_checkpoint(tmp_path / "merged", dtype="F32", weights=merged, tie_word_embeddings=False)
    ours, expected, before = open_model(base, adapter=folder), open_model(first), open_model(base)
    changed = 0
    for tensor in expected.tensors:
        rows = tensor.rows(0, tensor.n_rows)
        np.testing.assert_allclose(rows_of(ours, tensor.name), rows, rtol=2**-22, atol=1e-12, err_msg=tensor.name)
        changed += not np.allclose(rows_of(before, tensor.name), rows, atol=0.01)
    assert changed == len(modules)
    assert f"adapter lora: merged into {len(modules)} tensors (rank 4, scale 0.75)" in ours.notes
    assert "adapter lora: passed over in its folder: 0000100_adapters.safetensors" in ours.notes


def test_a_tied_embedding_stays_tied_as_in_mlx_lm(tmp_path: Path) -> None:
    """LoRAEmbedding.as_linear adds the change to the head, too."""
    weights = weights_for(text_config())
    base = make_checkpoint(tmp_path / "base", dtype="F32", weights=weights)
    name = "language_model.model."
    tensors = make_pairs({"model.embed_tokens": weights["model.embed_tokens.weight"].shape}, name)
    ours = open_model(base, adapter=write_mlx(tmp_path / "lora", tensors))
    assert ours.is_tied
    expected = merged_by_the_rule(weights, tensors, name)["model.embed_tokens.weight"]
    np.testing.assert_allclose(rows_of(ours, "token_embd.weight"), expected, rtol=2**-22, atol=1e-12)


@pytest.mark.parametrize("layout", ["fused", "one by one"])
def test_experts_are_merged_by_mlx_lms_rule(layout: str, tmp_path: Path) -> None:
    config = moe_config()
    weights = weights_for(config)
    stored = weights if layout == "fused" else one_by_one(weights)
    base = make_checkpoint(tmp_path / "base", dtype="F32", weights=stored, **config)
    rng, tensors, expected = np.random.default_rng(3), {}, {}
    n_expert, n_ff, n_embd = (config[key] for key in ("num_experts", "moe_intermediate_size", "hidden_size"))
    model = open_model(base)
    for matrix, (rows, cols) in {"gate": (n_ff, n_embd), "up": (n_ff, n_embd), "down": (n_embd, n_ff)}.items():
        a = rng.standard_normal((n_expert, RANK, cols)).astype(np.float32)
        b = rng.standard_normal((n_expert, rows, RANK)).astype(np.float32)
        module = f"language_model.model.layers.1.mlp.switch_mlp.{matrix}_proj"
        tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
        change = (SCALE * b.astype(np.float64)) @ a.astype(np.float64)
        name = f"blk.1.ffn_{matrix}_exps.weight"
        expected[name] = rows_of(model, name) + change.reshape(-1, cols)
    merged = open_model(base, adapter=write_mlx(tmp_path / "lora", tensors))
    for name, values in expected.items():
        np.testing.assert_allclose(rows_of(merged, name), values, rtol=0, atol=1e-5, err_msg=name)


def test_a_gguf_adapter_is_the_change(tmp_path: Path, checkpoint: Path) -> None:
    modules = {
        "model.layers.0.linear_attn.out_proj": "blk.0.ssm_out",
        "model.layers.3.self_attn.q_proj": "blk.3.attn_q",
    }
    shapes = {module: weights_for(text_config())[f"{module}.weight"].shape for module in modules}
    folder = write_mlx(tmp_path / "lora", make_pairs(shapes, "language_model.model."))
    base, merged = open_model(checkpoint), open_model(checkpoint, adapter=folder)
    planned = plan_adapter(open_adapter(folder), base)
    tensors = {item.tensor.name: item.tensor for item in planned.tensors}
    alpha = planned.metadata["adapter.lora.alpha"].value
    for name in modules.values():
        a, b = (tensors[f"{name}.weight.lora_{side}"] for side in "ab")
        change = alpha / RANK * b.rows(0, b.n_rows) @ a.rows(0, a.n_rows)
        difference = rows_of(merged, f"{name}.weight") - rows_of(base, f"{name}.weight")
        np.testing.assert_allclose(change, difference, rtol=0, atol=1e-5)


GOOD = {"language_model.model.layers.0.mlp.up_proj.lora_a": np.ones((256, RANK), np.float32)} | {
    "language_model.model.layers.0.mlp.up_proj.lora_b": np.ones((RANK, 512), np.float32)
}
UP, SWITCH = (f"language_model.model.layers.0.mlp.{name}up_proj" for name in ("", "switch_mlp."))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fine_tune_type": "dora"}, "'dora', and only LoRA is merged here: DoRA scales every row anew"),
        ({"fine_tune_type": "full", "lora_parameters": None}, "'full', and only LoRA .* whole weights in MLX's layout"),
        ({"lora_parameters": {"rank": 4, "alpha": 16}}, "scale None, expected"),
        ({"lora_parameters": {"rank": 0, "scale": 1.0}}, "rank 0, scale 1.0, expected"),
        ({"lora_parameters": {"rank": "4", "scale": 1.0}}, r"lora_parameters\.rank: '4', expected a whole number"),
        ({"lora_parameters": {"rank": 4, "scale": float("nan")}}, "scale nan, expected"),
        ({"lora_parameters": [4]}, r"lora_parameters: \[4\], expected an object"),
        ({"lora_parameters": {"rank": 8, "scale": 1.0}}, r"lora_b \[4, 512\]: adapter_config.json says rank 8"),
    ],
)
def test_settings_that_mean_something_else_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path, checkpoint: Path
) -> None:
    with pytest.raises(SourceError, match=message):
        open_model(checkpoint, adapter=write_mlx(tmp_path / "lora", GOOD, **settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{UP}.lora_b": None}, r"up_proj: its lora_b is missing"),
        ({f"{UP}.m": np.ones(512, np.float32)}, r"up_proj\.m F32 \[512\]"),
        ({f"{UP}.lora_a": np.ones(256, np.float32)}, "expected two matrices"),
        ({f"{UP}.lora_a": np.ones((128, RANK), np.float32)}, r"\[512, 128\], in the checkpoint \[512, 256\]"),
        ({f"{UP}.lora_a": np.full((256, RANK), np.nan, np.float32)}, "non-finite number in its A or B matrix"),
        ({UP.replace("up", "side") + f".lora_{side}": GOOD[f"{UP}.lora_{side}"] for side in "ab"}, "no such weight"),
        (
            {
                UP.replace("mlp.up", "mlp.switch_mlp.up") + f".lora_{side}": np.ones((2, 4, 4), np.float32)
                for side in "ab"
            },
            "no such weight",
        ),
        ({f"{SWITCH}.lora_a": np.ones((2, 4), np.float32)}, "lora_b is missing"),
    ],
)
def test_matrices_that_are_none_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path, checkpoint: Path
) -> None:
    tensors = {name: values for name, values in {**GOOD, **change}.items() if values is not None}
    folder = write_mlx(tmp_path / "lora", tensors)
    with pytest.raises(SourceError, match=message):
        rows_of(open_model(checkpoint, adapter=folder), "blk.0.ffn_up.weight")


def test_an_adapter_of_mlx_lm_without_weights(tmp_path: Path, checkpoint: Path) -> None:
    folder = write_mlx(tmp_path / "lora", GOOD)
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(SourceError, match=r"an adapter of mlx-lm without adapters\.safetensors"):
        open_model(checkpoint, adapter=folder)
    write_safetensors(folder / "adapters.safetensors", {})
    with pytest.raises(SourceError, match=r"holds no LoRA matrices|no tensors"):
        open_model(checkpoint, adapter=folder)

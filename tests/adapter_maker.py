"""Makes LoRA adapters in the layout that PEFT saves, for any checkpoint, with every entry distinct."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_maker import write_safetensors

MODULES = r"(self_attn|linear_attn|mlp|mlp\.shared_expert)\.\w+_(proj\w*|a|b|z|qkv)"
"""Every projection of attention, Gated DeltaNet and feed-forward."""
SAVED_BY_PEFT = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "someone/base",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def checkpoint_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint of one file."""
    with open(checkpoint / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def targets(checkpoint: Path, modules: str = MODULES) -> list[str]:
    """The checkpoint's modules, as a trained model calls them, whose name inside the block matches."""
    names = [name.removesuffix(".weight") for name in checkpoint_shapes(checkpoint)]
    return [name for name in names if re.fullmatch(rf"(.*\.)?layers\.\d+\.{modules}", name)]


def matrices_for(
    shapes: Mapping[str, tuple[int, int]], rank: int | Mapping[str, int], seed: int = 1, size: float = 1.0
) -> dict[str, np.ndarray]:
    """Module -> [rows, cols], as the tensors of an adapter: distinct random A and B."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (rows, cols) in shapes.items():
        r = rank if isinstance(rank, int) else rank[module]
        is_embedding = module.endswith("embed_tokens")
        keys = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        shapes_of_pair = ((r, rows), (cols, r)) if is_embedding else ((r, cols), (rows, r))
        for key, shape in zip(keys, shapes_of_pair, strict=True):
            values = rng.standard_normal(shape) * (size / r / cols**0.5) ** 0.5
            tensors[f"base_model.model.{module}.{key}"] = values.astype(np.float32)
    return tensors


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray], dtype: str = "F32", **config: Any) -> Path:
    """An adapter's folder; keyword arguments replace settings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**SAVED_BY_PEFT, **config}))
    write_safetensors(folder / "adapter_model.safetensors", tensors, dtype)
    return folder


def make_adapter(
    folder: Path,
    checkpoint: Path,
    *,
    more: tuple[str, ...] = (),
    rank: int = 4,
    ranks: Mapping[str, int] | None = None,
    size: float = 1.0,
    dtype: str = "F32",
    **config: Any,
) -> Path:
    """An adapter on every projection of a checkpoint of one file, and on the modules named in `more`.

    `ranks` gives modules, by the last part of their names, another rank.
    """
    shapes = checkpoint_shapes(checkpoint)
    modules = [*targets(checkpoint), *more]
    rank_of = {module: (ranks or {}).get(module.rpartition(".")[2], rank) for module in modules}
    tensors = matrices_for({module: shapes[f"{module}.weight"] for module in modules}, rank_of, size=size)
    return write_adapter(folder, tensors, dtype, r=rank, rank_pattern=dict(ranks or {}), **config)


PARAMETERS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def expert_factors(
    config: Mapping[str, Any], rank: int, seed: int = 3, size: float = 1.0
) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]:
    """(layer, fused parameter) -> A [n_expert, rank, cols] and B [n_expert, rows, rank], every number distinct."""
    rng = np.random.default_rng(seed)
    n_expert, n_ff, n_embd = (config[key] for key in ("num_experts", "moe_intermediate_size", "hidden_size"))
    factors = {}
    for layer in range(config["num_hidden_layers"]):
        for parameter, (rows, cols) in {"gate_up_proj": (2 * n_ff, n_embd), "down_proj": (n_embd, n_ff)}.items():
            pair = (rng.standard_normal(shape) for shape in ((n_expert, rank, cols), (n_expert, rows, rank)))
            factors[layer, parameter] = tuple((m * (size / rank / cols**0.5) ** 0.5).astype(np.float32) for m in pair)
    return factors


def expert_tensors(
    factors: Mapping[tuple[int, str], tuple[np.ndarray, np.ndarray]], layout: str, only: tuple[int, ...] | None = None
) -> dict[str, np.ndarray]:
    """The same change as PEFT of today saves it ("fused"), as before 0.19 ("swapped"), or by module ("one by one")."""
    tensors = {}
    for (layer, parameter), (a, b) in factors.items():
        n_expert, rank, _ = a.shape
        experts = f"base_model.model.model.layers.{layer}.mlp.experts"
        if layout == "one by one":
            halves = np.split(b, len(PARAMETERS[parameter]), axis=1)
            for part, half in zip(PARAMETERS[parameter], halves, strict=True):
                for e in range(n_expert) if only is None else only:
                    tensors[f"{experts}.{e}.{part}.lora_A.weight"] = a[e]
                    tensors[f"{experts}.{e}.{part}.lora_B.weight"] = half[e]
            continue
        if layout == "swapped":
            a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
        module = experts + ("" if parameter == "down_proj" else ".base_layer")  # wrapped first, so inside
        tensors[f"{module}.lora_A.weight"] = a.reshape(n_expert * rank, -1)
        tensors[f"{module}.lora_B.weight"] = b.transpose(1, 2, 0).reshape(b.shape[1], rank * n_expert)
    return tensors


def write_expert_adapter(
    folder: Path,
    factors: Mapping[tuple[int, str], tuple[np.ndarray, np.ndarray]],
    layout: str,
    only: tuple[int, ...] | None = None,
    **config: Any,
) -> Path:
    """An adapter's folder with the tensors of `expert_tensors`; keyword arguments replace settings."""
    if layout != "one by one":
        config = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], **config}
    settings = {"r": next(iter(factors.values()))[0].shape[1], "lora_dropout": 0.0, **config}
    return write_adapter(folder, expert_tensors(factors, layout, only), **settings)


def rows_of(model: Any, name: str) -> np.ndarray:
    """All of a tensor as f32."""
    tensor = next(tensor for tensor in model.tensors if tensor.name == name)
    return tensor.rows(0, tensor.n_rows)

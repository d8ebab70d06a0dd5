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


def rows_of(model: Any, name: str) -> np.ndarray:
    """All of a tensor as f32."""
    tensor = next(tensor for tensor in model.tensors if tensor.name == name)
    return tensor.rows(0, tensor.n_rows)

"""A LoRA adapter of mlx-lm, read as the same changes that PEFT's adapters make.

mlx-lm multiplies from the other side: x @ lora_a @ lora_b, with `lora_a` [cols, rank] and `lora_b` [rank, rows] of the
weight, times one `scale` that is used as it stands. An embedding's are [rows, rank] and [rank, cols], and where it is
the head as well, both change. Experts keep `lora_a` [n_expert, rank, cols] and `lora_b` [n_expert, rows, rank], for
each of the three matrices that mlx-lm makes of the fused ones.

Source: mlx-lm 0.32.2, `mlx_lm/tuner/lora.py` (fuse), `tuner/utils.py` (load_adapters), `models/qwen3_5_moe.py`
(sanitize).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from pocketquant.convert.adapter import CONFIG, Adapter, LowRank, is_scale
from pocketquant.convert.mapping import READABLE
from pocketquant.convert.safetensors import ITEM_BYTES, StoredTensor, read_safetensors_header
from pocketquant.errors import SourceError, listing
from pocketquant.files.json_kinds import NUMBER, TEXT, WHOLE, Each, Fields, refuse_other_kinds
from pocketquant.files.small import is_present
from pocketquant.files.unchanged import state_of

WEIGHTS = "adapters.safetensors"
_CONFIG_KINDS = Fields(
    {
        "fine_tune_type": TEXT,
        "num_layers": WHOLE,
        "lora_parameters": Fields({"rank": WHOLE, "scale": NUMBER, "dropout": NUMBER, "keys": Each(TEXT)}),
    }
)
_PAIR = re.compile(r"(.{1,192})\.lora_(a|b)")
_EXPERTS = re.compile(r"(.+\.mlp)\.switch_mlp\.(gate_proj|up_proj|down_proj)")
_MOST_EXPERTS = 1 << 16


def is_of_mlx(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is one that mlx-lm wrote."""
    return "peft_type" not in config and bool({"fine_tune_type", "lora_parameters"} & config.keys())


def open_mlx_adapter(folder: Path, config: Mapping[str, Any]) -> Adapter:
    """Opens a folder with adapter_config.json and adapters.safetensors.

    Raises:
        SourceError: the weights are missing; another method than LoRA; matrices missing, of a wrong shape or type, or
            unknown (all listed).
    """
    config_path, weights_path = folder / CONFIG, folder / WEIGHTS
    refuse_other_kinds(config, _CONFIG_KINDS, config_path, SourceError)
    method = config.get("fine_tune_type") or "lora"
    if method != "lora":
        what = "DoRA scales every row anew" if method == "dora" else "it holds whole weights in MLX's layout"
        raise SourceError(
            f"{config_path}: fine_tune_type {method!r:.40}, and only LoRA is merged here: {what}; merge it with "
            "mlx_lm.fuse and convert the result"
        )
    settings = config.get("lora_parameters") or {}
    rank, scale = settings.get("rank"), settings.get("scale")
    if rank is None or scale is None or rank < 1 or not is_scale(scale):
        raise SourceError(
            f"{config_path}: lora_parameters rank {rank!r:.40}, scale {scale!r:.40}, expected a whole number from 1 on "
            "and a positive number: without them mlx-lm loads no adapter, either"
        )
    if not is_present(weights_path):
        raise SourceError(f"{folder}: an adapter of mlx-lm without {WEIGHTS}; give the folder that mlx_lm.lora wrote")
    files = (state_of(config_path), state_of(weights_path))
    changes, problems = _changes(read_safetensors_header(weights_path), rank, float(scale))
    if problems:
        raise SourceError(f"{weights_path}: tensors that no LoRA adapter of mlx-lm has:\n{listing(problems)}")
    if not changes:
        raise SourceError(f"{weights_path}: holds no LoRA matrices")
    folder = folder.resolve()
    return Adapter(folder.name, tuple(changes), {}, {}, folder, keeps_tie=True, files=files)


def _changes(stored: Sequence[StoredTensor], rank: int, scale: float) -> tuple[list[LowRank], list[str]]:
    """What the pairs change, in the order of their modules' names, and what is no pair."""
    pairs: dict[str, dict[str, StoredTensor]] = {}
    problems = []
    for tensor in stored:
        match = _PAIR.fullmatch(tensor.name)
        if match is None:
            problems.append(f"{tensor.name:.192} {tensor.dtype} {list(tensor.shape)}")
        else:
            pairs.setdefault(match[1], {})[match[2]] = tensor
    changes: list[LowRank] = []
    for module, pair in sorted(pairs.items()):
        a, b = pair.get("a"), pair.get("b")
        if a is None or b is None:
            problems.append(f"{module}: its lora_{'a' if a is None else 'b'} is missing")
        elif problem := _problem(module, a, b, rank):
            problems.append(f"{module}: {problem}")
        elif experts := _EXPERTS.fullmatch(module):
            changes += _of_experts(f"{experts[1]}.experts", experts[2], a, b, scale)
        else:
            is_embedding = module.endswith("embed_tokens")
            first, second = (b, a)  # x @ a @ b: the first factor of the weight's product is the second of x's
            changes.append(LowRank(module, first, second, scale, is_embedding, is_transposed=True))
    return changes, problems


def _problem(module: str, a: StoredTensor, b: StoredTensor, rank: int) -> str:
    shapes = f"lora_a {list(a.shape)}, lora_b {list(b.shape)}"
    if a.dtype not in READABLE or b.dtype not in READABLE:
        return f"data types {a.dtype} and {b.dtype}, expected {', '.join(READABLE)}"
    if _EXPERTS.fullmatch(module):
        if len(a.shape) != 3 or len(b.shape) != 3 or a.shape[0] != b.shape[0] or not 0 < a.shape[0] <= _MOST_EXPERTS:
            return f"{shapes}: expected three dimensions each, the first of as many experts"
        ranks = (a.shape[1], b.shape[2])
    elif len(a.shape) != 2 or len(b.shape) != 2:
        return f"{shapes}: expected two matrices"
    else:
        ranks = (a.shape[1], b.shape[0])
    return "" if ranks == (rank, rank) else f"{shapes}: {CONFIG} says rank {rank}"


def _of_experts(block: str, matrix: str, a: StoredTensor, b: StoredTensor, scale: float) -> list[LowRank]:
    """One change for each expert: its matrices lie together in the stacks."""
    return [
        LowRank(f"{block}.{expert}.{matrix}", _part(a, expert), _part(b, expert), scale, is_embedding=False)
        for expert in range(a.shape[0])
    ]


def _part(stack: StoredTensor, expert: int) -> StoredTensor:
    shape = stack.shape[1:]
    at = stack.offset + expert * prod(shape) * ITEM_BYTES[stack.dtype]
    return StoredTensor(f"{stack.name}[{expert}]", stack.file, stack.dtype, shape, at)

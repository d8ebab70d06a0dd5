"""Makes small checkpoints in the exact Hugging Face layout, with every head and channel distinct.

Random numbers with a fixed seed: a wrong permutation, a missing + 1 or a swapped pair of tensors cannot pass a test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pocketquant.architectures import architecture_of_class
from pocketquant.architectures.table import MODEL, TensorRule, shape_of
from pocketquant.formats.plain import encode_bf16

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
QWEN35_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def text_config(**changes: Any) -> dict[str, Any]:
    """A Qwen3.5 text config of 4 blocks and 256 columns; keyword arguments replace keys."""
    config = {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "vocab_size": 320,
        "eos_token_id": 259,
        "hidden_act": "silu",
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000.0,
            "rope_type": "default",
        },
    }
    return {**config, **changes}


def moe_config(**changes: Any) -> dict[str, Any]:
    """The same with a mixture of 6 experts, 2 of them used, in place of the feed-forward."""
    config = text_config(
        architectures=["Qwen3_5MoeForCausalLM"],
        model_type="qwen3_5_moe_text",
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=512,
        tie_word_embeddings=False,
    )
    del config["intermediate_size"]
    return {**config, **changes}


def source_shapes(config: Mapping[str, Any], prefix: str) -> dict[str, tuple[TensorRule, tuple[int, ...]]]:
    """Checkpoint name -> its rule and shape, for every tensor that the config needs; experts fused."""
    architecture = architecture_of_class(config["architectures"][0])
    sizes, kinds = architecture.read_sizes(config), architecture.layer_kinds(config)
    shapes = {}
    for rule in architecture.tensors:
        if rule.alone and config["tie_word_embeddings"]:
            continue
        layers = [None] if rule.where == MODEL else [i for i, kind in enumerate(kinds) if rule.where in ("block", kind)]
        for layer in layers:
            name = rule.source if layer is None else f"layers.{layer}.{rule.source}"
            shapes[name if rule.alone else prefix + name] = rule, shape_of(rule, sizes)
    return shapes


def one_by_one(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights with three tensors for every expert in place of the two fused ones of a block."""
    split: dict[str, np.ndarray] = {}
    for name, values in weights.items():
        before = name.rpartition(".")[0]
        if name.endswith("mlp.experts.gate_up_proj"):
            for expert, matrix in enumerate(values):
                gate, up = np.split(matrix, 2)
                split |= {f"{before}.{expert}.gate_proj.weight": gate, f"{before}.{expert}.up_proj.weight": up}
        elif name.endswith("mlp.experts.down_proj"):
            split |= {f"{before}.{expert}.down_proj.weight": matrix for expert, matrix in enumerate(values)}
        else:
            split[name] = values
    return split


def weights_for(config: Mapping[str, Any], prefix: str = "model.", seed: int = 0) -> dict[str, np.ndarray]:
    """Checkpoint name -> f32 array for every tensor that the config needs."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, (_, shape) in source_shapes(config, prefix).items():
        values = rng.standard_normal(shape).astype(np.float32) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        if name.endswith("A_log"):
            values = rng.uniform(0.0, 2.0, shape).astype(np.float32)
        weights[name] = values
    return weights


def mtp_weights_for(config: Mapping[str, Any], prefix: str = "mtp.", seed: int = 1) -> dict[str, np.ndarray]:
    """Checkpoint name -> f32 array for every tensor of a multi-token-prediction block."""
    rng = np.random.default_rng(seed)
    architecture = architecture_of_class(config["architectures"][0])
    sizes = architecture.read_sizes(config)
    weights = {}
    for rule in architecture.tensors:
        if rule.where in ("mtp", "block", "attention"):
            shape = shape_of(rule, sizes)
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
            name = f"{prefix}{rule.source}" if rule.where == "mtp" else f"{prefix}layers.0.{rule.source}"
            weights[name] = rng.standard_normal(shape).astype(np.float32) * scale
    return weights


def encode(values: np.ndarray, dtype: str) -> bytes:
    """f32 array -> the bytes of a safetensors tensor."""
    if dtype == "BF16":
        return encode_bf16(np.atleast_2d(values).reshape(1, -1)).tobytes()
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def write_safetensors(path: Path, weights: Mapping[str, np.ndarray], dtype: str = "BF16") -> None:
    """One safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, values in weights.items():
        nbytes = values.size * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for values in weights.values():
            file.write(encode(values, dtype))


def tokenizer_json(n_tokens: int = 256, added: list[str] | None = None) -> dict[str, Any]:
    """A byte-level BPE tokenizer of 256 bytes and one merge, with Qwen3.5's split regex and special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(printable)))}
    vocab = {letters[byte]: byte for byte in range(n_tokens)}
    vocab["he"] = 256
    texts = [*SPECIAL, *(added or [])]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 257 + i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": i < len(SPECIAL),
            }
            for i, text in enumerate(texts)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN35_REGEX}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["h", "e"]]},
    }


def write_json_files(folder: Path, config: Mapping[str, Any], tokenizer: Mapping[str, Any] | None = None) -> None:
    """config.json, generation_config.json and the tokenizer's two files."""
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "add_prefix_space": False,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    }
    generation = {"eos_token_id": [259, 257], "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    for name, content in {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer.json": tokenizer or tokenizer_json(),
        "tokenizer_config.json": settings,
    }.items():
        (folder / name).write_text(json.dumps(content))


def make_checkpoint(
    folder: Path,
    *,
    dtype: str = "BF16",
    n_shards: int = 1,
    prefix: str = "model.",
    weights: Mapping[str, np.ndarray] | None = None,
    **changes: Any,
) -> Path:
    """A whole checkpoint folder; `changes` replace keys of the config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = moe_config(**changes) if "num_experts" in changes else text_config(**changes)
    weights = weights_for(config, prefix) if weights is None else weights
    write_json_files(folder, config)
    if n_shards == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return folder
    names = list(weights)
    weight_map = {}
    for shard in range(n_shards):
        file_name = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::n_shards]}
        write_safetensors(folder / file_name, part, dtype)
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(values.size for values in weights.values()) * ITEM_BYTES[dtype]
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _parts(name: str, rule: TensorRule, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors, one for each expert, that stand for a fused one; others as they are."""
    if rule.one_by_one is None:
        return [(name, shape)]
    layer = name.removesuffix(rule.source)
    words = ("gate", "up") if rule.half is not None else ("down",)
    matrix = (shape[1] // len(words), shape[2])
    return [(f"{layer}mlp.experts.{i}.{word}_proj.weight", matrix) for i in range(shape[0]) for word in words]


def make_sparse_checkpoint(
    folder: Path, config: Mapping[str, Any], prefix: str = "model.language_model.", *, experts_one_by_one: bool = False
) -> Path:
    """A checkpoint of any size whose weights are a hole in the file: all zero, no disk used."""
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {}
    at = 0
    for name, (rule, shape) in source_shapes(config, prefix).items():
        for part, part_shape in _parts(name, rule, shape) if experts_one_by_one else [(name, shape)]:
            nbytes = 2 * int(np.prod(part_shape))
            header[part] = {"dtype": "BF16", "shape": list(part_shape), "data_offsets": [at, at + nbytes]}
            at += nbytes
    raw = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    write_json_files(folder, config)
    return folder

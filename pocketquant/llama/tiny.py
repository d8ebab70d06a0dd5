"""Tiny models with every kind of block and every number format, to try llama.cpp's kernels on.

Their weights are random: small numbers in plain formats, random bytes in packed formats. No encoder is needed,
because bytes of at most 47 make every F16, E4M3 or E8M0 scale finite and small, wherever a format keeps its scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from math import prod
from typing import Any

import numpy as np

from pocketquant.architectures.gguf_names import rules_by_name
from pocketquant.architectures.table import Architecture, target_shape_of
from pocketquant.formats import FORMATS, QuantFormat
from pocketquant.gguf_file.header import encode_table
from pocketquant.gguf_file.reading import GgufTensor
from pocketquant.model import Role, Value, padded

_LARGEST_BYTE = 0x2F


def tiny_gguf(architecture: Architecture) -> bytes:
    """A whole GGUF of some three megabytes, of an architecture with a `trial_config`; the same bytes every time."""
    config = architecture.trial_config or {}
    sizes = architecture.read_sizes(config)
    rules = rules_by_name(architecture, architecture.layer_kinds(config), 0)
    rng = np.random.default_rng(7)
    packed = cycle(format for format in FORMATS.values() if format.name != "F32")
    entries, data = [], []
    for name, rule in rules.items():
        if rule.role is Role.HEAD:  # the embedding is the head
            continue
        shape = target_shape_of(rule, sizes)
        kind = FORMATS["F32"] if rule.keep_f32 else FORMATS["Q6_K"] if rule.role is Role.EMBED else next(packed)
        content = _numbers(rule.role, kind, shape, rng)
        entries.append(GgufTensor(name, shape, kind, 0, len(content)))
        data.append(content.ljust(padded(len(content)), b"\0"))
    table = encode_table(_metadata(architecture, config, sizes), entries)
    return b"".join([table.ljust(padded(len(table)), b"\0"), *data])


def _numbers(role: Role, kind: QuantFormat, shape: tuple[int, ...], rng: np.random.Generator) -> bytes:
    count = prod(shape)
    if kind.block_len > 1:
        return rng.integers(0, _LARGEST_BYTE + 1, count // kind.block_len * kind.block_bytes, np.uint8).tobytes()
    values = rng.standard_normal(count).astype(np.float32) / np.float32(16)
    if role is Role.NORM:
        values += 1
    if role is Role.DELTA_DECAY:
        values = -np.abs(values) - np.float32(0.1)
    if kind.name == "F16":
        return values.astype(np.float16).tobytes()
    return values.tobytes() if kind.name == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def _metadata(architecture: Architecture, config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Value]:
    n_vocab = sizes["n_vocab"]
    letters = [chr(code) for code in range(33, 127)]  # one token each, then a merge and the end of a text
    tokens = [*letters[: n_vocab - 2], letters[0] + letters[1], "<|endoftext|>"]
    metadata = {"general.architecture": Value("str", architecture.name), "general.type": Value("str", "model")}
    for rule in architecture.metadata:
        if (value := rule.from_config(config, sizes)) is not None:
            metadata[f"{architecture.name}.{rule.key}"] = Value(rule.kind, value)
    return metadata | {
        "tokenizer.ggml.model": Value("str", "gpt2"),
        "tokenizer.ggml.pre": Value("str", architecture.pre_tokenizers[0].name),
        "tokenizer.ggml.tokens": Value("str[]", tokens),
        "tokenizer.ggml.token_type": Value("i32[]", [1] * (n_vocab - 1) + [3]),
        "tokenizer.ggml.merges": Value("str[]", [f"{letters[0]} {letters[1]}"]),
        "tokenizer.ggml.eos_token_id": Value("u32", n_vocab - 1),
        "tokenizer.ggml.add_bos_token": Value("bool", False),
    }

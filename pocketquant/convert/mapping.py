"""Checkpoint tensors -> the architecture's: every name has its rule, every rule its tensor, every shape fits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.architectures.table import BLOCK, MODEL, Architecture, Order, Sizes, TensorRule, shape_of
from pocketquant.convert.rows import CheckpointRows
from pocketquant.convert.safetensors import StoredTensor
from pocketquant.errors import ArchitectureError, listing
from pocketquant.model import Role, Tensor

READABLE = ("BF16", "F16", "F32")
_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
_HEAD_PREFIXES = ("", "language_model.", "model.")
_COMPARE_WEIGHTS = 1 << 22


def is_tied(
    config: Mapping[str, Any], text_config: Mapping[str, Any], stored: Mapping[str, StoredTensor], notes: list[str]
) -> bool:
    """Whether the embedding is the output head.

    A head saved beside a tied embedding is dropped if it is the same, byte for byte, and kept if it is not.
    """
    head = next(
        (stored[f"{prefix}lm_head.weight"] for prefix in _HEAD_PREFIXES if f"{prefix}lm_head.weight" in stored), None
    )
    stated = text_config.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if head is None:
        return bool(stated) or stated is None
    if not stated:
        return False
    embedding = next((tensor for name, tensor in stored.items() if name.endswith("embed_tokens.weight")), None)
    if embedding is not None and _is_same_data(head, embedding):
        notes.append(f"{head.name}: equal to the tied embedding, left out")
        return True
    notes.append(f"{head.name}: config.json ties it to the embedding but it differs, kept as output head")
    return False


def _is_same_data(first: StoredTensor, second: StoredTensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    n_rows, step = prod(first.shape[:-1]), max(1, _COMPARE_WEIGHTS // first.shape[-1])
    chunks = ((start, min(start + step, n_rows)) for start in range(0, n_rows, step))
    return all(np.array_equal(first.words(*chunk), second.words(*chunk)) for chunk in chunks)


def _prefix_of(stored: Mapping[str, StoredTensor]) -> str:
    candidates = [prefix for prefix in _PREFIXES if f"{prefix}embed_tokens.weight" in stored]
    if len(candidates) != 1:
        raise ArchitectureError(
            "the checkpoint has no embed_tokens.weight under any known prefix: "
            + ", ".join(repr(prefix) for prefix in _PREFIXES)
            if not candidates
            else f"the checkpoint holds two models, under the prefixes {candidates}"
        )
    return candidates[0]


def map_tensors(
    architecture: Architecture,
    sizes: Sizes,
    kinds: tuple[str, ...],
    stored: Mapping[str, StoredTensor],
    tied: bool,
    notes: list[str],
) -> tuple[Tensor, ...]:
    """The model's tensors in file order, once every name, type and shape is known to fit.

    Args:
        architecture: the table.
        sizes: numbers for the dimension words.
        kinds: DELTA or ATTENTION for every block.
        stored: the checkpoint's tensors by name.
        tied: the embedding is the output head.
        notes: what is left out is added here.

    Raises:
        ArchitectureError: tensors missing, unknown or of another shape or type (all listed).
    """
    prefix = _prefix_of(stored)
    expected: dict[str, tuple[TensorRule, int | None]] = {}
    missing: list[str] = []
    for rule, layer in _expected_rules(architecture, kinds):
        if rule.role is Role.HEAD and tied:
            continue
        name = _source_name(rule, layer, prefix, stored)
        expected[name] = (rule, layer)
        if name not in stored:
            missing.append(f"{name} {list(shape_of(rule, sizes))}")
    left_out: dict[str, int] = {}
    unknown = []
    for name, tensor in stored.items():
        if name in expected:
            continue
        reason = _dropped_as(architecture, name, tied)
        if reason is None:
            unknown.append(f"{name} {tensor.dtype} {list(tensor.shape)}")
        else:
            left_out[reason] = left_out.get(reason, 0) + 1
    notes.extend(f"{count} tensors of the {reason}: left out" for reason, count in left_out.items() if reason)
    wrong = [
        f"{name}: {problem}"
        for name, (rule, _) in expected.items()
        if name in stored and (problem := _shape_problem(stored[name], rule, sizes))
    ]
    parts = [
        (missing, f"tensors missing that config.json's {sizes['n_layer']} layers need"),
        (unknown, f"tensors that no {architecture.name} model has"),
        (wrong, "tensors that do not fit config.json"),
    ]
    message = "\n".join(f"{len(items)} {what}:\n{listing(items)}" for items, what in parts if items)
    if message:
        raise ArchitectureError(message)
    orders = lru_cache(maxsize=None)(lambda order: order(sizes))
    return tuple(_tensor(stored[name], rule, layer, orders) for name, (rule, layer) in expected.items())


def _expected_rules(architecture: Architecture, kinds: tuple[str, ...]) -> list[tuple[TensorRule, int | None]]:
    at_model: list[tuple[TensorRule, int | None]] = [
        (rule, None) for rule in architecture.tensors if rule.where == MODEL
    ]
    return at_model + [
        (rule, layer)
        for layer, kind in enumerate(kinds)
        for rule in architecture.tensors
        if rule.where in (BLOCK, kind)
    ]


def _source_name(rule: TensorRule, layer: int | None, prefix: str, stored: Mapping[str, StoredTensor]) -> str:
    if rule.alone:
        names = [f"{head_prefix}{rule.source}" for head_prefix in _HEAD_PREFIXES]
        return next((name for name in names if name in stored), names[0])
    return f"{prefix}{rule.source}" if layer is None else f"{prefix}layers.{layer}.{rule.source}"


def _dropped_as(architecture: Architecture, name: str, tied: bool) -> str | None:
    """What a tensor without a rule is left out as; "" for a head already noted; None if it is unknown."""
    if tied and any(name == f"{prefix}lm_head.weight" for prefix in _HEAD_PREFIXES):
        return ""
    return next((what for prefix, what in architecture.dropped.items() if name.startswith(prefix)), None)


def _shape_problem(tensor: StoredTensor, rule: TensorRule, sizes: Sizes) -> str:
    expected = shape_of(rule, sizes)
    if tensor.shape == expected and tensor.dtype in READABLE:
        return ""
    hint = ""
    if tensor.dtype in ("U8", "I8") and tensor.shape[-1:] == (1,):
        hint = ": this looks like a bitsandbytes 4-bit checkpoint"
    elif len(expected) == 3 and tensor.shape == (expected[0], expected[2], expected[1]):
        hint = ": this looks like a checkpoint saved by MLX"
    words = " ".join(
        f"{word}={size}" if word != str(size) else word for word, size in zip(rule.shape.split(), expected, strict=True)
    )
    if tensor.shape == expected:
        return f"data type {tensor.dtype}, expected {', '.join(READABLE)}"
    return f"{tensor.dtype} {list(tensor.shape)}, expected [{words}]{hint}"


def _tensor(stored: StoredTensor, rule: TensorRule, layer: int | None, orders: Any) -> Tensor:
    shape = tuple(n for n, word in zip(stored.shape, rule.shape.split(), strict=True) if word != "1")

    def order(wanted: Order | None, size: int) -> npt.NDArray[np.int64] | None:
        if wanted is None:
            return None
        indices = orders(wanted)
        return None if np.array_equal(indices, np.arange(size)) else indices

    source = CheckpointRows(stored, shape, order(rule.rows, shape[0]), order(rule.cols, shape[-1]), rule.each)
    name = rule.target if layer is None else f"blk.{layer}.{rule.target}"
    return Tensor(name, rule.role, layer, shape, stored.dtype, source, keep_f32=rule.keep_f32)

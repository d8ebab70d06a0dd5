"""Checkpoint tensors -> the architecture's: every name has its rule, every rule its tensor, every shape fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.architectures.table import (
    ATTENTION,
    BLOCK,
    MODEL,
    MTP,
    Architecture,
    Order,
    Sizes,
    TensorRule,
    shape_of,
    shape_words,
    target_shape_of,
)
from pocketquant.convert.rows import CheckpointRows, ExpertStack
from pocketquant.convert.safetensors import CheckpointTensor
from pocketquant.errors import ArchitectureError, listing
from pocketquant.formats import FORMATS
from pocketquant.model import Role, Tensor

READABLE = tuple(sorted(item.name for item in FORMATS.values() if item.is_plain))
"""Data types of safetensors that weights are read in; their names are those of GGML's plain formats."""
_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
_HEAD_PREFIXES = ("", "language_model.", "model.")
_COMPARE_WEIGHTS = 1 << 22


def is_tied(
    config: Mapping[str, Any], text_config: Mapping[str, Any], stored: Mapping[str, CheckpointTensor], notes: list[str]
) -> bool:
    """Whether the embedding is the output head.

    A vision-language config says so twice, at the top and in its text_config, and transformers goes by the one or the
    other according to the class that it loads (5.24: `Qwen3_5ForConditionalGeneration` by the top, `Qwen3_5ForCausalLM`
    by text_config); where they differ, the other class would start from a random head. So either of them ties. A head
    saved beside a tied embedding is dropped if it is the same, byte for byte, and kept if it is not.
    """
    head = next(
        (stored[f"{prefix}lm_head.weight"] for prefix in _HEAD_PREFIXES if f"{prefix}lm_head.weight" in stored), None
    )
    flags = {
        where: owner["tie_word_embeddings"]
        for where, owner in (("at the top", config), ("in text_config", text_config))
        if owner.get("tie_word_embeddings") is not None
    }
    is_stated = any(flags.values())
    if head is None and is_stated and not all(flags.values()):
        says = ", ".join(f"{str(bool(flag)).lower()} {where}" for where, flag in flags.items())
        notes.append(f"config.json's tie_word_embeddings is {says}; there is no head, so the embedding is the head")
    if head is None:
        return is_stated or not flags
    if not is_stated:
        return False
    embedding = next((tensor for name, tensor in stored.items() if name.endswith("embed_tokens.weight")), None)
    if embedding is not None and is_same_data(head, embedding):
        notes.append(f"{head.name}: equal to the tied embedding, left out")
        return True
    notes.append(f"{head.name}: config.json ties it to the embedding but it differs, kept as output head")
    return False


def is_same_data(first: CheckpointTensor, second: CheckpointTensor) -> bool:
    """Whether two tensors hold the same bytes in the same shape and type."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    n_rows, step = prod(first.shape[:-1]), max(1, _COMPARE_WEIGHTS // first.shape[-1])
    chunks = ((start, min(start + step, n_rows)) for start in range(0, n_rows, step))
    return all(np.array_equal(first.words(*chunk), second.words(*chunk)) for chunk in chunks)


def _prefix_of(stored: Mapping[str, CheckpointTensor]) -> str:
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
    stored: Mapping[str, CheckpointTensor],
    tied: bool,
    notes: list[str],
    mtp: MtpBlock | None = None,
) -> tuple[Tensor, ...]:
    """The model's tensors in file order, once every name, type and shape is known to fit.

    Args:
        architecture: the table.
        sizes: numbers for the dimension words.
        kinds: DELTA or ATTENTION for every block.
        stored: the checkpoint's tensors by name.
        tied: the embedding is the output head.
        notes: what is left out is added here.
        mtp: the multi-token-prediction block to take in; None to leave it out where there is one.

    Raises:
        ArchitectureError: tensors missing, unknown or of another shape or type (all listed).
    """
    prefix = _prefix_of(stored)
    if len(kinds) > len(stored):
        raise ArchitectureError(f"config.json's {len(kinds)} layers are more than the {len(stored)} tensors there are")
    wanted = [
        _wanted(rule, layer, prefix, stored, sizes, mtp)
        for rule, layer in _expected_rules(architecture, kinds, mtp)
        if not (rule.role is Role.HEAD and tied)
    ]
    left_out = _refuse_misfits(architecture, wanted, stored, sizes, tied, mtp)
    notes.extend(f"{count} tensors of the {reason}: left out" for reason, count in left_out.items() if reason)
    orders = lru_cache(maxsize=None)(lambda order: order(sizes))
    return tuple(_tensor(item, stored, sizes, orders) for item in wanted)


@dataclass(frozen=True)
class MtpBlock:
    """A checkpoint's multi-token-prediction block: what its tensors' names start with, and its number in the GGUF."""

    prefix: str
    layer: int


@dataclass(frozen=True)
class _Wanted:
    """A tensor of the model, and the checkpoint's tensors it is read from: one, or one for each expert."""

    rule: TensorRule
    layer: int | None
    names: tuple[str, ...]
    one_by_one: bool = False


def _refuse_misfits(
    architecture: Architecture,
    wanted: Sequence[_Wanted],
    stored: Mapping[str, CheckpointTensor],
    sizes: Sizes,
    tied: bool,
    mtp: MtpBlock | None,
) -> dict[str, int]:
    """How many tensors are left out, by reason; ArchitectureError if any is missing, unknown or does not fit."""
    # Two rules may read the same tensor: a dictionary, so that each offender is named once.
    expected = {name: item for item in wanted for name in item.names}
    missing = [
        f"{name} {list(shape_of(item.rule, sizes, one_by_one=item.one_by_one))}"
        for name, item in expected.items()
        if name not in stored
    ]
    left_out: dict[str, int] = {}
    unknown = []
    for name, tensor in stored.items():
        if name in expected:
            continue
        reason = None if mtp and name.startswith(mtp.prefix) else _dropped_as(architecture, name, tied)
        if reason is None:
            unknown.append(f"{name} {tensor.dtype} {list(tensor.shape)}")
        else:
            left_out[reason] = left_out.get(reason, 0) + 1
    wrong = [
        f"{name}: {problem}"
        for name, item in expected.items()
        if name in stored and (problem := _shape_problem(stored[name], item, sizes))
    ]
    wrong += [problem for item in wanted if (problem := _mixture_problem(item, stored))]
    parts = [
        (missing, f"tensors missing that config.json's {sizes['n_layer']} layers need"),
        (unknown, f"tensors that no {architecture.name} model has"),
        (wrong, "tensors that do not fit config.json"),
    ]
    message = "\n".join(f"{len(items)} {what}:\n{listing(items)}" for items, what in parts if items)
    if message:
        raise ArchitectureError(message)
    return left_out


def _expected_rules(
    architecture: Architecture, kinds: tuple[str, ...], mtp: MtpBlock | None
) -> list[tuple[TensorRule, int | None]]:
    at_model: list[tuple[TensorRule, int | None]] = [
        (rule, None) for rule in architecture.tensors if rule.where == MODEL
    ]
    places: list[tuple[int, tuple[str, ...]]] = [(layer, (BLOCK, kind)) for layer, kind in enumerate(kinds)]
    if mtp:
        places.append((mtp.layer, (BLOCK, ATTENTION, MTP)))
    return at_model + [(rule, layer) for layer, where in places for rule in architecture.tensors if rule.where in where]


def _wanted(
    rule: TensorRule,
    layer: int | None,
    prefix: str,
    stored: Mapping[str, CheckpointTensor],
    sizes: Sizes,
    mtp: MtpBlock | None,
) -> _Wanted:
    if rule.alone:
        names = [f"{head_prefix}{rule.source}" for head_prefix in _HEAD_PREFIXES]
        return _Wanted(rule, layer, (next((name for name in names if name in stored), names[0]),))
    block = prefix if layer is None else f"{prefix}layers.{layer}."
    if mtp and layer == mtp.layer:
        block = mtp.prefix if rule.where == MTP else f"{mtp.prefix}layers.0."
    if rule.one_by_one is not None and f"{block}{rule.source}" not in stored:
        before, after = f"{block}{rule.one_by_one}".split("*")
        names = [f"{before}{expert}{after}" for expert in range(sizes["n_expert"])]
        if any(name in stored for name in names):
            return _Wanted(rule, layer, tuple(names), one_by_one=True)
    return _Wanted(rule, layer, (f"{block}{rule.source}",))


def _dropped_as(architecture: Architecture, name: str, tied: bool) -> str | None:
    """What a tensor without a rule is left out as; "" for a head already noted; None if it is unknown."""
    if tied and any(name == f"{prefix}lm_head.weight" for prefix in _HEAD_PREFIXES):
        return ""
    return next((what for prefix, what in architecture.dropped.items() if name.startswith(prefix)), None)


def _shape_problem(tensor: CheckpointTensor, item: _Wanted, sizes: Sizes) -> str:
    expected = shape_of(item.rule, sizes, one_by_one=item.one_by_one)
    if tensor.shape == expected and tensor.dtype in READABLE:
        return ""
    hint = ""
    if tensor.dtype in ("U8", "I8") and tensor.shape[-1:] == (1,):
        hint = ": this looks like a bitsandbytes 4-bit checkpoint"
    elif len(expected) == 3 and tensor.shape == (expected[0], expected[2], expected[1]):
        # of a convolution [channels, 1, taps], or of experts that another program keeps the other way round
        hint = ": this looks like a checkpoint saved by MLX" if expected[1] == 1 else ": the experts are transposed"
    words = " ".join(
        f"{word}={size}" if word != str(size) else word
        for word, size in zip(shape_words(item.rule, one_by_one=item.one_by_one), expected, strict=True)
    )
    if tensor.shape == expected:
        return f"data type {tensor.dtype}, expected {', '.join(READABLE)}"
    return f"{tensor.dtype} {list(tensor.shape)}, expected [{words}]{hint}"


def _mixture_problem(item: _Wanted, stored: Mapping[str, CheckpointTensor]) -> str:
    """One tensor of the model has one data type, so its experts have to agree on it."""
    dtypes = sorted({stored[name].dtype for name in item.names if name in stored})
    if len(dtypes) < 2:
        return ""
    return f"{item.names[0]} to {item.names[-1]}: the experts differ in data type ({', '.join(dtypes)})"


def _tensor(item: _Wanted, stored: Mapping[str, CheckpointTensor], sizes: Sizes, orders: Any) -> Tensor:
    rule, shape = item.rule, target_shape_of(item.rule, sizes)

    def order(wanted: Order | None, size: int) -> npt.NDArray[np.int64] | None:
        if wanted is None:
            return None
        indices = orders(wanted)
        return None if np.array_equal(indices, np.arange(size)) else indices

    tensors = tuple(stored[name] for name in item.names)
    source: CheckpointTensor | ExpertStack = tensors[0]
    if item.one_by_one:
        source = ExpertStack(tensors, n_rows=shape[1])
    elif rule.half is not None:
        source = ExpertStack(tensors, n_rows=shape[1], first=rule.half * shape[1], stride=2 * shape[1])
    rows = CheckpointRows(source, shape, order(rule.rows, shape[0]), order(rule.cols, shape[-1]), rule.each)
    name = rule.target if item.layer is None else f"blk.{item.layer}.{rule.target}"
    return Tensor(name, rule.role, item.layer, shape, source.dtype, rows, keep_f32=rule.keep_f32)

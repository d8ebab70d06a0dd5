"""The row types of an architecture's table.

An architecture is data: one `TensorRule` per tensor, one `MetadataRule` per key. Every transform of this family is
one-to-one (an order of rows or columns, an element-wise function, dropped dimensions of one), so a rule says all there
is to say about its tensor and every tensor can be streamed in row chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array
from pocketquant.model import Role, Value

Sizes = Mapping[str, int]
Order = Callable[[Sizes], npt.NDArray[np.int64]]
"""For each row (or column) of the output, the row (or column) of the source it comes from."""
ElementWise = Callable[[F32Array], F32Array]

MODEL, BLOCK, DELTA, ATTENTION, MTP = "model", "block", "delta", "attention", "mtp"
"""Where a rule applies: once, in every block, in Gated DeltaNet blocks, in full-attention blocks, in the
multi-token-prediction block (which BLOCK and ATTENTION rules describe too)."""


@dataclass(frozen=True)
class TensorRule:
    """One tensor.

    Attributes:
        where: MODEL, BLOCK, DELTA, ATTENTION or MTP.
        source: name in the checkpoint, after the prefix (and `layers.N.`).
        target: name in GGUF, after `blk.N.` for blocks.
        role: what it is for.
        shape: dimension words of the source's shape; dimensions of one are dropped in the target. `2*` before a word:
            the source holds two tensors there, one below the other, and `half` says which one this is.
        rows: order of the first dimension, None to keep it.
        cols: order of the last dimension, None to keep it.
        each: element-wise function computed in f32, None to keep the numbers.
        keep_f32: runtimes want F32 whatever the recipe says.
        alone: stands beside the prefix, not behind it (`lm_head.weight`).
        half: 0 or 1: which of the two tensors that the source holds for every expert.
        one_by_one: the names in checkpoints that keep one matrix for each expert, `*` for the expert's number.
    """

    where: str
    source: str
    target: str
    role: Role
    shape: str
    rows: Order | None = None
    cols: Order | None = None
    each: ElementWise | None = None
    keep_f32: bool = False
    alone: bool = False
    half: int | None = None
    one_by_one: str | None = None


@dataclass(frozen=True)
class MetadataRule:
    """One key: its name after the architecture's prefix, its type, and how to get it from config.json."""

    key: str
    kind: str
    from_config: Callable[[Mapping[str, Any], Sizes], Any]
    """(text config, sizes) -> value, or None to leave the key out."""


@dataclass(frozen=True)
class Architecture:
    """One GGUF architecture.

    Attributes:
        name: GGUF's `general.architecture`.
        classes: values of config.json's `architectures` that it covers.
        tensors: its tensors, in file order.
        metadata: its keys, in file order.
        read_sizes: text config -> sizes of every dimension word; raises ArchitectureError.
        layer_kinds: text config -> DELTA or ATTENTION for every block.
        sizes_from_gguf: metadata of a GGUF -> the same sizes.
        dropped: checkpoint name prefixes that are left out -> what they are.
        blocks: what a block's names begin with in GGUF, before its number.
        config_keys: dimension words -> the text config's keys of the same number.
    """

    name: str
    classes: tuple[str, ...]
    tensors: tuple[TensorRule, ...]
    metadata: tuple[MetadataRule, ...]
    read_sizes: Callable[[Mapping[str, Any]], Sizes]
    layer_kinds: Callable[[Mapping[str, Any]], tuple[str, ...]]
    sizes_from_gguf: Callable[[Mapping[str, Value]], Sizes]
    dropped: Mapping[str, str]
    blocks: str = "blk"
    config_keys: Mapping[str, str] = field(default_factory=dict)


def shape_words(rule: TensorRule, *, one_by_one: bool = False) -> tuple[str, ...]:
    """Dimension words of the source's shape; of a single expert's if each has its own tensor."""
    words = tuple(rule.shape.split())
    return tuple(word.removeprefix("2*") for word in words[1:]) if one_by_one else words


def shape_of(rule: TensorRule, sizes: Sizes, *, one_by_one: bool = False) -> tuple[int, ...]:
    """The source shape that a rule expects: words looked up in `sizes`, numbers as they stand."""
    return tuple(_size_of(word, sizes) for word in shape_words(rule, one_by_one=one_by_one))


def target_shape_of(rule: TensorRule, sizes: Sizes) -> tuple[int, ...]:
    """The shape in GGUF: the source's without dimensions of one, half as many rows where it holds two tensors."""
    words = (word for word in rule.shape.split() if word != "1")
    return tuple(_size_of(word.removeprefix("2*"), sizes) for word in words)


def _size_of(word: str, sizes: Sizes) -> int:
    if word.startswith("2*"):
        return 2 * sizes[word.removeprefix("2*")]
    return int(word) if word.isdigit() else sizes[word]

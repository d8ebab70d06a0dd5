"""The rows of an architecture's table: a `TensorRule` for each tensor, a `MetadataRule` for each key.

An architecture is data: one `TensorRule` per tensor, one `MetadataRule` per key. Every transform of this family is
one-to-one (an order of rows or columns, an element-wise function, dropped dimensions of one), so a rule says all there
is to say about its tensor and every tensor can be streamed in row chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.formats import F32Array
from pocketquant.model import Role, Value

Sizes = Mapping[str, int]
Order = Callable[[Sizes], npt.NDArray[np.int64]]
"""For each row (or column) of the output, the row (or column) of the source it comes from."""


@dataclass(frozen=True)
class ElementWise:
    """A function of single numbers, computed in f32, and the one that undoes it: f32[n, k] -> f32[n, k] both."""

    name: str
    apply: Callable[[F32Array], F32Array]
    undo: Callable[[F32Array], F32Array]

    def __call__(self, rows: F32Array) -> F32Array:
        return self.apply(rows)


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
    """One key.

    Attributes:
        key: its name, after the architecture's prefix.
        kind: its type.
        from_config: (text config, sizes) -> value, or None to leave the key out.
        needed: a whole number that runtimes do not load the file without.
    """

    key: str
    kind: str
    from_config: Callable[[Mapping[str, Any], Sizes], Any]
    needed: bool = False


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut into words before they become tokens.

    Attributes:
        name: llama.cpp's name for it, `tokenizer.ggml.pre`.
        regex: what tokenizer.json splits by.
        is_nfc: whether the tokenizers with it bring a text into Unicode's NFC first.
    """

    name: str
    regex: str
    is_nfc: bool = False


@dataclass(frozen=True)
class TransformersModel:
    """The model in transformers, where its gradients are computed.

    Attributes:
        module: of `transformers.models`: "qwen3_5".
        classes: what the names of its classes begin with: "Qwen3_5".
        config: (metadata of a GGUF without the architecture's prefix, sizes, kinds of the blocks) -> what `TextConfig`
            is made with, besides `config_keys`.
    """

    module: str
    classes: str
    config: Callable[[Mapping[str, Any], Sizes, Sequence[str]], dict[str, Any]]


def no_problems(metadata: Mapping[str, Value]) -> Iterator[str]:
    """Nothing to say of a GGUF's metadata beyond what `sizes_from_gguf` refuses."""
    return iter(())


def nothing_to_complete(metadata: Mapping[str, Value]) -> Mapping[str, tuple[Value, str]]:
    """No key that other tools leave out."""
    return {}


@dataclass(frozen=True)
class Architecture:
    """One GGUF architecture.

    Attributes:
        name: GGUF's `general.architecture`.
        classes: values of config.json's `architectures` that it covers.
        tensors: its tensors, in file order.
        metadata: its keys, in file order.
        read_sizes: text config -> sizes of every dimension word, `n_layer n_head n_kv n_vocab` among them; raises
            ArchitectureError.
        layer_kinds: text config -> DELTA or ATTENTION for every block.
        sizes_from_gguf: metadata of a GGUF -> the same sizes, without `n_vocab` if the file carries no tokens; raises
            ArchitectureError.
        kinds_from_gguf: (metadata of a GGUF, number of blocks without those of multi-token prediction) -> their kinds.
        dropped: checkpoint name prefixes that are left out -> what they are.
        blocks: what a block's names begin with in GGUF, before its number.
        config_keys: dimension words -> the text config's keys of the same number.
        pre_tokenizers: those that its models have, the usual one first.
        find_problems: metadata of a GGUF -> what no runtime loads or computes sensibly with, one line each.
        complete: metadata of a GGUF -> keys to write where other tools left them out or short, with a note each.
        trial_config: the text config of a tiny model, by which llama.cpp's kernels are tried; None where it has none.
        transformers: the model there; None where it has none.
    """

    name: str
    classes: tuple[str, ...]
    tensors: tuple[TensorRule, ...]
    metadata: tuple[MetadataRule, ...]
    read_sizes: Callable[[Mapping[str, Any]], Sizes]
    layer_kinds: Callable[[Mapping[str, Any]], tuple[str, ...]]
    sizes_from_gguf: Callable[[Mapping[str, Value]], Sizes]
    kinds_from_gguf: Callable[[Mapping[str, Value], int], tuple[str, ...]]
    dropped: Mapping[str, str]
    blocks: str = "blk"
    config_keys: Mapping[str, str] = field(default_factory=dict)
    pre_tokenizers: tuple[PreTokenizer, ...] = ()
    find_problems: Callable[[Mapping[str, Value]], Iterator[str]] = no_problems
    complete: Callable[[Mapping[str, Value]], Mapping[str, tuple[Value, str]]] = nothing_to_complete
    trial_config: Mapping[str, Any] | None = None
    transformers: TransformersModel | None = None

    @property
    def is_text(self) -> bool:
        """Whether it is a text model, not a vision tower."""
        return self.blocks == "blk"

    def has_key(self, key: str) -> bool:
        """Whether one of its rules writes a key."""
        return any(rule.key == key for rule in self.metadata)


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

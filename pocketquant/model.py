"""What every source looks like once it is open, and what every output is before it is written.

A `Model` is a checkpoint or a GGUF, opened: names, roles, shapes, metadata, no data. A `Plan` is an output file,
decided: every tensor's format, size, offset and the reason. Shapes are `[rows, cols]`, as numpy and safetensors write
them; GGUF's reversed order exists only in `gguf_file`.

The words for dimensions, used in tables, docstrings and errors:
    n_embd n_ff n_layer n_head n_kv head_dim   width, feed-forward width, blocks, query and key/value heads, their size
    n_k n_v head_k_dim head_v_dim              Gated DeltaNet's key and value heads and their sizes
    k_dim v_dim conv_dim                       n_k * head_k_dim, n_v * head_v_dim, 2 * k_dim + v_dim
    n_vocab n_ctx n_conv                       rows of the embedding, longest context, taps of DeltaNet's convolution
    n_expert n_expert_used n_shared            experts of a block, those of them a token passes, and the shared one
    n_ff_exp n_ff_shared                       feed-forward width of an expert and of the shared expert
    n_mtp mtp_dim                              multi-token-prediction blocks behind the n_layer, and 2 * n_embd
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pocketquant.files.reading import digest_file
from pocketquant.files.unchanged import FileState
from pocketquant.formats import F32Array, QuantFormat, U8Array


class Role(str, Enum):
    """What a tensor is for. Given once, by the table row that maps its name; recipes and reports speak of roles."""

    EMBED = "embed"
    HEAD = "head"
    NORM = "norm"
    ATTN_Q = "attn_q"
    ATTN_K = "attn_k"
    ATTN_V = "attn_v"
    ATTN_OUT = "attn_out"
    DELTA_QKV = "delta_qkv"
    DELTA_GATE = "delta_gate"
    DELTA_ALPHA = "delta_alpha"
    DELTA_BETA = "delta_beta"
    DELTA_DECAY = "delta_decay"
    DELTA_DT = "delta_dt"
    DELTA_CONV = "delta_conv"
    DELTA_OUT = "delta_out"
    FFN_GATE = "ffn_gate"
    FFN_UP = "ffn_up"
    FFN_DOWN = "ffn_down"
    ROUTER = "router"
    EXPERT_GATE = "expert_gate"
    EXPERT_UP = "expert_up"
    EXPERT_DOWN = "expert_down"
    SHARED_ROUTER = "shared_router"
    SHARED_GATE = "shared_gate"
    SHARED_UP = "shared_up"
    SHARED_DOWN = "shared_down"
    MTP_JOIN = "mtp_join"
    VISION_PATCH = "vision_patch"
    VISION_POSITION = "vision_position"
    VISION_NORM = "vision_norm"
    VISION_BIAS = "vision_bias"
    VISION_QKV = "vision_qkv"
    VISION_OUT = "vision_out"
    VISION_UP = "vision_up"
    VISION_DOWN = "vision_down"
    VISION_MERGE = "vision_merge"


class RowSource(Protocol):
    """Where a tensor's numbers come from. Holds references, not data, and can be pickled."""

    def rows(self, start: int, stop: int) -> F32Array:
        """Rows [start, stop) as f32[n, k], finite; raises SourceError otherwise."""
        ...

    def stored(self, start: int, stop: int) -> npt.NDArray[np.uint8] | None:
        """The same rows as they are stored, u8[n, bytes], where `Tensor.dtype` says how; None if they are computed."""
        ...


@dataclass(frozen=True)
class Tensor:
    """One named tensor, lazily readable.

    Attributes:
        name: name in GGUF.
        role: what it is for.
        layer: its block, None outside the blocks.
        shape: [rows, cols] or [cols]; leading dimensions of experts come first.
        dtype: the format its source stores it in: "BF16", "F32", "Q8_0".
        source: gives its rows.
        keep_f32: True where every runtime wants F32, whatever the recipe says (norms, biases, DeltaNet's scalars).
    """

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    dtype: str
    source: RowSource
    keep_f32: bool = False

    @property
    def n_cols(self) -> int:
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def n_matrix(self) -> int:
        """Matrices of a linear layer: one, or one for each expert."""
        return prod(self.shape[:-2])

    def rows(self, start: int, stop: int) -> F32Array:
        """Rows [start, stop) as f32[n, n_cols]. A tensor of one dimension is one row."""
        return self.source.rows(start, stop)


@dataclass(frozen=True)
class Model:
    """A checkpoint or a GGUF, opened.

    Attributes:
        architecture: GGUF's name for it: "qwen35".
        metadata: GGUF key -> `Value`, in file order, without the keys that describe quantization.
        tensors: in file order.
        sizes: the dimension words above -> numbers.
        notes: what was left out or changed on the way in, for people.
        files: the files that it was opened from, as they were then.
        origin: what tells weights that no local file of `files` holds from others: addresses, commits and ETags.
    """

    architecture: str
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    sizes: Mapping[str, int]
    notes: tuple[str, ...] = ()
    files: tuple[FileState, ...] = ()
    origin: tuple[str, ...] = ()

    @property
    def n_weights(self) -> int:
        """Numbers in all tensors together."""
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is also the output head."""
        return not any(tensor.role is Role.HEAD for tensor in self.tensors)


@dataclass(frozen=True)
class Value:
    """One metadata value: `kind` is u8 i8 u16 i16 u32 i32 u64 i64 f32 f64 bool str, or `kind[]` for an array."""

    kind: str
    value: Any


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of an output file: what it becomes, where it lies, and why.

    Attributes:
        offset: bytes from the start of the data section.
        reason: the rule that chose the format, in words.
    """

    tensor: Tensor
    format: QuantFormat
    offset: int
    nbytes: int
    reason: str


class RowEncoder(Protocol):
    """Rounds rows of a tensor in another way than the format's own encoder.

    Attributes:
        whole: whether a matrix must come as one piece, because its rows are rounded together.
    """

    @property
    def whole(self) -> bool: ...

    def encode(self, tensor: Tensor, start: int, stop: int, quant_format: QuantFormat) -> U8Array:
        """Rows [start, stop) as u8[n, row_bytes]."""
        ...


@dataclass(frozen=True)
class Allocation:
    """How well a plan meets the size that was asked for, and what it is predicted to lose.

    Attributes:
        target: the size, in words.
        fill: the part of it that the plan uses.
        predicted_loss: KL divergence in nats a token, of all tensors together.
        least_loss: no plan within the target is predicted to lose less; equal to `predicted_loss` but for problems
            made to be hard.
    """

    target: str
    fill: float
    predicted_loss: float
    least_loss: float


@dataclass(frozen=True)
class Plan:
    """An output file, decided.

    Attributes:
        header: the finished bytes before the data section, padding included.
        importance: tensor name -> f32[n_cols] (or f32[n_expert, n_cols]) used in rounding.
        rounding: tensor name -> who encodes it, where not the format's own encoder does.
        files: the files that it is made from, as they were when they were opened; `pipeline` compares them at the end.
        origin: as the model's.
        allocation: how well it meets a size that was asked for; None where a recipe decided the types.
    """

    metadata: Mapping[str, Value]
    tensors: tuple[PlannedTensor, ...]
    header: bytes
    importance: Mapping[str, F32Array]
    rounding: Mapping[str, RowEncoder] = field(default_factory=dict)
    files: tuple[FileState, ...] = ()
    origin: tuple[str, ...] = ()
    allocation: Allocation | None = None

    @cached_property
    def digest(self) -> str:
        """Of all that shapes the file's bytes: plans with one digest become one file.

        That is the header, which says every type, how the rounding was done and by which version; the importance; and
        the files that it is made from, statistics among them, told apart by samples of their content, wherever they
        lie. Reads up to 16 MiB of each file once.

        Raises:
            SourceError: a file cannot be read any more.
        """
        shaped_by = [
            hashlib.sha256(self.header).hexdigest(),
            {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in self.importance.items()},
            sorted(digest_file(state.path) for state in self.files),
            self.origin,
        ]
        return hashlib.sha256(json.dumps(shaped_by, sort_keys=True).encode()).hexdigest()

    @property
    def file_bytes(self) -> int:
        """Exact size of the finished file."""
        end = max((planned.offset + planned.nbytes for planned in self.tensors), default=0)
        return len(self.header) + padded(end)

    @property
    def bits_per_weight(self) -> float:
        n_weights = sum(prod(planned.tensor.shape) for planned in self.tensors)
        return 8.0 * sum(planned.nbytes for planned in self.tensors) / n_weights


ALIGNMENT = 32
"""GGUF's default alignment of tensor data, in bytes; llama.cpp writes no other."""


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


__all__ = [
    "ALIGNMENT",
    "Allocation",
    "Model",
    "Plan",
    "PlannedTensor",
    "Role",
    "RowEncoder",
    "RowSource",
    "Tensor",
    "Value",
    "padded",
]

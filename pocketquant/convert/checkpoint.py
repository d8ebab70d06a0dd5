"""A local Hugging Face checkpoint -> `Model`.

Everything is checked on names, shapes and JSON before any weight is read: the architecture is known, every tensor has
its rule and every rule its tensor, every shape is the one the config implies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.architectures import architecture_of_class
from pocketquant.architectures.table import MODEL, Architecture, Order, Sizes, TensorRule, shape_of
from pocketquant.convert.metadata import model_metadata
from pocketquant.convert.safetensors import StoredTensor, read_safetensors_header
from pocketquant.convert.tokenizer import read_tokenizer
from pocketquant.errors import ArchitectureError, SourceError, listing
from pocketquant.files import read_at, read_json
from pocketquant.formats import FORMATS, F32Array, U8Array
from pocketquant.formats.plain import is_finite
from pocketquant.gguf_file import describe_folder
from pocketquant.model import Model, Role, Tensor

READABLE = ("BF16", "F16", "F32")
_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
_HEAD_PREFIXES = ("", "language_model.", "model.")
_COMPARE_BYTES = 8 << 20


@dataclass(frozen=True)
class CheckpointRows:
    """Rows of one checkpoint tensor in GGUF's order; a `RowSource`.

    Attributes:
        stored_tensor: where the numbers lie.
        shape: the target's shape: the source's without dimensions of one.
        rows_order: for each output row its source row; None as stored. For one dimension it orders the entries.
        cols_order: the same for columns.
        each: element-wise function in f32.
    """

    stored_tensor: StoredTensor
    shape: tuple[int, ...]
    rows_order: npt.NDArray[np.int64] | None
    cols_order: npt.NDArray[np.int64] | None
    each: Any

    def stored(self, start: int, stop: int) -> U8Array | None:
        """Rows as stored, u8[n, bytes], finite; None where `each` computes new numbers."""
        return None if self.each else self._words(start, stop).view(np.uint8)

    def rows(self, start: int, stop: int) -> F32Array:
        """Rows [start, stop) as f32[n, n_cols]; SourceError if a number is not finite."""
        words = self._words(start, stop)
        values = FORMATS[self.stored_tensor.dtype].decode(words.view(np.uint8), words.shape[1])
        if self.each is not None:
            values = self.each(values)
            if not is_finite(values, "F32"):
                raise SourceError(f"{self._place(start, stop)}: too large for its transform ({self.each.__name__})")
        return values

    def _words(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        dtype = self.stored_tensor.dtype
        n_cols = self.shape[-1]
        item = "<u4" if dtype == "F32" else "<u2"
        row_bytes = n_cols * np.dtype(item).itemsize

        def read(first: int, last: int) -> npt.NDArray[np.generic]:
            offset = self.stored_tensor.offset + first * row_bytes
            return read_at(self.stored_tensor.path, offset, (last - first) * row_bytes).view(item).reshape(-1, n_cols)

        if len(self.shape) == 1:
            words = read(0, 1)
            words = words if self.rows_order is None else words[:, self.rows_order]
        elif self.rows_order is None:
            words = read(start, stop)
        else:
            words = np.concatenate([read(*run) for run in _runs(self.rows_order[start:stop])])
        if self.cols_order is not None:
            words = words[:, self.cols_order]
        words = np.ascontiguousarray(words)
        if not is_finite(words, dtype):
            raise SourceError(
                f"{self._place(start, stop)}: non-finite weight (infinity or NaN); the checkpoint is broken: "
                "download or save it again"
            )
        return words

    def _place(self, start: int, stop: int) -> str:
        return f"{self.stored_tensor.path}: {self.stored_tensor.name} rows {start} to {stop - 1}"


def _runs(order: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Consecutive source rows as (first, last + 1), so that a head is one read."""
    breaks = np.flatnonzero(np.diff(order) != 1) + 1
    starts = order[np.concatenate([[0], breaks])]
    lengths = np.diff(np.concatenate([[0], breaks, [len(order)]]))
    return [(int(first), int(first + length)) for first, length in zip(starts, lengths, strict=True)]


# ---------------------------------------------------------------- opening


def open_checkpoint(source: Path | str) -> Model:
    """Opens a folder with config.json, tokenizer files and safetensors; reads no weights.

    Raises:
        SourceError: files missing, truncated or contradicting themselves.
        ArchitectureError: unknown class, tensors missing, unknown or of another shape (all listed).
        TokenizerError: a tokenizer that no runtime implements, or one that does not fit the embedding.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise SourceError(
            f"{folder}: no such folder; give a checkpoint folder (config.json, tokenizer.json, *.safetensors) or a "
            "GGUF file"
        )
    config = _read_object(folder / "config.json")
    text_config = config.get("text_config", config)
    if not isinstance(text_config, dict):
        raise SourceError(f"{folder / 'config.json'}: text_config is no object")
    architecture = architecture_of_class(_class_name(config, folder))
    _refuse_quantized(config, folder)
    sizes = architecture.read_sizes(text_config)
    kinds = architecture.layer_kinds(text_config)
    stored = read_tensor_table(folder)
    notes: list[str] = []
    tied = _is_tied(config, text_config, stored, notes)
    tensors = _map_tensors(architecture, sizes, kinds, stored, tied, notes)
    n_weights = sum(prod(tensor.shape) for tensor in tensors)
    metadata = {
        **model_metadata(architecture, text_config, sizes, describe_folder(folder, n_weights)),
        **read_tokenizer(folder, sizes["n_vocab"], config),
    }
    return Model(architecture.name, metadata, tensors, sizes, tuple(notes))


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise SourceError(f"{path}: no JSON object")
    return value


def _class_name(config: Mapping[str, Any], folder: Path) -> str:
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        raise ArchitectureError(f"{folder / 'config.json'}: 'architectures' names no model class")
    return classes[0]


def _refuse_quantized(config: Mapping[str, Any], folder: Path) -> None:
    quantization = config.get("quantization_config") or config.get("quantization")
    if quantization:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else "unnamed"
        raise SourceError(
            f"{folder}: the checkpoint is already quantized ({method}); convert the BF16, F16 or F32 checkpoint it was "
            "made from"
        )


def read_tensor_table(folder: Path) -> dict[str, StoredTensor]:
    """Name -> place of every tensor of `model.safetensors`, or of the shards that the index names.

    Raises:
        SourceError: no safetensors, shards missing, or an index that contradicts the shards.
    """
    index_path = folder / "model.safetensors.index.json"
    if not index_path.exists():
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            found = "no *.safetensors file" if not files else f"{len(files)} *.safetensors files and no index"
            raise SourceError(f"{folder}: {found}; expected model.safetensors, or shards with {index_path.name}")
        return {tensor.name: tensor for tensor in read_safetensors_header(files[0])}
    weight_map = _read_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SourceError(f"{index_path}: weight_map is missing or no object of names")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise SourceError(f"{index_path}: shards outside the folder:\n{listing(outside)}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise SourceError(f"{folder}: shards named in the index are missing; download them:\n{listing(missing)}")
    stored = {tensor.name: tensor for name in names for tensor in read_safetensors_header(folder / name)}
    problems = [f"{name}: not in {shard}" for name, shard in weight_map.items() if name not in stored]
    problems += [f"{name}: in {stored[name].path.name}, not in the index" for name in stored if name not in weight_map]
    if problems:
        raise SourceError(f"{index_path}: the index and the shards contradict each other:\n{listing(problems)}")
    return stored


# ---------------------------------------------------------------- mapping


def _is_tied(
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
    for at in range(0, first.nbytes, _COMPARE_BYTES):
        nbytes = min(_COMPARE_BYTES, first.nbytes - at)
        if not np.array_equal(
            read_at(first.path, first.offset + at, nbytes), read_at(second.path, second.offset + at, nbytes)
        ):
            return False
    return True


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


def _map_tensors(
    architecture: Architecture,
    sizes: Sizes,
    kinds: tuple[str, ...],
    stored: Mapping[str, StoredTensor],
    tied: bool,
    notes: list[str],
) -> tuple[Tensor, ...]:
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
        if rule.where in ("block", kind)
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

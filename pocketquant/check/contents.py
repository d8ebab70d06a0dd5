"""What is checked: a GGUF's header and numbers as they are, or an opened model's.

`open_gguf` refuses what a check has to describe, and its rows refuse numbers that are not finite, so this reads the
header itself and hands out whatever stands in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from pocketquant.architectures import find_architecture
from pocketquant.architectures.gguf_names import block_kinds
from pocketquant.architectures.table import ATTENTION, Architecture
from pocketquant.errors import ArchitectureError
from pocketquant.formats import F32Array, U8Array
from pocketquant.gguf_file.opening import read_rows
from pocketquant.gguf_file.reading import OTHER_KINDS, read_shards
from pocketquant.gguf_file.tensors import GgufTensor, Placed, place_tensor
from pocketquant.model import Model, Tensor, Value

CHUNK_WEIGHTS = 1 << 20

ReadRows = Callable[[int, int], tuple[U8Array, F32Array]]
"""Rows [start, stop) as stored and as numbers."""


@dataclass(frozen=True)
class Entry:
    """One tensor. `format` is the name of a GGML type, `shape` is [rows, cols]."""

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    read: ReadRows

    @property
    def n_cols(self) -> int:
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        return prod(self.shape[:-1])

    def row_chunks(self) -> Iterator[tuple[int, int]]:
        """Row ranges of about a million weights."""
        step = max(1, CHUNK_WEIGHTS // self.n_cols)
        for start in range(0, self.n_rows, step):
            yield start, min(start + step, self.n_rows)


@dataclass(frozen=True)
class Contents:
    """A file or a model: its metadata and tensors, and the table of its architecture if there is one.

    `kind` is the file's `general.type`; an adapter or an importance matrix is no model and has no table.
    """

    architecture: str
    metadata: Mapping[str, Value]
    entries: Mapping[str, Entry]
    table: Architecture | None
    is_file: bool
    kind: str = "model"

    @property
    def is_text(self) -> bool:
        """Whether it is a text model of a known architecture (a vision tower has a table of its own)."""
        return self.table is not None and self.table.is_text

    @property
    def n_blocks(self) -> int:
        """Blocks announced, those of multi-token prediction included, within what any model has."""
        return min(max(self.number("block_count") or 0, 0), 4096)

    @property
    def n_mtp(self) -> int:
        """Blocks of multi-token prediction announced, within reason."""
        return min(max(self.number("nextn_predict_layers") or 0, 0), 16)

    def number(self, key: str) -> int | None:
        """A key of the architecture (`block_count`) if it is there and a whole number."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        return value.value if value is not None and type(value.value) is int else None


def contents_of_gguf(path: Path) -> Contents:
    """Reads the header of any GGUF, of all its shards if it is split; SourceError if that cannot be done."""
    shards = read_shards(path)
    metadata = shards[0][1].metadata
    name, kind = (str(metadata.get(f"general.{key}", Value("str", "")).value) for key in ("architecture", "type"))
    table = None if kind in OTHER_KINDS else find_architecture(name)
    place = _placing(table, metadata)
    entries = {
        item.name: Entry(item.name, item.shape, item.format.name, item.nbytes, partial(_read_gguf, file, item))
        for file, header in shards
        for tensor in header.tensors
        for item in place(tensor)
    }
    return Contents(name, metadata, entries, table, is_file=True, kind=kind)


def _placing(table: Architecture | None, metadata: Mapping[str, Value]) -> Callable[[GgufTensor], tuple[Placed, ...]]:
    """What finds the table's tensors in an entry; where the metadata is broken, every entry is one."""
    try:
        sizes = table.sizes_from_gguf(metadata) if table else {}
    except (ArchitectureError, ZeroDivisionError, TypeError):
        table = None
    if table is None:
        return lambda entry: (Placed(entry.name, entry.shape, (entry,)),)
    kinds = (*block_kinds(table, metadata, sizes["n_layer"]), *[ATTENTION] * sizes.get("n_mtp", 0))
    return lambda entry: place_tensor(entry, table, kinds, sizes)


def contents_of_model(model: Model) -> Contents:
    """An opened checkpoint. Its rows are what would be written, before rounding."""
    entries = {
        tensor.name: Entry(tensor.name, tensor.shape, tensor.dtype, 0, partial(_read_tensor, tensor))
        for tensor in model.tensors
    }
    return Contents(model.architecture, model.metadata, entries, find_architecture(model.architecture), is_file=False)


def _read_gguf(path: Path, tensor: Placed, start: int, stop: int) -> tuple[U8Array, F32Array]:
    raw = read_rows(path, tensor, start, stop)
    with np.errstate(invalid="ignore", over="ignore"):  # numbers that are none are what we look for
        return raw, tensor.format.decode(raw, tensor.shape[-1])


def _read_tensor(tensor: Tensor, start: int, stop: int) -> tuple[U8Array, F32Array]:
    values = np.ascontiguousarray(tensor.rows(start, stop))
    return values.view(np.uint8), values

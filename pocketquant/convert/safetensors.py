"""Reads safetensors headers with bounds; the numbers stay in the file.

The `safetensors` package refuses BF16 for numpy, and we need offsets, not arrays; the format is a length, a JSON header
and data. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketquant.errors import SourceError, listing
from pocketquant.files import read_at
from pocketquant.formats import U8Array

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package itself
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}


@dataclass(frozen=True)
class LocalFile:
    """A file that byte ranges are read from. Anything with this shape can stand for it: a file on a hub, say."""

    path: Path

    def read(self, offset: int, nbytes: int) -> U8Array:
        """Bytes [offset, offset + nbytes); SourceError if they cannot be had."""
        return read_at(self.path, offset, nbytes)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor of a checkpoint lies. `offset` counts from the start of the file."""

    name: str
    file: LocalFile
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def words(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Rows [start, stop) of the tensor seen as [rows, cols], as stored: `<u2` for F16 and BF16, `<u4` for F32."""
        row_bytes = self.shape[-1] * ITEM_BYTES[self.dtype]
        raw = self.file.read(self.offset + start * row_bytes, (stop - start) * row_bytes)
        return raw.view(f"<u{ITEM_BYTES[self.dtype]}").reshape(stop - start, self.shape[-1])


def read_safetensors_header(path: Path) -> list[StoredTensor]:
    """The tensors of one file, in the order of their names.

    Raises:
        SourceError: truncated, no JSON, or offsets that contradict the shapes or the file (all listed).
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise SourceError(
                    f"{path}: the header announces {length} bytes in a file of {size}; it is truncated or no "
                    "safetensors file: download it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"{path}: the header is no JSON ({error}); download the file again") from error
    if not isinstance(header, dict):
        raise SourceError(f"{path}: the header is no JSON object; download the file again")
    tensors, problems = [], []
    for name, entry in sorted(header.items()):
        if name == "__metadata__":
            continue
        tensor = _stored_tensor(path, name, entry, data_offset=8 + length, size=size)
        if isinstance(tensor, str):
            problems.append(f"{name}: {tensor}")
        else:
            tensors.append(tensor)
    tensors_by_offset = sorted(tensors, key=lambda tensor: tensor.offset)
    for first, second in pairwise(tensors_by_offset):
        if first.offset + first.nbytes > second.offset:
            problems.append(f"{second.name}: its data overlaps that of {first.name}")
    if problems:
        raise SourceError(f"{path}: the header contradicts the file; download it again:\n{listing(problems)}")
    return tensors


def _stored_tensor(path: Path, name: str, entry: object, *, data_offset: int, size: int) -> StoredTensor | str:
    """The tensor, or what is wrong with its entry."""
    if not isinstance(entry, dict):
        return "no JSON object"
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in ITEM_BYTES:
        return f"data type {dtype!r} is unknown"
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape) or len(shape) > 8:
        return f"shape {shape!r} is none"
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int for n in offsets):
        return f"data_offsets {offsets!r} are none"
    begin, end = offsets
    tensor = StoredTensor(name, LocalFile(path), dtype, tuple(shape), data_offset + begin)
    if not 0 <= begin <= end or end - begin != tensor.nbytes:
        return f"{dtype} {shape} takes {tensor.nbytes} bytes, data_offsets {offsets} say {end - begin}"
    if data_offset + end > size:
        return f"ends at byte {data_offset + end} of a file of {size} (truncated)"
    return tensor

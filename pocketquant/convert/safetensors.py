"""Reads safetensors headers with bounds; the numbers stay in the file.

The `safetensors` package refuses BF16 for numpy, and we need offsets, not arrays; the format is a length, a JSON header
and data. The tensors cover the data exactly, without holes, and no key comes twice.
https://github.com/huggingface/safetensors#format, and `Metadata::validate` in safetensors/src/tensor.rs, 0.5
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pocketquant.errors import SourceError, listing
from pocketquant.files.reading import read_at
from pocketquant.files.small import parse_json
from pocketquant.files.unchanged import FileState, state_of
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
_LARGEST = 1 << 63  # of any number in a header
_SMALL_BYTES = 1 << 20
_LAYER = re.compile(r".*?\.\d+\.")


class RangeFile(Protocol):
    """A file that byte ranges are read from: on this disk (`LocalFile`) or on a hub. `str()` names it in errors."""

    @property
    def size(self) -> int:
        """Bytes in the whole file; SourceError if it cannot be had."""
        ...

    def read(self, offset: int, nbytes: int) -> U8Array:
        """Bytes [offset, offset + nbytes); SourceError if they cannot be had."""
        ...

    def within(self, start: int, stop: int) -> RangeFile:
        """The same file, told that [start, stop) will be read soon and nothing else through this handle."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file on this disk. `state` is what it was when it was opened; None where nobody compares."""

    path: Path
    state: FileState | None = None

    @property
    def size(self) -> int:
        """Bytes in the whole file; SourceError if it cannot be had."""
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise SourceError(f"{self.path}: cannot be read: {error.strerror}") from error

    def read(self, offset: int, nbytes: int) -> U8Array:
        """Bytes [offset, offset + nbytes); SourceError if they cannot be had."""
        return read_at(self.path, offset, nbytes, self.state)

    def within(self, start: int, stop: int) -> LocalFile:
        """Itself: the operating system reads ahead."""
        return self

    def __str__(self) -> str:
        return str(self.path)


class CheckpointTensor(Protocol):
    """One tensor of a checkpoint, whether its numbers are stored (`StoredTensor`) or computed as they are read."""

    @property
    def name(self) -> str: ...

    @property
    def file(self) -> RangeFile: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def words(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Rows [start, stop) of the tensor seen as [rows, cols]: `<u2` for F16 and BF16, `<u4` for F32."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor of a checkpoint lies. `offset` counts from the start of the file."""

    name: str
    file: RangeFile
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


def read_safetensors_header(source: Path | RangeFile) -> list[StoredTensor]:
    """The tensors of one file, in the order of their names.

    Raises:
        SourceError: truncated, no JSON, keys that come twice, or offsets that contradict the shapes, overlap, or leave
            bytes of the file to no tensor (all listed).
    """
    path = LocalFile(source, state_of(source)) if isinstance(source, Path) else source
    size = path.size
    length = int.from_bytes(path.read(0, 8).tobytes(), "little") if size >= 8 else 0
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise SourceError(
            f"{path}: the header announces {length} bytes in a file of {size}; it is truncated or no "
            "safetensors file: download it again"
        )
    header = _read_object(path, length)
    tensors, problems = [], []
    for name, entry in sorted(header.items()):
        if name == "__metadata__":
            continue
        tensor = _stored_tensor(path, name, entry, data_offset=8 + length, size=size)
        if isinstance(tensor, str):
            problems.append(f"{name}: {tensor}")
        else:
            tensors.append(tensor)
    tensors_by_offset = sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes))
    problems += _find_misplaced(tensors_by_offset, 8 + length, size, holes=not problems)
    if problems:
        raise SourceError(f"{path}: the header contradicts the file; download it again:\n{listing(problems)}")
    extents = _read_together(tensors_by_offset)
    return [
        StoredTensor(tensor.name, path.within(*extents[tensor.name]), tensor.dtype, tensor.shape, tensor.offset)
        for tensor in tensors
    ]


def _read_object(path: RangeFile, length: int) -> dict[str, Any]:
    """The header as JSON; no object in it has a key twice, since readers differ in which of the two they believe."""
    header = parse_json(path.read(8, length).tobytes(), f"{path}, header", unique=True)
    if not isinstance(header, dict):
        raise SourceError(f"{path}: the header is no JSON object; download the file again")
    return header


def _find_misplaced(tensors_by_offset: list[StoredTensor], start: int, stop: int, *, holes: bool) -> list[str]:
    """What keeps tensors from covering the file's bytes [start, stop) exactly; `holes` False leaves holes out."""
    problems, at, last = [], start, ""
    for tensor in tensors_by_offset:
        end = tensor.offset + tensor.nbytes
        if tensor.offset < at:
            problems.append(f"{tensor.name}: its data overlaps that of {last}")
        elif tensor.offset > at and holes:
            hole = tensor.offset - at
            problems.append(f"{tensor.name}: begins at byte {tensor.offset}; the {hole} before it belong to no tensor")
        if end > at:
            at, last = end, tensor.name
    if at < stop and holes:
        problems.append(f"the last {stop - at} of the file's {stop} bytes belong to no tensor")
    return problems


def _read_together(tensors_by_offset: list[StoredTensor]) -> dict[str, tuple[int, int]]:
    """Name -> bytes [start, stop) worth reading with it: itself, or a run of small neighbours of one layer.

    A layer is wanted whole or not at all, and on a hub a request for 64 bytes takes as long as one for 64 KiB.
    There are no holes, so neighbours touch.
    """
    groups: list[list[StoredTensor]] = []
    for tensor in tensors_by_offset:
        layer, last = _LAYER.match(tensor.name), groups[-1][-1] if groups else None
        if (
            last is not None
            and layer is not None
            and last.name.startswith(layer[0])
            and max(last.nbytes, tensor.nbytes) <= _SMALL_BYTES
        ):
            groups[-1].append(tensor)
        else:
            groups.append([tensor])
    return {tensor.name: (group[0].offset, group[-1].offset + group[-1].nbytes) for group in groups for tensor in group}


def _stored_tensor(path: RangeFile, name: str, entry: object, *, data_offset: int, size: int) -> StoredTensor | str:
    """The tensor, or what is wrong with its entry."""
    if not isinstance(entry, dict):
        return "no JSON object"
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"data type {dtype!r:.80} is unknown"
    if not isinstance(shape, list) or any(type(n) is not int or not 0 <= n < _LARGEST for n in shape) or len(shape) > 8:
        return f"shape {shape!r:.80} is none"
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(n) is not int or abs(n) >= _LARGEST for n in offsets)
    ):
        return f"data_offsets {offsets!r:.80} are none"
    begin, end = offsets
    tensor = StoredTensor(name, path, dtype, tuple(shape), data_offset + begin)
    if not 0 <= begin <= end or end - begin != tensor.nbytes:
        return f"{dtype} {shape} takes {tensor.nbytes} bytes, data_offsets {offsets} say {end - begin}"
    if data_offset + end > size:
        return f"ends at byte {data_offset + end} of a file of {size} (truncated)"
    return tensor

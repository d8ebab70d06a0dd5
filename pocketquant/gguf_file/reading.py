"""Headers of GGUF files and of their shards.

Reading is bounded: a file comes from anywhere.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little endian.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from pocketquant.errors import SourceError, listing
from pocketquant.files.small import open_regular
from pocketquant.files.unchanged import FileState, state_of
from pocketquant.formats import BY_GGML_ID
from pocketquant.formats.unread import describe_unread
from pocketquant.gguf_file.tensors import GgufTensor as GgufTensor
from pocketquant.gguf_file.values import KINDS, PACKED
from pocketquant.model import ALIGNMENT, Value

_STRUCTS = {kind: struct.Struct("<" + letter) for kind, letter in PACKED.items()}
_MAX_HEADER_BYTES = 256 << 20
_MAX_ITEMS = 1 << 23
"""Of all arrays of a header; real ones have less than a million."""
_READ_AHEAD, _READ_AT_ONCE = 1 << 20, 1 << 24
_MAX_TENSORS = 1 << 20
_MAX_KEYS = 1 << 16
_MAX_DIMS = 4
_SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

OTHER_KINDS = {"adapter": "a LoRA adapter", "imatrix": "an importance matrix"}
"""`general.type` of GGUF files that are no models -> what they are, for people."""


@dataclass(frozen=True)
class GgufHeader:
    """Everything before the data section. `data_offset` counts from the start of the file, `state` tells it again."""

    metadata: Mapping[str, Value]
    tensors: tuple[GgufTensor, ...]
    data_offset: int
    state: FileState


# ---------------------------------------------------------------- reading


class _Cursor:
    """Reads numbers and strings from the front of a file, never past its end and never more than a header may have.

    What has been read is kept from the first byte on, a little ahead of what is asked for.
    """

    def __init__(self, state: FileState, file: BinaryIO) -> None:
        self.path, self.size, self.at = state.path, state.size, 0
        self._file, self._data, self._items = file, bytearray(), 0

    def fail(self, what: str) -> SourceError:
        return SourceError(f"{self.path}: {what} at byte {self.at}; the file is truncated or no GGUF that we can read")

    def take(self, nbytes: int) -> int:
        """Has the next bytes in memory and steps over them; gives the place of the first."""
        start, end = self.at, self.at + nbytes
        if end > len(self._data):
            self._read_on(nbytes)
        self.at = end
        return start

    def _read_on(self, nbytes: int) -> None:
        if nbytes > self.size - self.at:
            raise self.fail(f"{nbytes} more bytes announced than the file has")
        end = self.at + nbytes
        if end > _MAX_HEADER_BYTES:
            raise self.fail(f"a header of more than {_MAX_HEADER_BYTES} bytes")
        wanted = min(max(end, 2 * len(self._data), _READ_AHEAD), self.size)
        while len(self._data) < wanted:
            piece = self._file.read(min(wanted - len(self._data), _READ_AT_ONCE))
            if not piece:
                raise SourceError(f"{self.path}: ends before byte {end}; was it changed while being read?")
            self._data += piece

    def number(self, kind: str) -> Any:
        packed = _STRUCTS[kind]
        return packed.unpack_from(self._data, self.take(packed.size))[0]

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        items: list[str] = []
        length_at, data = _STRUCTS["u64"].unpack_from, self._data
        try:
            for _ in range(count):  # of half a million strings, so as little as possible for each
                start = self.at + 8
                if start > len(data):
                    self._read_on(8)
                end = start + length_at(data, self.at)[0]
                self.at = start
                if end > len(data):
                    self._read_on(end - start)
                items.append(data[start:end].decode())
                self.at = end
        except UnicodeDecodeError:
            raise self.fail("text that is no UTF-8") from None
        return items

    def _count_items(self, count: int, what: str) -> None:
        """An item takes up to 60 times as many bytes in memory as in the file."""
        self._items += count
        if count > self.size - self.at or self._items > _MAX_ITEMS:
            raise self.fail(f"an array of {count} {what}")

    def value(self) -> Value:
        kind = self.kind()
        if kind == "str":
            return Value(kind, self.string())
        if kind != "[]":
            return Value(kind, self.number(kind))
        item, count = self.kind(), self.number("u64")
        if item == "[]":
            raise self.fail("an array of arrays")
        if item == "str":
            self._count_items(count, "strings")
            return Value("str[]", self.strings(count))
        self._count_items(count, "numbers")
        start = self.take(count * _STRUCTS[item].size)
        return Value(f"{item}[]", list(struct.unpack_from(f"<{count}{PACKED[item]}", self._data, start)))

    def kind(self) -> str:
        number = self.number("u32")
        if number >= len(KINDS):
            raise self.fail(f"metadata type {number}")
        return KINDS[number]


def is_gguf(path: Path) -> bool:
    """Whether a file starts with GGUF's magic."""
    with open_regular(path) as file:
        return file.read(4) == b"GGUF"


def read_header(path: Path | str) -> GgufHeader:
    """Reads metadata and tensor table, and checks every length, offset and size against the file.

    Raises:
        SourceError: not a GGUF of version 2 or 3, or one that contradicts itself.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            state = state_of(path, file.fileno())
            if file.read(4) != b"GGUF":
                raise SourceError(f"{path}: no GGUF file (it does not start with 'GGUF')")
            file.seek(0)
            header = _read_header(_Cursor(state, file), state)
            state.check(file.fileno())
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    return header


def _read_header(cursor: _Cursor, state: FileState) -> GgufHeader:
    cursor.take(4)
    version = cursor.number("u32")
    if version in (2 << 24, 3 << 24):
        raise SourceError(
            f"{cursor.path}: a big-endian GGUF, made for another kind of processor; turn it around first, with "
            f"gguf-py's `gguf-convert-endian {cursor.path.name} little`, which rewrites the file in place"
        )
    if version not in (2, 3):
        raise cursor.fail(f"GGUF version {version}")
    n_tensors, n_keys = cursor.number("u64"), cursor.number("u64")
    if n_tensors > _MAX_TENSORS or n_keys > _MAX_KEYS:
        raise cursor.fail(f"{n_tensors} tensors and {n_keys} keys announced")
    metadata: dict[str, Value] = {}
    for _ in range(n_keys):
        key = cursor.string()
        if key in metadata:
            raise cursor.fail(f"key {key!r} for the second time")
        metadata[key] = cursor.value()
    alignment = metadata.get("general.alignment", Value("u32", ALIGNMENT)).value
    if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment {alignment!r}, no power of two,")
    tensors = _read_tensor_table(cursor, n_tensors, alignment, state.size)
    data_offset = -(-cursor.at // alignment) * alignment
    return GgufHeader(metadata, tensors, data_offset, state)


def _read_tensor_table(cursor: _Cursor, n_tensors: int, alignment: int, size: int) -> tuple[GgufTensor, ...]:
    entries = []
    for _ in range(n_tensors):
        name, n_dims = cursor.string(), cursor.number("u32")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise cursor.fail(f"tensor {name!r} of {n_dims} dimensions")
        shape = tuple(cursor.number("u64") for _ in range(n_dims))[::-1]
        entries.append((name, shape, cursor.number("u32"), cursor.number("u64")))
    data_offset = -(-cursor.at // alignment) * alignment
    tensors, problems, unread, seen = [], [], [], set()
    for name, shape, ggml_id, offset in entries:
        quant_format = BY_GGML_ID.get(ggml_id)
        if name in seen:
            problems.append(f"{name}: stands twice in the table")
        elif quant_format is None:
            unread.append(f"{name}: {describe_unread(ggml_id)}")
        elif shape[-1] % quant_format.block_len or not all(0 < n < 1 << 40 for n in shape):
            problems.append(f"{name}: shape {list(shape)} is none that {quant_format.name} can have")
        else:
            nbytes = prod(shape[:-1]) * quant_format.row_bytes(shape[-1])
            if offset % alignment or data_offset + offset + nbytes > size:
                problems.append(
                    f"{name}: {nbytes} bytes at {data_offset + offset} do not lie aligned within the file's {size}"
                )
            tensors.append(GgufTensor(name, shape, quant_format, data_offset + offset, nbytes))
        seen.add(name)
    if problems:
        raise SourceError(f"{cursor.path}: broken tensor table (a truncated download?):\n{listing(problems)}")
    if unread:
        raise SourceError(
            f"{cursor.path}: tensors in types that are not read here; take the file in another type, or the "
            f"checkpoint:\n{listing(unread)}"
        )
    return tuple(tensors)


def shard_paths(path: Path, count: int) -> list[Path]:
    """The names that llama.cpp gives to the shards of a file: NAME-00001-of-00003.gguf."""
    return [path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def read_shards(path: Path | str) -> list[tuple[Path, GgufHeader]]:
    """The header of a GGUF, or of every shard of a split one; `path` is then its first shard.

    Raises:
        SourceError: a broken file, another shard than the first, or shards that are missing or do not belong together
            (all listed).
    """
    path = Path(path)
    first = read_header(path)
    count = first.metadata.get("split.count", Value("u16", 0)).value
    if type(count) is not int or count < 2:
        return [(path, first)]
    name = _SHARD_NAME.fullmatch(path.name)
    if name is None or int(name[3]) != count or not 1 <= int(name[2]) <= count:
        raise SourceError(
            f"{path}: one of {count} shards, which runtimes find by names like {shard_paths(path, count)[0].name}; "
            "give all of them their names back"
        )
    paths = shard_paths(path.with_name(f"{name[1]}.gguf"), count)
    if int(name[2]) != 1:
        raise SourceError(f"{path}: shard {int(name[2])} of {count}; open the first one, {paths[0].name}")
    missing = [shard.name for shard in paths if not shard.is_file()]
    if missing:
        raise SourceError(f"{path}: {len(missing)} of {count} shards are missing:\n{listing(missing)}")
    shards = [(path, first), *((shard, read_header(shard)) for shard in paths[1:])]
    problems = []
    for number, (shard, header) in enumerate(shards):
        stated = tuple(header.metadata.get(f"split.{key}", Value("u16", None)).value for key in ("no", "count"))
        if stated != (number, count):
            problems.append(f"{shard.name}: says that it is number {stated[0]} of {stated[1]}, counted from 0")
    names = [tensor.name for _, header in shards for tensor in header.tensors]
    announced = first.metadata.get("split.tensors.count", Value("i32", len(names))).value
    if announced != len(names):
        problems.append(f"{len(names)} tensors in all, split.tensors.count says {announced}")
    problems += [f"{name}: in more than one shard" for name, times in Counter(names).items() if times > 1]
    if problems:
        raise SourceError(f"{path}: shards that do not belong together:\n{listing(problems)}")
    return shards

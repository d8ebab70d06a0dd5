"""One GGUF in several files, none larger than a limit: planned as such, or split and joined again byte for byte.

The shards are those of llama.cpp's gguf-split (tools/gguf-split/gguf-split.cpp, b10359): NAME-00001-of-0000N.gguf, the
metadata in the first one, three `split.*` keys in each, the tensors in their order. Here the limit holds for whole
files; gguf-split counts tensors alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from pocketquant.errors import OutputError, SourceError, listing
from pocketquant.files.reading import read_at
from pocketquant.files.replacing import check_target, refuse_overwriting, replacing_together
from pocketquant.files.unchanged import FileState, check_unchanged
from pocketquant.gguf_file.header import encode_header, encode_table
from pocketquant.gguf_file.reading import GgufTensor, read_shards, shard_paths
from pocketquant.model import Plan, Value, padded

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,6})?) ?(?:([KMGT])(I?))?B?", re.IGNORECASE)
_MAX_SHARDS = 65535  # split.count is a u16
_COPIED_AT_ONCE = 8 << 20

_ONE_FILE_ONLY = {"mmproj": "vision tower", "adapter": "adapter", "imatrix": "importance matrix"}
"""`general.type` of the files that llama.cpp does not read in shards -> what they are, for people."""

OnBytes = Callable[[int], None]


def parse_size(text: str) -> int:
    """Bytes from "512M", "2GB" (powers of 1000, as gguf-split's), "1.5GiB" (powers of 1024) or a plain number.

    Raises:
        OutputError: no size, or none above zero.
    """
    match = _SIZE.fullmatch(text.strip())
    nbytes = 0
    if match:
        exponent = " KMGT".index(match[2].upper()) if match[2] else 0
        nbytes = int(Decimal(match[1]) * (1024 if match[3] else 1000) ** exponent)
    if nbytes < 1:
        raise OutputError(f"{text!r}: no size; write one like 512M, 2GB or 1.5GiB")
    return nbytes


def split_plan(plan: Plan, target: Path, max_bytes: int | None) -> list[tuple[Plan, Path]]:
    """The files that a plan is written as: itself, or shards where it is larger than the limit.

    Args:
        plan: the whole output.
        target: its path; shards are named after it.
        max_bytes: limit for a file; None for no limit.

    Returns:
        Plans and paths for `pocketquant.gguf_file.writing.write_together`, in order.

    Raises:
        OutputError: a tensor, or the metadata, is larger than the limit.
    """
    if max_bytes is None or plan.file_bytes <= max_bytes:
        return [(plan, target)]
    items = plan.tensors
    entries = [GgufTensor(item.tensor.name, item.tensor.shape, item.format, 0, item.nbytes) for item in items]
    shards = []
    for metadata, start, stop in _shards(plan.metadata, entries, max_bytes):
        offset, tensors = 0, []
        for item in items[start:stop]:
            tensors.append(replace(item, offset=offset))
            offset += padded(item.nbytes)
        shards.append(replace(plan, metadata=metadata, tensors=tuple(tensors), header=encode_header(metadata, tensors)))
    return list(zip(shards, shard_paths(target, len(shards)), strict=True))


def check_whole(what: str, path: Path, file_bytes: int, max_bytes: int | None) -> None:
    """Refuses a file of a kind that llama.cpp does not read in shards, where it is larger than the limit.

    An mmproj, an adapter and an importance matrix are each read from the one file named (`tools/mtmd/clip.cpp`,
    `src/llama-adapter.cpp`, `common/imatrix-loader.cpp`, b10359); only models are looked for in shards.

    Args:
        what: the kind, for people: "vision tower".
        path: of the output.
        file_bytes: its size.
        max_bytes: limit for a file; None for no limit.

    Raises:
        OutputError: it does not fit into one file.
    """
    if max_bytes is not None and file_bytes > max_bytes:
        raise OutputError(
            f"{path.name}: the {what} takes {file_bytes:,} bytes, a file may have {max_bytes:,}, and llama.cpp reads "
            "its kind from one file alone; allow more, or choose smaller types for it"
        )


def split_file(source: Path, target: Path, max_bytes: int, on_bytes: OnBytes | None = None) -> list[Path]:
    """Splits a GGUF, or splits one anew whose first shard is given; the tensors' bytes stay as they are.

    Args:
        source: any GGUF, of whatever architecture.
        target: names the shards; one file of this name is written if all fits into it.
        max_bytes: limit for a file.
        on_bytes: called with the number of bytes just copied.

    Returns:
        The files, in order.

    Raises:
        SourceError: a broken file, or one laid out in another way than llama.cpp does.
        OutputError: a tensor larger than the limit, or a kind of file that llama.cpp does not read in shards; no space,
            no permission; a folder in the place of the target.
    """
    check_target(target)
    metadata, places = _whole(source)
    whole = padded(len(encode_table(metadata, [entry for _, entry in places])))
    file_bytes = whole + sum(padded(entry.nbytes) for _, entry in places)
    if file_bytes <= max_bytes:
        return _copy([(metadata, places)], [target], on_bytes)
    kind = str(metadata.get("general.type", Value("str", "")).value)
    if kind in _ONE_FILE_ONLY:
        check_whole(_ONE_FILE_ONLY[kind], target, file_bytes, max_bytes)
    bounds = _shards(metadata, [entry for _, entry in places], max_bytes)
    files = [(shard_metadata, places[start:stop]) for shard_metadata, start, stop in bounds]
    return _copy(files, shard_paths(target, len(files)), on_bytes)


def join_file(first: Path, target: Path, on_bytes: OnBytes | None = None) -> None:
    """Joins a split GGUF; the result is, byte for byte, the file that was split.

    Args:
        first: the first shard.
        target: the file to write.
        on_bytes: as `split_file`.

    Raises:
        SourceError: no split file, or shards that are missing or do not belong together.
        OutputError: no space, no permission.
    """
    metadata, places = _whole(first)
    if len({file.path for file, _ in places} | {first}) < 2:
        raise SourceError(f"{first}: not split, there is nothing to join")
    _copy([(metadata, places)], [target], on_bytes)


_Places = list[tuple[FileState, GgufTensor]]
"""Tensors, each with the file that it lies in."""


def _whole(source: Path) -> tuple[dict[str, Value], _Places]:
    """Metadata and tensors of a file, or of all the shards of one, without a trace of the split."""
    shards = read_shards(source)
    stated = shards[0][1].metadata
    metadata = {key: value for key, value in stated.items() if not key.startswith("split.")}
    places = [(header.state, entry) for _, header in shards for entry in header.tensors]
    if len(shards) == 1 and len(metadata) == len(stated):
        _check_reproducible(source, metadata, [entry for _, entry in places])
    return metadata, places


def _check_reproducible(source: Path, metadata: Mapping[str, Value], entries: Sequence[GgufTensor]) -> None:
    """Refuses a file that splitting and joining would not give back (another alignment, version or order of data)."""
    try:
        table = encode_table(metadata, entries)
    except ValueError:  # gguf-py cannot write some of what may be read: empty arrays
        table = b""
    at, gaps = padded(len(table)), False
    for entry in entries:
        gaps |= entry.offset != at
        at += padded(entry.nbytes)
    stored = read_at(source, 0, min(len(table), source.stat().st_size)).tobytes()
    if not table or stored != table or gaps or at != source.stat().st_size:
        raise SourceError(
            f"{source}: laid out in another way than llama.cpp and pocketquant write files, so joined shards would not "
            "be this file again; write it anew first (pocketquant quantize or llama-quantize)"
        )


def _shard_metadata(metadata: Mapping[str, Value], number: int, count: int, n_tensors: int) -> dict[str, Value]:
    """The keys of one shard, in gguf-split's order."""
    keys = {
        "split.no": Value("u16", number),
        "split.tensors.count": Value("i32", n_tensors),
        "split.count": Value("u16", count),
    }
    kept = {key: value for key, value in metadata.items() if not key.startswith("split.")}
    return {**kept, **keys} if number == 0 else keys


def _shards(
    metadata: Mapping[str, Value], entries: Sequence[GgufTensor], max_bytes: int
) -> list[tuple[dict[str, Value], int, int]]:
    """(metadata, first tensor, last tensor + 1) of each shard: every file as full as the limit allows.

    The first one may be left with metadata alone, which runtimes accept.
    """
    bare = [len(encode_table(_shard_metadata(metadata, number, 2, len(entries)), [])) for number in (0, 1)]
    if bare[0] > max_bytes:
        raise OutputError(f"the metadata takes {bare[0]:,} bytes, more than the {max_bytes:,} that a file may have")
    empty = len(encode_table(_shard_metadata({}, 1, 2, 0), []))
    rows = [len(encode_table(_shard_metadata({}, 1, 2, 0), [entry])) - empty for entry in entries]
    too_large = [
        f"{entry.name}: {padded(bare[1] + row) + padded(entry.nbytes):,} bytes"
        for entry, row in zip(entries, rows, strict=True)
        if padded(bare[1] + row) + padded(entry.nbytes) > max_bytes
    ]
    if too_large:
        raise OutputError(
            f"no tensor can be cut in two, and a file may have {max_bytes:,} bytes; allow more, or quantize these "
            f"further:\n{listing(too_large)}"
        )
    starts, header, data = [0], bare[0], 0
    for i, (entry, row) in enumerate(zip(entries, rows, strict=True)):
        if padded(header + row) + data + padded(entry.nbytes) > max_bytes:
            starts.append(i)
            header, data = bare[1], 0
        header += row
        data += padded(entry.nbytes)
    if len(starts) > _MAX_SHARDS:
        raise OutputError(f"{len(starts):,} files are more than a split GGUF may have ({_MAX_SHARDS:,})")
    stops = [*starts[1:], len(entries)]
    return [
        (_shard_metadata(metadata, number, len(starts), len(entries)), start, stop)
        for number, (start, stop) in enumerate(zip(starts, stops, strict=True))
    ]


def _copy(
    files: Sequence[tuple[Mapping[str, Value], _Places]], targets: Sequence[Path], on_bytes: OnBytes | None
) -> list[Path]:
    """Writes each file's header and copies its tensors; all of them appear at the end, the first one last."""
    refuse_overwriting(targets, {file.path for _, places in files for file, _ in places})
    with replacing_together(targets) as temporaries:
        for (metadata, places), temporary in zip(files, temporaries, strict=True):
            with open(temporary, "wb") as out:
                table = encode_table(metadata, [entry for _, entry in places])
                out.write(table.ljust(padded(len(table)), b"\0"))
                for source, entry in places:
                    for start in range(0, entry.nbytes, _COPIED_AT_ONCE):
                        nbytes = min(_COPIED_AT_ONCE, entry.nbytes - start)
                        piece = read_at(source.path, entry.offset + start, nbytes, source)
                        out.write(piece.data)
                        if on_bytes:
                            on_bytes(piece.nbytes)
                    out.write(bytes(padded(entry.nbytes) - entry.nbytes))
        check_unchanged(source for _, places in files for source, _ in places)
    return list(targets)

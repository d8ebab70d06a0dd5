"""Writes statistics files in place, one matrix at a time, and merges them.

The layout of a file is known before anything is collected. So an unfinished file has its whole header and its full
length, and a finished matrix is written to its place at once: nothing is kept twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.calibration.statistics import (
    COUNT,
    DTYPES,
    FORMAT,
    HEAD_ROUNDING,
    INPUT,
    OUTPUT,
    ROUNDING,
    VERSION,
    ArrayEntry,
    Statistics,
    open_statistics,
    packed,
)
from pocketquant.errors import OutputError, RecipeError, listing
from pocketquant.files.replacing import replacing
from pocketquant.formats import F32Array
from pocketquant.llama.kernels import added_up
from pocketquant.texts.corpus import TextRecord

HEAD_HESSIANS = "head/moments"

Piece = tuple[str, int | None, npt.NDArray[Any]]
"""The name of an array, the number of one of its matrices (None for the whole array), and the numbers."""


@dataclass(frozen=True)
class About:
    """The model and texts of statistics; see `Statistics`."""

    tokens: int
    model_sha256: str
    texts: tuple[TextRecord, ...]
    shared: Mapping[str, str]
    kernels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StatisticsLayout:
    """A statistics file before it has numbers: its header, and the place of each array."""

    header: bytes
    entries: Mapping[str, ArrayEntry]

    @property
    def file_bytes(self) -> int:
        return max((entry.offset + entry.nbytes for entry in self.entries.values()), default=len(self.header))

    def create(self, path: Path) -> None:
        """Writes the header and makes the file as long as it will be; arrays that are not written are zero, counts too.

        Raises:
            OutputError: the file cannot be written.
        """
        try:
            with open(path, "wb") as file:
                file.write(self.header)
                file.truncate(self.file_bytes)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error

    def put(self, path: Path, pieces: Iterable[Piece]) -> None:
        """Writes whole arrays, or single numbers or matrices (f32[k, k] or triangles) of them, to their places."""
        try:
            with open(path, "rb+") as file:
                for name, index, array in pieces:
                    entry = self.entries[name]
                    numbers: npt.NDArray[Any] = packed(array) if index is not None and array.ndim == 2 else array
                    if numbers.shape != (entry.shape if index is None else entry.shape[1:]):
                        raise ValueError(f"{name}: {numbers.shape} numbers for an entry of {entry.shape}")
                    file.seek(entry.offset + (index or 0) * (entry.nbytes // max(entry.shape[0], 1)))
                    file.write(np.ascontiguousarray(numbers, DTYPES[entry.dtype]).tobytes())
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def lay_out(about: About, arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> StatisticsLayout:
    """The layout of a file with these arrays: name -> (dtype, shape), triangles as [n_matrix, k (k + 1) / 2]."""
    stated: dict[str, Any] = {}
    entries: dict[str, ArrayEntry] = {}
    at = 0
    for name, (dtype, shape) in arrays.items():
        entries[name] = ArrayEntry(dtype, shape, at)
        stated[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + entries[name].nbytes]}
        at += entries[name].nbytes
    texts = [asdict(text) for text in about.texts]
    words = {"tokens": about.tokens, "model": about.model_sha256, "texts": texts, "shared": dict(about.shared)}
    if about.kernels:
        words["kernels"] = dict(sorted(about.kernels.items()))
    metadata = {"format": FORMAT, "version": str(VERSION), "about": json.dumps(words, ensure_ascii=False)}
    text = json.dumps({"__metadata__": metadata, **stated}, ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    header = len(text).to_bytes(8, "little") + text
    moved = {name: ArrayEntry(entry.dtype, entry.shape, entry.offset + len(header)) for name, entry in entries.items()}
    return StatisticsLayout(header, moved)


def triangles(n_matrix: int, k: int) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of `n_matrix` triangles of side k."""
    return "F32", (n_matrix, k * (k + 1) // 2)


def write_statistics(
    path: str | Path, about: About, arrays: Mapping[str, tuple[str, tuple[int, ...]]], pieces: Iterable[Piece]
) -> None:
    """Writes a whole file; matrices are taken from `pieces` one at a time."""
    layout = lay_out(about, arrays)
    with replacing(Path(path)) as temporary:
        layout.create(temporary)
        layout.put(temporary, pieces)


def merge_statistics(paths: Sequence[str | Path], out: str | Path) -> None:
    """Merges statistics of one model, as if their texts had been one, or Hessians with Fisher matrices.

    Every matrix is the mean over the files that have it, weighted by their tokens. The groups of the head are those of
    the first file that has any; the groups of other files are distributed over them row by row.

    Raises:
        RecipeError: they are of different models, or two were made from the same text, which would count twice.
    """
    parts = [open_statistics(path) for path in paths]
    _check_one_model(parts)
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {}
    for part in parts:
        for name, entry in part.entries.items():
            arrays.setdefault(name, (entry.dtype, entry.shape))
    faults = [
        f"{name}: shape {list(part.entries[name].shape)} in one, {list(shape)} in another"
        for name, (_, shape) in arrays.items()
        for part in parts
        if name in part.entries and not name.startswith(HEAD_HESSIANS) and part.entries[name].shape != shape
    ]
    if faults:
        raise RecipeError(f"{len(faults)} array(s) do not fit together\n{listing(faults)}")
    about = About(
        sum(part.tokens for part in parts),
        parts[0].model_sha256,
        tuple(dict.fromkeys(text for part in parts for text in part.texts)),
        {tensor: shared for part in parts for tensor, shared in part.shared.items()},
        added_up([part.kernels for part in parts if part.tokens]),
    )
    write_statistics(out, about, arrays, _merged(parts, arrays))


def _check_one_model(parts: Sequence[Statistics]) -> None:
    if len({part.model_sha256 for part in parts}) != 1:
        names = listing(f"{part.path}: {part.model_sha256[:16]}" for part in parts)
        raise RecipeError(f"statistics are merged of one model, these are of several\n{names}")
    for kind, of_kind in (
        ("inputs", [part for part in parts if part.tokens]),
        ("gradients", [part for part in parts if part.has_outputs]),
    ):
        digests = [text.sha256 for part in of_kind for text in part.texts]
        if twice := {digest for digest in digests if digests.count(digest) > 1}:
            names = listing(f"{p.path}: {t.name}" for p in of_kind for t in p.texts if t.sha256 in twice)
            raise RecipeError(f"the {kind} of the same text would count twice\n{names}")


def _merged(parts: Sequence[Statistics], arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterable[Piece]:
    for name, (_, shape) in arrays.items():
        owners = [part for part in parts if name in part.entries]
        if name == HEAD_HESSIANS:
            yield from _merged_head(owners, shape[0])
        elif name.endswith((INPUT, OUTPUT, ROUNDING)):
            counts = np.array([part.array(_counts_of(name))[: shape[0]] for part in owners], np.float64)
            for index in range(shape[0]):
                weights = counts[:, index] / max(counts[:, index].sum(), 1.0)
                yield name, index, _weighted(name, owners, [{index: float(weight)} for weight in weights])
        elif name == HEAD_HESSIANS + COUNT:
            total = sum(int(part.array(name)[0]) for part in owners)
            yield name, None, np.full(shape, total, np.int64)
        elif name.endswith(COUNT):
            yield name, None, np.sum([part.array(name) for part in owners], axis=0)
        elif name == "head/row_group":
            yield name, None, owners[0].array(name)
        else:  # means over tokens, one number a row
            counts = np.array([part.array(HEAD_HESSIANS + COUNT)[0] for part in owners], np.float64)
            yield name, None, np.average([part.array(name) for part in owners], axis=0, weights=counts)


def _counts_of(name: str) -> str:
    """The name of the array with the number of inputs behind an array's means."""
    if name == HEAD_ROUNDING:
        return HEAD_HESSIANS + COUNT
    return (name.removesuffix(ROUNDING) + INPUT if name.endswith(ROUNDING) else name) + COUNT


def _merged_head(parts: Sequence[Statistics], n_group: int) -> Iterable[Piece]:
    counts = np.array([part.array(HEAD_HESSIANS + COUNT)[0] for part in parts], np.float64)
    groups = parts[0].array("head/row_group")
    sizes = np.maximum(np.bincount(groups, minlength=n_group), 1)
    spreads = []
    for part in parts:
        head = part.head()
        assert head is not None
        spread = np.zeros((n_group, head.n_group))
        np.add.at(spread, (groups, head.row_group), head.row_scale)
        spreads.append(spread / sizes[:, None])
    for group in range(n_group):
        weights = [
            {int(h): float(spread[group, h] * count / counts.sum()) for h in np.flatnonzero(spread[group])}
            for spread, count in zip(spreads, counts, strict=True)
        ]
        yield HEAD_HESSIANS, group, _weighted(HEAD_HESSIANS, parts, weights)


def _weighted(name: str, parts: Sequence[Statistics], weights: Sequence[Mapping[int, float]]) -> F32Array:
    """The weighted sum of triangles, or of other rows of numbers, of several files."""
    total = np.zeros(parts[0].entries[name].shape[1], np.float64)
    for part, of_part in zip(parts, weights, strict=True):
        for index, weight in of_part.items():
            if weight:
                total += weight * part.triangle(name, index)
    return total.astype(np.float32)

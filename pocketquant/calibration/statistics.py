"""Statistics of a model's linear layers on a text: what a rounding error of each will cost, in one file.

For a weight W f32[m, k] whose inputs are x and whose outputs get the gradients g of the log-likelihood of labels drawn
from the model itself, H = E[x x^T] and G = E[g g^T]. An error D of W is then predicted to cost

    0.5 tr(G D H D^T)

nats of KL divergence per token (the Fisher information of the layer, taken as a Kronecker product: Martens and Grosse,
"Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015). An expert sees few tokens: its H is
the mean over those, its G is the sum over those by all tokens, so that the same formula gives its part of the whole.
Rows of the output head are not alike: row v costs 0.5 d^T M_v d with M_v = E[p_v (1 - p_v) h h^T]; rows of one group
share M up to a factor. A row of the embedding costs 0.5 frequency_v d^T E d with E = E[g g^T] at its output.
Beside every H, and beside M, stand the mean squared errors of rounding these inputs to 8 bits (`activations`).

The file is laid out as safetensors files are (a length, a JSON header, data), so that it can be looked into; symmetric
matrices are lower triangles, row by row. Source: https://github.com/huggingface/safetensors, README.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isqrt, prod
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from pocketquant.errors import RecipeError, listing
from pocketquant.files.reading import read_at
from pocketquant.files.small import open_regular, parse_json
from pocketquant.files.unchanged import FileState, state_of
from pocketquant.formats import F32Array
from pocketquant.model import Model, Tensor
from pocketquant.texts.corpus import TextRecord

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
FORMAT = "pocketquant.statistics"
VERSION = 2
_MAX_HEADER_BYTES = 1 << 26
_MAX_ENTRIES = 1 << 18
_MAX_SIDE = 1 << 16
INPUT, OUTPUT, ROUNDING, COUNT = "/input", "/output", "/rounding", ".count"
EMBED_OUTPUT = "embed/output"
HEAD_ROUNDING = "head/rounding"
HEAD = ("head/row_group", "head/variance", "head/frequency", "head/moments")


@dataclass(frozen=True)
class ArrayEntry:
    """One array of the file: its dtype (F32, F64, I32 or I64), its shape, and its offset in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class HeadStatistics:
    """The cost of errors in the rows of the embedding and of the output head.

    Attributes:
        row_group: i32[n_vocab], the group of each row.
        row_scale: f32[n_vocab]; the error d of row v costs 0.5 row_scale[v] d^T hessian(row_group[v]) d. Its mean in a
            group is 1.
        frequency: f64[n_vocab], share of the text's tokens; adds up to 1.
        embed_output: f32[k, k], E[g g^T] at the embedding's output; None without gradients.
        n_group: groups.
    """

    row_group: npt.NDArray[np.int32]
    row_scale: F32Array
    frequency: npt.NDArray[np.float64]
    embed_output: F32Array | None
    n_group: int
    _statistics: Statistics

    def hessian(self, group: int) -> F32Array:
        """f32[k, k], the mean of E[p_v (1 - p_v) h h^T] over the group's rows."""
        return self._statistics.matrix("head/moments", group)

    @property
    def hessians(self) -> F32Array:
        """f32[n_group, k, k]: all at once."""
        return np.stack([self.hessian(group) for group in range(self.n_group)])


@dataclass(frozen=True)
class Statistics:
    """An opened statistics file; matrices are read one at a time, when they are asked for.

    Attributes:
        path: the file.
        tokens: tokens that the inputs were collected on.
        model_sha256: `fingerprint` of the model.
        texts: the texts.
        shared: tensor -> the tensor whose name stands for the input that they share.
        entries: name of an array -> its place in the file.
        kernels: versions of the software that computed the inputs; empty where nothing is known.
        state: what the file was when it was opened; None where nobody compares.
    """

    path: Path
    tokens: int
    model_sha256: str
    texts: tuple[TextRecord, ...]
    shared: Mapping[str, str]
    entries: Mapping[str, ArrayEntry]
    kernels: Mapping[str, str] = field(default_factory=dict)
    state: FileState | None = None

    def input(self, tensor: str, expert: int | None = None) -> F32Array | None:
        """The Hessian H = E[x x^T] f32[k, k] of a tensor's inputs, in GGUF's column order; None if there is none.

        Args:
            tensor: name in GGUF.
            expert: its number, for a tensor of experts. An expert that no token was routed to has no matrix.
        """
        return self._find(self.shared.get(tensor, tensor) + INPUT, expert)

    def output(self, tensor: str, expert: int | None = None) -> F32Array | None:
        """The Fisher matrix G f32[m, m] of a tensor's output, in GGUF's row order, in nats; None if there is none."""
        return self._find(tensor + OUTPUT, expert)

    def rounding(self, tensor: str, expert: int | None = None) -> F32Array:
        """Mean squared errors f32[2, k] of llama.cpp's rounding of a tensor's inputs to 8 bits; see `activations`."""
        return self._rounding(self.shared.get(tensor, tensor) + ROUNDING, expert)

    def head_rounding(self) -> F32Array:
        """The same f32[2, k] of the hidden states that the output head multiplies."""
        return self._rounding(HEAD_ROUNDING, None)

    def share(self, tensor: str, expert: int) -> float:
        """The share of the tokens that were routed to an expert."""
        counts = self.array(self.shared.get(tensor, tensor) + INPUT + COUNT)
        return float(counts[expert]) / max(self.tokens, 1)

    def head(self) -> HeadStatistics | None:
        """The statistics of the embedding and the output head; None if the file has none."""
        if not all(name in self.entries for name in HEAD):
            return None
        row_group, variance, frequency = (self.array(name) for name in HEAD[:3])
        n_group = self.entries["head/moments"].shape[0]
        if len(row_group) and not 0 <= row_group.min() <= row_group.max() < n_group:
            raise RecipeError(f"{self.path}: a row of the head is in none of its {n_group} groups")
        sums = np.bincount(row_group, weights=variance, minlength=n_group)
        means = sums / np.maximum(np.bincount(row_group, minlength=n_group), 1)
        scale = (variance / np.maximum(means, np.finfo(np.float64).tiny)[row_group]).astype(np.float32)
        return HeadStatistics(row_group, scale, frequency, self._find(EMBED_OUTPUT, None), n_group, self)

    @property
    def has_outputs(self) -> bool:
        """Whether the file holds Fisher matrices."""
        return any(name.endswith(OUTPUT) and name != EMBED_OUTPUT for name in self.entries)

    @property
    def n_unseen_experts(self) -> int:
        """The number of expert matrices that no token was routed to."""
        names = [name for name, entry in self.entries.items() if name.endswith(INPUT) and entry.shape[0] > 1]
        return sum(int((self.array(name + COUNT) == 0).sum()) for name in names)

    def array(self, name: str) -> npt.NDArray[Any]:
        """An array as it is stored, finite; RecipeError otherwise, KeyError if there is none."""
        entry = self.entries[name]
        data = read_at(self.path, entry.offset, entry.nbytes, self.state).view(DTYPES[entry.dtype]).reshape(entry.shape)
        return self._checked(name, data)

    def matrix(self, name: str, index: int = 0) -> F32Array:
        """Matrix `index` of an array of triangles, f32[k, k]."""
        return unpacked(self.triangle(name, index))

    def triangle(self, name: str, index: int) -> F32Array:
        """The same, as it is stored: f32[k (k + 1) / 2]; or row `index` of another array of rows in F32."""
        entry = self.entries[name]
        if not 0 <= index < entry.shape[0]:
            raise RecipeError(f"{self.path}: {name} has {entry.shape[0]} matrices, number {index} was asked for")
        nbytes = 4 * entry.shape[1]
        return self._checked(name, read_at(self.path, entry.offset + index * nbytes, nbytes, self.state).view("<f4"))

    def _rounding(self, name: str, expert: int | None) -> F32Array:
        return self.triangle(name, expert or 0).reshape(2, -1)

    def _find(self, name: str, expert: int | None) -> F32Array | None:
        if name not in self.entries:
            return None
        if expert is None and self.entries[name].shape[0] != 1:
            raise RecipeError(f"{self.path}: {name} is of {self.entries[name].shape[0]} experts; say which one")
        if self.array(name + COUNT)[expert or 0] <= 0:
            return None
        return self.matrix(name, expert or 0)

    def _checked(self, name: str, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if not np.isfinite(data).all():
            raise RecipeError(f"{self.path}: {name} is not finite; make the statistics again")
        return data


def fingerprint(model: Model) -> str:
    """Digest of a model's names, shapes, vectors and the first row of every matrix, in the values that a GGUF holds.

    A checkpoint in BF16 and the GGUFs made of it in F32 or BF16 have the same; a fine-tune has another, a merged
    adapter too. Reads a few kilobytes a tensor.
    """
    return _fingerprint(model.tensors)


def _fingerprint(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        row = tensor.rows(0, 1).astype("<f4").reshape(-1)
        digest.update(f"{tensor.name} {list(tensor.shape)}\n".encode())
        digest.update(row.tobytes())
    return digest.hexdigest()


def check_statistics(statistics: Statistics, tensors: Iterable[Tensor]) -> None:
    """Checks that statistics were made from the very model that has these tensors.

    Raises:
        RecipeError: they were not.
    """
    if statistics.model_sha256 != _fingerprint(tensors):
        raise RecipeError(
            f"{statistics.path}: made from another model than this one; make them again with `pocketquant calibrate` "
            "on the source that is quantized"
        )


# ---------------------------------------------------------------- reading


def open_statistics(path: str | Path) -> Statistics:
    """Reads the header and checks it against the file; no matrix is read.

    Raises:
        RecipeError: no such file, or none that `pocketquant calibrate` wrote, or damaged (all faults listed).
    """
    path = Path(path)
    try:
        with open_regular(path, RecipeError) as file:
            state = state_of(path, file.fileno())
            size = state.size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise _no_statistics(path, "its first eight bytes are no length of a header")
            data = file.read(length)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    header = parse_json(data, f"{path}: no statistics (header)", RecipeError)
    about = _read_about(path, header)
    faults, entries, end = [], {}, 0
    for name, stated in header.items():
        entry = _read_entry(stated, length + 8, size)
        if entry is None or not _fits(name, entry):
            faults.append(f"{name[:80]}: no array of statistics, or not inside the file")
            continue
        entries[name] = entry
        end = max(end, entry.offset + entry.nbytes)
    faults += [f"{name}: has no {COUNT[1:]}" for name in entries if _is_counted(name) and name + COUNT not in entries]
    faults += [
        f"{name}{COUNT}: {entries[name + COUNT].shape[0]} counts of {entry.shape[0]} matrices"
        for name, entry in entries.items()
        if _is_counted(name) and name + COUNT in entries and entries[name + COUNT].shape[0] != entry.shape[0]
    ]
    wanted = dict(_wanted_roundings(entries))
    faults += [
        f"{name}: expected {list(shape)} numbers, one for each input and kind of scale"
        for name, shape in wanted.items()
        if name not in entries or entries[name].shape != shape
    ]
    faults += [f"{name}: stands beside no inputs" for name in entries if name.endswith(ROUNDING) and name not in wanted]
    if len({entries[name].shape[0] for name in HEAD[:3] if name in entries}) > 1:
        faults.append("head: its arrays differ in the number of rows")
    if end != size:
        faults.append(f"its arrays end at byte {end}, the file at {size}")
    if faults:
        raise RecipeError(f"{path}: {len(faults)} fault(s) in the statistics\n{listing(faults)}")
    texts = tuple(TextRecord(**text) for text in about["texts"])
    kernels = about.get("kernels", {})
    return Statistics(path, about["tokens"], about["model"], texts, about["shared"], entries, kernels, state)


def _no_statistics(path: Path, why: str) -> RecipeError:
    return RecipeError(f"{path}: no statistics ({why}); make them with `pocketquant calibrate`")


def _read_about(path: Path, header: Any) -> dict[str, Any]:
    try:
        metadata = header.pop("__metadata__")
        if metadata["format"] != FORMAT or len(header) > _MAX_ENTRIES:
            raise ValueError
        if metadata["version"] != str(VERSION):
            raise RecipeError(f"{path}: statistics of version {metadata['version']}, this program reads {VERSION}")
        about = parse_json(metadata["about"], f"{path}: no statistics (about)", RecipeError)
        texts = about["texts"]
        kinds = {"name": str, "tokens": int, "sha256": str}
        is_right = (
            (type(about["tokens"]), type(about["model"]), type(texts)) == (int, str, list)
            and about["tokens"] >= 0
            and all(isinstance(t, dict) and {key: type(value) for key, value in t.items()} == kinds for t in texts)
            and all(isinstance(name, str) for pair in about["shared"].items() for name in pair)
            and all(isinstance(word, str) for pair in about.get("kernels", {}).items() for word in pair)
        )
        if not is_right:
            raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise _no_statistics(path, "its header says nothing of the kind") from error
    return about  # type: ignore[no-any-return]


def _read_entry(stated: Any, data_start: int, size: int) -> ArrayEntry | None:
    """The entry that a header states; None if it does not lie inside the file."""
    if not isinstance(stated, dict) or not isinstance(stated.get("dtype"), str) or stated["dtype"] not in DTYPES:
        return None
    shape, offsets = stated.get("shape"), stated.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or not 1 <= len(shape) <= 2 or len(offsets) != 2:
        return None
    if any(type(n) is not int or not 0 <= n <= 1 << 40 for n in (*shape, *offsets)):
        return None
    entry = ArrayEntry(stated["dtype"], tuple(shape), data_start + offsets[0])
    return entry if offsets[1] - offsets[0] == entry.nbytes and data_start + offsets[1] <= size else None


def _wanted_roundings(entries: Mapping[str, ArrayEntry]) -> Iterator[tuple[str, tuple[int, int]]]:
    """The arrays of rounding errors that the file must hold, and their shapes."""
    for name, entry in entries.items():
        if name.endswith(INPUT):
            yield name.removesuffix(INPUT) + ROUNDING, (entry.shape[0], 2 * side_of(entry.shape[1]))
        elif name == HEAD[3]:
            yield HEAD_ROUNDING, (1, 2 * side_of(entry.shape[1]))


def _is_counted(name: str) -> bool:
    return name.endswith((INPUT, OUTPUT)) or name == "head/moments"


def _fits(name: str, entry: ArrayEntry) -> bool:
    """Whether the dtype and shape of an array suit its name."""
    if name.endswith(COUNT):
        return entry.dtype == "I64" and len(entry.shape) == 1 and entry.shape[0] > 0
    if _is_counted(name):
        return entry.dtype == "F32" and len(entry.shape) == 2 and entry.shape[0] > 0 and side_of(entry.shape[1]) > 0
    if name.endswith(ROUNDING):
        return entry.dtype == "F32" and len(entry.shape) == 2 and entry.shape[0] > 0 and entry.shape[1] % 2 == 0
    kinds = dict(zip(HEAD[:3], ("I32", "F64", "F64"), strict=True))
    return kinds.get(name) == entry.dtype and len(entry.shape) == 1


# ---------------------------------------------------------------- triangles


def side_of(length: int) -> int:
    """The k of a triangle of k (k + 1) / 2 numbers; 0 if there is no such k up to 65,536."""
    k = (isqrt(8 * length + 1) - 1) // 2
    return k if k * (k + 1) // 2 == length and k <= _MAX_SIDE else 0


@numba.njit(nogil=True, cache=True)
def _pack(matrix: F32Array, triangle: F32Array) -> None:
    at = 0
    for i in range(matrix.shape[0]):
        triangle[at : at + i + 1] = matrix[i, : i + 1]
        at += i + 1


@numba.njit(nogil=True, cache=True)
def _unpack(triangle: F32Array, matrix: F32Array) -> None:
    n, at = matrix.shape[0], 0
    for i in range(n):
        matrix[i, : i + 1] = triangle[at : at + i + 1]
        at += i + 1
    for first in range(0, n, 64):  # in tiles: a column at a time would miss the cache at every step
        for i in range(n):
            for j in range(max(first, i + 1), min(first + 64, n)):
                matrix[i, j] = matrix[j, i]


def packed(matrix: F32Array) -> F32Array:
    """Lower triangle of a symmetric f32[k, k], row by row: f32[k (k + 1) / 2]."""
    triangle = np.empty(len(matrix) * (len(matrix) + 1) // 2, np.float32)
    _pack(np.ascontiguousarray(matrix, np.float32), triangle)
    return triangle


def unpacked(triangle: F32Array) -> F32Array:
    """The symmetric f32[k, k] of a lower triangle."""
    k = side_of(len(triangle))
    matrix = np.empty((k, k), np.float32)
    _unpack(np.ascontiguousarray(triangle), matrix)
    return matrix

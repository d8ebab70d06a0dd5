"""Importance matrices: the importance of each input column of a weight is the mean of its squared activation.

Reads the GGUF format of llama.cpp's llama-imatrix: for each weight NAME, F32 tensors `NAME.in_sum2` (sums of squared
inputs, one row per expert) and `NAME.counts` (how many inputs were summed). The weight of a column is sum / count; an
expert without inputs gives every column the same weight.

`ImportanceSums` is the matrix before the division; it is what is collected, merged and written.

Source: tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp and tools/quantize/quantize.cpp of llama.cpp (b10359).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.errors import RecipeError, listing
from pocketquant.files.replacing import replacing
from pocketquant.files.small import open_regular
from pocketquant.formats import FORMATS, F32Array
from pocketquant.gguf_file.header import encode_table
from pocketquant.gguf_file.reading import GgufTensor, read_header
from pocketquant.gguf_file.tensors import fused_parts
from pocketquant.llama.kernels import added_up
from pocketquant.model import Model, Value, padded

_SUMS = ".in_sum2"
_COUNTS = ".counts"
_KERNELS = "pocketquant.kernels."
"""Before a version's name; llama.cpp passes keys over that it does not know."""


@dataclass(frozen=True)
class Importance:
    """An importance matrix that was read and found consistent.

    Attributes:
        weights: tensor name -> f32[n_cols], or f32[n_expert, n_cols]; finite, not negative.
        file: name of the file it came from, without its folder.
        datasets: texts it was computed on.
        n_chunks: windows of text it was computed on; 0 if the file does not say.
    """

    weights: Mapping[str, F32Array]
    file: str = ""
    datasets: tuple[str, ...] = ()
    n_chunks: int = 0


@dataclass(frozen=True)
class ImportanceSums:
    """An importance matrix as sums, to which more can be added.

    Attributes:
        sums: tensor name -> [n_matrix, n_cols], squared inputs summed.
        counts: tensor name -> [1] or [n_expert], how many inputs were summed.
        context: tokens in a window of the text.
        datasets: names of the texts.
        kernels: versions of the software that computed them; empty where nothing is known.
    """

    sums: Mapping[str, npt.NDArray[Any]]
    counts: Mapping[str, npt.NDArray[Any]]
    context: int
    datasets: tuple[str, ...] = ()
    kernels: Mapping[str, str] = field(default_factory=dict)

    @property
    def n_chunks(self) -> int:
        """Windows of text, as llama.cpp counts them: by the tensor that saw most."""
        return int(max(counts.max() for counts in self.counts.values())) // self.context


def importance_of(sums: ImportanceSums, file: str = "") -> Importance:
    """The matrix that `read_importance` would read from a file of that name with these sums."""
    weights = {
        name: _mean_squares(array.astype(np.float32).reshape(-1), sums.counts[name].astype(np.float32))
        for name, array in sums.sums.items()
    }
    return Importance(weights, file, sums.datasets, sums.n_chunks)


def merge_sums(parts: Sequence[ImportanceSums], names: Sequence[str] = ()) -> ImportanceSums:
    """Merges matrices of one model, as if their texts had been one; chunks are counted in windows of the first.

    Args:
        parts: the matrices.
        names: what to call them in messages.

    Raises:
        RecipeError: the same tensor has other sizes in another matrix, or two were made from the same text (all
            listed).
    """
    called = [names[i] if names else f"matrix {i + 1}" for i in range(len(parts))]
    twice = [
        f"{one} and {other}, from {', '.join(parts[i].datasets) or 'a text without a name'}"
        for (i, one), (j, other) in combinations(enumerate(called), 2)
        if _is_same_text(parts[i], parts[j])
    ]
    if twice:
        raise RecipeError(
            f"importance matrices of the same text would count it twice; leave one of each pair out:\n{listing(twice)}"
        )
    sums: dict[str, npt.NDArray[Any]] = {}
    counts: dict[str, npt.NDArray[Any]] = {}
    faults = []
    for part in parts:
        for name, array in part.sums.items():
            if name not in sums:
                sums[name], counts[name] = array.astype(np.float64), part.counts[name].astype(np.int64)
            elif sums[name].shape != array.shape or counts[name].shape != part.counts[name].shape:
                faults.append(f"{name}: {_by(sums[name].shape)} sums in one, {_by(array.shape)} in another")
            else:
                sums[name] = sums[name] + array
                counts[name] = counts[name] + part.counts[name].astype(np.int64)
    if faults:
        raise RecipeError(f"importance matrices of different models cannot be merged:\n{listing(faults)}")
    datasets = tuple(dict.fromkeys(name for part in parts for name in part.datasets))
    return ImportanceSums(sums, counts, parts[0].context, datasets, added_up([part.kernels for part in parts]))


def _is_same_text(one: ImportanceSums, other: ImportanceSums) -> bool:
    """Whether two matrices hold the same sums, up to the effect of kernels and of the number of threads."""
    return one.sums.keys() == other.sums.keys() and all(
        array.shape == other.sums[name].shape
        and np.array_equal(one.counts[name], other.counts[name])
        and np.allclose(array, other.sums[name], rtol=1e-3)
        for name, array in one.sums.items()
    )


def write_sums(sums: ImportanceSums, path: str | Path, *, is_result: bool = True) -> None:
    """Writes llama-imatrix's GGUF format; an existing file is replaced by the whole new one or not at all.

    `is_result` as in `put_in_place`.

    Raises:
        OutputError: the file cannot be written.
    """
    metadata = {
        "general.type": Value("str", "imatrix"),
        "imatrix.datasets": Value("str[]", list(sums.datasets)),
        "imatrix.chunk_count": Value("u32", sums.n_chunks),
        "imatrix.chunk_size": Value("u32", sums.context),
        **{_KERNELS + key: Value("str", value) for key, value in sorted(sums.kernels.items())},
    }
    arrays: dict[str, F32Array] = {}
    for name in sorted(sums.sums):
        counts = sums.counts[name].astype("<f4")
        arrays[name + _SUMS] = sums.sums[name].astype("<f4").reshape(counts.size, -1)
        arrays[name + _COUNTS] = counts.reshape(-1, 1)
    table = encode_table(
        metadata,
        [GgufTensor(name, array.shape, FORMATS["F32"], 0, 4 * prod(array.shape)) for name, array in arrays.items()],
    )
    with replacing(Path(path), is_result=is_result) as temporary, open(temporary, "wb") as file:
        file.write(table.ljust(padded(len(table)), b"\0"))
        for array in arrays.values():
            file.write(array.tobytes().ljust(padded(array.nbytes), b"\0"))


def read_importance(path: str | Path) -> Importance:
    """Reads an importance matrix in llama.cpp's GGUF format.

    Raises:
        RecipeError: not an importance matrix, or some of its tensors are missing, mis-shaped, not finite or negative.
        SourceError: a GGUF that is damaged.
    """
    sums = read_sums(path)
    flat = {name: array.reshape(-1) for name, array in sums.sums.items()}
    weights = {name: _mean_squares(array, sums.counts[name]) for name, array in flat.items()}
    stated = read_header(path).metadata.get("imatrix.chunk_count")
    n_chunks = int(stated.value) if stated is not None and stated.kind == "u32" else 0
    return Importance(weights, Path(path).name, sums.datasets, n_chunks)


def read_sums(path: str | Path) -> ImportanceSums:
    """Reads sums and counts as the file has them, f32; errors are those of `read_importance`.

    A file that does not say how long its windows were is taken to have had windows of 512 tokens.
    """
    path = Path(path)
    _check_is_gguf(path)
    header = read_header(path)
    kind = header.metadata.get("general.type")
    if kind is None or kind.value != "imatrix":
        found = "no general.type" if kind is None else f"general.type = {kind.value}"
        raise RecipeError(
            f"{path}: not an importance matrix ({found}, expected imatrix); make one with `pocketquant imatrix`"
        )

    arrays: dict[str, F32Array] = {}
    faults: list[str] = []
    for tensor in header.tensors:
        if not tensor.name.endswith((_SUMS, _COUNTS)):
            continue
        if tensor.format.name != "F32":
            faults.append(f"{tensor.name}: stored as {tensor.format.name}, expected F32")
            continue
        arrays[tensor.name] = np.fromfile(path, dtype="<f4", count=tensor.nbytes // 4, offset=tensor.offset)

    names = sorted({name.removesuffix(_SUMS).removesuffix(_COUNTS) for name in arrays})
    sums: dict[str, F32Array] = {}
    counts: dict[str, F32Array] = {}
    for name in names:
        summed, counted = arrays.get(name + _SUMS), arrays.get(name + _COUNTS)
        if summed is None or counted is None:
            faults.append(f"{name}: {_SUMS if summed is None else _COUNTS} is missing")
        elif fault := _find_fault(summed, counted):
            faults.append(f"{name}: {fault}")
        else:
            sums[name], counts[name] = summed.reshape(counted.size, -1), np.rint(counted)
    if faults:
        raise RecipeError(f"{path}: {len(faults)} fault(s) in the importance matrix\n{listing(faults)}")
    if not sums:
        raise RecipeError(f"{path}: the importance matrix has no entries; make it again with `pocketquant imatrix`")
    datasets, size = header.metadata.get("imatrix.datasets"), header.metadata.get("imatrix.chunk_size")
    return ImportanceSums(
        sums,
        counts,
        int(size.value) if size is not None and size.kind == "u32" and size.value else 512,
        tuple(str(item) for item in datasets.value) if datasets is not None and datasets.kind == "str[]" else (),
        {
            key.removeprefix(_KERNELS): str(value.value)
            for key, value in header.metadata.items()
            if key.startswith(_KERNELS) and value.kind == "str"
        },
    )


def unfused(importance: Importance, model: Model) -> Importance:
    """The matrix with its entries for fused tensors given to their parts, which see the same inputs.

    A file with fused tensors, as other tools write it, is run as it is, and its tensors are split when it is read.
    """
    names = {tensor.name for tensor in model.tensors}
    weights: dict[str, F32Array] = {}
    for name, array in importance.weights.items():
        parts = fused_parts(name) if name not in names else ()
        weights |= dict.fromkeys(parts if parts and names.issuperset(parts) else (name,), array)
    return replace(importance, weights=weights)


def check_importance(importance: Importance, model: Model) -> None:
    """Checks that a matrix was computed on this model: every name is one of its tensors, every size its columns.

    Tensors that the matrix says nothing about are fine; the plan names them. So are entries for the block behind the
    trunk where the model has none: a multi-token-prediction block, which may lie in a file of its own.

    Raises:
        RecipeError: unknown names, or sizes that differ.
    """
    tensors = {tensor.name: tensor for tensor in model.tensors}
    faults: list[str] = []
    for name, array in importance.weights.items():
        tensor = tensors.get(name)
        if tensor is None:
            if not name.startswith(_mtp_prefix(model)) or model.sizes.get("n_mtp"):
                faults.append(f"{name}: no such tensor in the model")
            continue
        wanted = (*tensor.shape[:-2], tensor.n_cols) if len(tensor.shape) > 1 else tensor.shape
        if array.shape != wanted:
            faults.append(f"{name}: has {_by(array.shape)} weights, the tensor wants {_by(wanted)}")
    if faults:
        raise RecipeError(
            f"{importance.file or 'importance matrix'}: {len(faults)} entries do not fit the model; compute the "
            f"matrix on this very model\n{listing(faults)}"
        )


def importance_of_block(importance: Importance, model: Model) -> Importance | None:
    """The entries for the multi-token-prediction block of `model`; None if the matrix has none."""
    prefix = _mtp_prefix(model)
    weights = {name: array for name, array in importance.weights.items() if name.startswith(prefix)}
    return replace(importance, weights=weights) if weights else None


def _mtp_prefix(model: Model) -> str:
    return f"blk.{model.sizes['n_layer']}."


def _check_is_gguf(path: Path) -> None:
    try:
        with open_regular(path, RecipeError) as file:
            magic = file.read(4)
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the importance matrix: {error.strerror}") from error
    if magic != b"GGUF":
        raise RecipeError(
            f"{path}: not a GGUF file; if it is a matrix in llama.cpp's old format, convert it with "
            f"`llama-imatrix --in-file {path.name} -o {path.stem}.gguf`"
        )


def _find_fault(sums: F32Array, counts: F32Array) -> str:
    """The fault of one entry, or ""."""
    if not (np.isfinite(sums).all() and np.isfinite(counts).all()):
        return "not finite"
    if (sums < 0).any() or (counts < 0).any():
        return "negative"
    if not counts.size or not sums.size or sums.size % counts.size:
        return f"{sums.size} sums do not divide among {counts.size} counts"
    return ""


def _mean_squares(sums: F32Array, counts: F32Array) -> F32Array:
    """f32[n_expert * n_cols], f32[n_expert] -> f32[n_expert, n_cols], or f32[n_cols] where there is one row."""
    rows = sums.reshape(counts.size, -1)
    whole = np.rint(counts)[:, None].astype(np.float32)
    weights = np.where(whole > 0, rows / np.maximum(whole, 1), np.float32(1)).astype(np.float32)
    return weights[0] if len(weights) == 1 else weights


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(length) for length in shape)

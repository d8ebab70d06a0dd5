"""Importance matrices: how much each input column of a weight matters, as the mean of its squared activation.

Reads the GGUF format of llama.cpp's llama-imatrix: for each weight NAME, F32 tensors `NAME.in_sum2` (sums of squared
inputs, one row per expert) and `NAME.counts` (how many inputs were summed). The weight of a column is sum / count; an
expert that saw no input weighs every column alike.

Source: tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp and tools/quantize/quantize.cpp of llama.cpp (b10359).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketquant.errors import RecipeError, listing
from pocketquant.formats import F32Array
from pocketquant.gguf_file import read_header
from pocketquant.model import Model

_SUMS = ".in_sum2"
_COUNTS = ".counts"


@dataclass(frozen=True)
class Importance:
    """An importance matrix, read and checked in itself.

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


def read_importance(path: str | Path) -> Importance:
    """Reads an importance matrix in llama.cpp's GGUF format.

    Raises:
        RecipeError: not an importance matrix, or some of its tensors are missing, mis-shaped, not finite or negative.
        SourceError: a GGUF that is damaged.
    """
    path = Path(path)
    _check_is_gguf(path)
    header = read_header(path)
    kind = header.metadata.get("general.type")
    if kind is None or kind.value != "imatrix":
        found = "no general.type" if kind is None else f"general.type = {kind.value}"
        raise RecipeError(f"{path}: not an importance matrix ({found}, expected imatrix); make one with llama-imatrix")

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
    weights: dict[str, F32Array] = {}
    for name in names:
        sums, counts = arrays.get(name + _SUMS), arrays.get(name + _COUNTS)
        if sums is None or counts is None:
            faults.append(f"{name}: {_SUMS if sums is None else _COUNTS} is missing")
        elif fault := _find_fault(sums, counts):
            faults.append(f"{name}: {fault}")
        else:
            weights[name] = _mean_squares(sums, counts)
    if faults:
        raise RecipeError(f"{path}: {len(faults)} fault(s) in the importance matrix\n{listing(faults)}")
    if not weights:
        raise RecipeError(f"{path}: the importance matrix has no entries; make it again with llama-imatrix")
    datasets = header.metadata.get("imatrix.datasets")
    chunks = header.metadata.get("imatrix.chunk_count")
    return Importance(
        weights,
        path.name,
        tuple(str(item) for item in datasets.value) if datasets is not None and datasets.kind == "str[]" else (),
        int(chunks.value) if chunks is not None and chunks.kind == "u32" else 0,
    )


def check_importance(importance: Importance, model: Model) -> None:
    """Checks that a matrix was computed on this model: every name is one of its tensors, every size its columns.

    Tensors that the matrix says nothing about are fine; the plan names them.

    Raises:
        RecipeError: unknown names, or sizes that differ.
    """
    tensors = {tensor.name: tensor for tensor in model.tensors}
    faults: list[str] = []
    for name, array in importance.weights.items():
        tensor = tensors.get(name)
        if tensor is None:
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


def _check_is_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the importance matrix: {error.strerror}") from error
    if magic != b"GGUF":
        raise RecipeError(
            f"{path}: not a GGUF file; if it is a matrix in llama.cpp's old format, convert it with "
            f"`llama-imatrix --in-file {path.name} -o {path.stem}.gguf`"
        )


def _find_fault(sums: F32Array, counts: F32Array) -> str:
    """What is wrong with one entry, or ""."""
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

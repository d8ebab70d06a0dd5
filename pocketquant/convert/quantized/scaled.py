"""FP8 and INT8 weights of one byte each, times a grid of scales.

    F8_E4M3 F8_E5M2 I8   weight[r, c]
    scales               one; one a row; one a group of columns; one a block ([128, 128] in Qwen's FP8 releases)

Published as "fp8" (`weight_scale_inv`, a factor all the same), "fbgemm_fp8", compressed-tensors' naive-, int-,
float- and mxfp8-quantized, ModelOpt FP8 (`weight_scale`). The product is rounded to the scales' type, BF16 for scales
of one byte (E8M0).

Sources: transformers 5.23 integrations/finegrained_fp8.py `Fp8Dequantize`; compressed-tensors 0.20
quantization/lifecycle/forward_helpers.py `_dequantize` and compressors/mxfp8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from pocketquant.convert.quantized.numbers import FLOATS, floats
from pocketquant.convert.quantized.tensor import DequantizedTensor, Reads, part, result_dtype
from pocketquant.convert.safetensors import StoredTensor
from pocketquant.errors import SourceError
from pocketquant.formats import F32Array

CODES = ("F8_E4M3", "F8_E5M2", "I8")
_SUFFIXES = ("_scale_inv", "_scale")


@dataclass(frozen=True)
class ScaledRows:
    """weight - zero, times scale; f32 arithmetic.

    Attributes:
        grid: [rows, cols] of the scales of one matrix.
        block: [rows, cols] of weights that share a scale.
    """

    weight: StoredTensor
    scale: StoredTensor
    zero: StoredTensor | None
    grid: tuple[int, int]
    block: tuple[int, int]
    reads: Reads

    def values(self, start: int, stop: int) -> F32Array:
        weight = floats(self.weight.words(start, stop), self.weight.dtype)
        if self.zero is not None:
            weight -= self._spread(self.zero, self.zero.dtype, start, stop)
        return weight * self._spread(
            self.scale, "F8_E8M0" if self.scale.dtype == "U8" else self.scale.dtype, start, stop
        )

    def _spread(self, tensor: StoredTensor, dtype: str, start: int, stop: int) -> F32Array:
        """One number for each weight of rows [start, stop), or for each row; rows count through all matrices."""
        n_rows, n_cols = self.weight.shape[-2:]
        matrix, row = np.divmod(np.arange(start, stop), n_rows)
        rows = matrix * self.grid[0] + row // self.block[0]
        grid = self.reads.words(tensor).reshape(-1, self.grid[1])
        spread = floats(grid[rows[0] : rows[-1] + 1], dtype)[rows - rows[0]]
        return spread if self.grid[1] == 1 else spread[:, np.arange(n_cols) // self.block[1]]


def scaled_tensor(
    name: str, stored: Mapping[str, StoredTensor], blocks: Sequence[tuple[int, int]], reads: Reads
) -> tuple[DequantizedTensor, set[str]]:
    """The tensor `name`, and the names of its parts.

    Args:
        blocks: [rows, cols] that config.json speaks of; a grid that fits none divides the matrix evenly.

    Raises:
        SourceError: parts missing, or a grid that does not fit.
    """
    weight = stored[name]
    found = [f"{name}{suffix}" for suffix in _SUFFIXES if f"{name}{suffix}" in stored]
    if len(found) != 1:
        raise SourceError(
            f"{weight.dtype} with {len(found)} of the scales {name}_scale_inv, {name}_scale; expected one"
        )
    if len(weight.shape) not in (2, 3) or min(weight.shape) < 1:
        raise SourceError(f"{weight.dtype} {list(weight.shape)}, expected a matrix")
    scale = part(stored, found[0], (*FLOATS, "U8"))
    grid, block = _grid(weight, scale, blocks)
    names = {name, scale.name}
    zero = None
    if f"{name}_zero_point" in stored:
        zero = part(stored, f"{name}_zero_point", ("I8",))
        if prod(zero.shape) != prod(scale.shape):
            raise SourceError(f"{zero.name} is {list(zero.shape)}, {scale.name} is {list(scale.shape)}")
        names.add(zero.name)
    decoder = ScaledRows(weight, scale, zero, grid, block, reads)
    kind = {"F8_E4M3": "FP8 (E4M3)", "F8_E5M2": "FP8 (E5M2)", "I8": "INT8"}[weight.dtype]
    tensor = DequantizedTensor(name, weight.file, result_dtype(scale), weight.shape, kind, decoder)
    return tensor, names


def _grid(
    weight: StoredTensor, scale: StoredTensor, blocks: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Scales of one matrix as [rows, cols], and how many weights each is for."""
    *lead, n_rows, n_cols = weight.shape
    if prod(scale.shape) == 1 and not lead:
        return (1, 1), (n_rows, n_cols)
    shape = scale.shape
    if len(shape) == len(lead) + 1 and shape[-1] == n_rows:
        shape = (*shape, 1)
    if list(shape[:-2]) == lead and len(shape) == len(weight.shape) and prod(shape) > 0:
        grid = (shape[-2], shape[-1])
        for block in blocks:
            if (-(-n_rows // block[0]), -(-n_cols // block[1])) == grid:
                return grid, block
        if n_rows % grid[0] == 0 and n_cols % grid[1] == 0:
            return grid, (n_rows // grid[0], n_cols // grid[1])
    raise SourceError(
        f"{scale.name} {list(scale.shape)} is no grid over {list(weight.shape)}, neither even nor in blocks of "
        f"{[list(block) for block in blocks]}; config.json's block size may be missing"
    )

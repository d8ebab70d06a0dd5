"""Rows of a checkpoint's tensor in GGUF's order: read, permuted, checked, transformed, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pocketquant.architectures.table import ElementWise
from pocketquant.convert.safetensors import CheckpointTensor
from pocketquant.errors import WeightError
from pocketquant.formats import FORMATS, F32Array, U8Array
from pocketquant.formats.plain import is_finite


@dataclass(frozen=True)
class ExpertStack:
    """The matrices of all experts, one below the other, as a GGUF keeps them; stands for one stored tensor.

    Where a row lies is computed, so this holds nothing that grows with the rows.

    Attributes:
        tensors: one for each expert, or one that holds them all.
        n_rows: rows of one expert.
        first: row of its tensor where the first expert begins.
        stride: rows from one expert to the next in a tensor that holds them all; 0 where each has its own.
    """

    tensors: tuple[CheckpointTensor, ...]
    n_rows: int
    first: int = 0
    stride: int = 0

    @property
    def dtype(self) -> str:
        return self.tensors[0].dtype

    def words(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Rows [start, stop) of the stack, as stored."""
        return np.concatenate([tensor.words(first, last) for tensor, first, last in self.runs(start, stop)])

    def runs(self, start: int, stop: int) -> Iterator[tuple[CheckpointTensor, int, int]]:
        """(tensor, first row, last row + 1) of each expert that rows [start, stop) touch."""
        while start < stop:
            expert, row = divmod(start, self.n_rows)
            n_rows = min(stop - start, self.n_rows - row)
            first = self.first + expert * self.stride + row
            yield self.tensors[0 if self.stride else expert], first, first + n_rows
            start += n_rows


@dataclass(frozen=True)
class CheckpointRows:
    """Rows of one checkpoint tensor in GGUF's order; a `RowSource`.

    Attributes:
        stored_tensor: where the numbers lie.
        shape: the target's shape: the source's without dimensions of one.
        rows_order: for each output row its source row; None as stored. For one dimension it orders the entries.
        cols_order: the same for columns.
        each: element-wise function in f32.
    """

    stored_tensor: CheckpointTensor | ExpertStack
    shape: tuple[int, ...]
    rows_order: npt.NDArray[np.int64] | None
    cols_order: npt.NDArray[np.int64] | None
    each: ElementWise | None

    def stored(self, start: int, stop: int) -> U8Array | None:
        """Rows as stored, u8[n, bytes], finite; None where `each` computes new numbers."""
        return None if self.each else self._words(start, stop).view(np.uint8)

    def rows(self, start: int, stop: int) -> F32Array:
        """Rows [start, stop) as f32[n, n_cols]; SourceError if a number is not finite."""
        words = self._words(start, stop)
        values = FORMATS[self.stored_tensor.dtype].decode(words.view(np.uint8), words.shape[1])
        if self.each is not None:
            values = self.each(values)
            if not is_finite(values, "F32"):
                raise WeightError(f"{self._place(start, stop)}: too large for its transform ({self.each.name})")
        return values

    def _words(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        read = self.stored_tensor.words
        if len(self.shape) == 1:
            words = read(0, 1)
            words = words if self.rows_order is None else words[:, self.rows_order]
        elif self.rows_order is None:
            words = read(start, stop)
        else:
            words = np.concatenate([read(*run) for run in _runs(self.rows_order[start:stop])])
        if self.cols_order is not None:
            words = words[:, self.cols_order]
        words = np.ascontiguousarray(words)
        if not is_finite(words, self.stored_tensor.dtype):
            raise WeightError(
                f"{self._place(start, stop)}: non-finite weight (infinity or NaN); the checkpoint is broken: "
                "download or save it again"
            )
        return words

    def _place(self, start: int, stop: int) -> str:
        tensor = self.stored_tensor
        if isinstance(tensor, ExpertStack):  # name the expert that is broken, or the first if its numbers are fine
            runs = list(tensor.runs(start, stop))
            broken = (run for run in runs if not is_finite(run[0].words(*run[1:]), tensor.dtype))
            tensor, start, stop = next(broken, runs[0])
        return f"{tensor.file}: {tensor.name} rows {start} to {stop - 1}"


def _runs(order: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Consecutive source rows as (first, last + 1), so that a head is one read."""
    breaks = np.flatnonzero(np.diff(order) != 1) + 1
    starts = order[np.concatenate([[0], breaks])]
    lengths = np.diff(np.concatenate([[0], breaks, [len(order)]]))
    return [(int(first), int(first + length)) for first, length in zip(starts, lengths, strict=True)]

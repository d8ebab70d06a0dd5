"""The blocks of a quantized tensor as numbers that can move: the F16 scales, and the codes where these are free too.

The weights of a block are linear in its F16 scales d and dmin (or m), as `formats.layout` says. So the gradient of
the weights gives the gradient of the scales exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pocketquant.files.reading import read_at
from pocketquant.files.unchanged import FileState
from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.layout import Blocks
from pocketquant.gguf_file.reading import GgufTensor
from pocketquant.model import Tensor
from pocketquant.tuning.free_codes import FreeCodes, open_codes

_ROWS = 1 << 12


@dataclass(frozen=True)
class BlockScales:
    """The F16 scales of one tensor of a file, each with the factor that multiplies it.

    Attributes:
        path, tensor: where the blocks are.
        fields: names of the F16 numbers of a block: d, and dmin or m where the format has offsets.
        scales: field -> f32[n_rows, n_blocks], the scales of the file.
        changes: field -> f32[n_rows, n_blocks], the factor less one; zeros at first. The tuner writes them.
        codes: the codes, where they can move.
        state: the file when its header was read; None where no change of it is looked for.
    """

    path: Path
    tensor: GgufTensor
    fields: tuple[str, ...]
    scales: dict[str, F32Array]
    changes: dict[str, F32Array]
    codes: FreeCodes | None = None
    state: FileState | None = None

    @property
    def n_cols(self) -> int:
        return self.tensor.shape[-1]

    def stored(self, start: int, stop: int) -> U8Array:
        """Blocks u8[n, row_bytes] with the changed scales, in F16."""
        return _bytes(self._rescaled(self._coded(start, stop), start))

    def weights(self) -> F32Array:
        """All weights f32[n_rows, n_cols], decoded with the changed scales."""
        return np.concatenate([self._values(self.stored(start, stop)) for start, stop in self._ranges()])

    def scale_gradients(self, gradient: F32Array) -> dict[str, F32Array]:
        """The gradient of the changes, field -> f32[n_rows, n_blocks], from that of the weights f32[n_rows, n_cols]."""
        gradients = {field: np.empty_like(self.changes[field]) for field in self.fields}
        n_blocks = self.scales["d"].shape[1]
        for start, stop in self._ranges():
            blocks, shape = self._coded(start, stop), (stop - start, n_blocks, -1)
            for field in self.fields:
                alone = blocks.copy()
                for other in self.fields:
                    if other != field:
                        alone[other] = 0
                part = self._values(_bytes(alone)).reshape(shape)
                gradients[field][start:stop] = np.einsum("rbi,rbi->rb", part, gradient[start:stop].reshape(shape))
        return gradients

    def with_free_codes(self, original: Tensor, folder: Path) -> BlockScales:
        """The same with codes that can move; their positions lie in `folder`. OSError if they cannot be written."""
        layout = self.tensor.format.layout
        assert layout is not None
        codes = open_codes(layout, original, folder)
        for start, stop in self._ranges():
            blocks = self._read(start, stop)
            codes.place(blocks, self._values(_bytes(blocks)), original.rows(start, stop), start)
        return replace(self, codes=codes)

    def move_codes(self, gradient: F32Array, rate: float) -> None:
        """Moves the codes one step against the gradient of the weights f32[n_rows, n_cols]."""
        assert self.codes is not None
        parts = [self._rescaled(self._read(start, stop), start) for start, stop in self._ranges()]
        self.codes.move(gradient, np.concatenate([self.codes.scales_and_offsets(part)[0] for part in parts]), rate)

    def n_moved(self) -> int:
        """The number of codes that differ from those of the file."""
        if self.codes is None:
            return 0
        moved = 0
        for start, stop in self._ranges():
            now, was = (self._values(_bytes(read(start, stop))) for read in (self._coded, self._read))
            moved += int(np.count_nonzero(now != was))
        return moved

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """The rows that are processed at a time."""
        n_rows = len(self.changes["d"])
        return ((start, min(start + _ROWS, n_rows)) for start in range(0, n_rows, _ROWS))

    def _values(self, data: U8Array) -> F32Array:
        return self.tensor.format.decode(data, self.n_cols)

    def _rescaled(self, blocks: Blocks, start: int) -> Blocks:
        """Changes the scales of blocks, which are the rows from `start` on, in place."""
        rows = slice(start, start + len(blocks))
        for field in self.fields:
            changed = self.scales[field][rows] * (1 + self.changes[field][rows])
            blocks[field] = changed.astype(np.float16).view(np.uint16)
        return blocks

    def _coded(self, start: int, stop: int) -> Blocks:
        """The blocks of the file with the present codes."""
        blocks = self._read(start, stop)
        return blocks if self.codes is None else self.codes.with_codes(blocks, start)

    def _read(self, start: int, stop: int) -> Blocks:
        """The blocks of the file."""
        layout = self.tensor.format.layout
        assert layout is not None
        row_bytes = self.tensor.format.row_bytes(self.n_cols)
        data = read_at(self.path, self.tensor.offset + start * row_bytes, (stop - start) * row_bytes, self.state)
        return data.copy().view(layout.dtype).reshape(stop - start, -1)


def read_block_scales(path: Path, tensor: GgufTensor, state: FileState | None = None) -> BlockScales | None:
    """The scales of a tensor; None if its format has no layout."""
    layout = tensor.format.layout
    if layout is None:
        return None
    fields = ("d", layout.dmin_field) if layout.dmin_field else ("d",)
    n_rows = int(np.prod(tensor.shape[:-1]))
    shape = (n_rows, tensor.shape[-1] // tensor.format.block_len)
    changes = {field: np.zeros(shape, np.float32) for field in fields}
    found = BlockScales(path, tensor, fields, {}, changes, state=state)
    for field in fields:
        found.scales[field] = np.empty(shape, np.float32)
    for start, stop in found._ranges():
        blocks = found._read(start, stop)
        for field in fields:
            found.scales[field][start:stop] = blocks[field].view(np.float16)
    return found


def _bytes(blocks: Blocks) -> U8Array:
    """u8[n_rows, row_bytes]"""
    return blocks.view(np.uint8).reshape(len(blocks), -1)

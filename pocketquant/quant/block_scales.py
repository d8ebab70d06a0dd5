"""A quantized tensor's blocks as numbers that can be changed: the F16 scales, and the codes where those are free too.

A block's weights are linear in its scales: d times what its codes and integer scales say, and dmin (or m) times its
integer offsets, so a gradient of the weights gives that of the scales exactly (`rounding.layouts`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pocketquant.files import read_at
from pocketquant.formats import F32Array, U8Array
from pocketquant.gguf_file import GgufTensor
from pocketquant.model import Tensor
from pocketquant.quant.free_codes import FreeCodes, open_codes
from pocketquant.quant.rounding.layouts import Blocks, layout_of

_ROWS = 1 << 12


@dataclass(frozen=True)
class BlockScales:
    """The scales of one tensor of a file, each with the factor that it is multiplied by.

    Attributes:
        path, tensor: where the blocks lie.
        fields: names of the F16 numbers of a block: d, and dmin or m where offsets have a unit.
        scales: field -> f32[n_rows, n_blocks] as the file has them.
        changes: field -> f32[n_rows, n_blocks], the factor less one; zeros at first, written by whoever tunes.
        codes: where codes are free.
    """

    path: Path
    tensor: GgufTensor
    fields: tuple[str, ...]
    scales: dict[str, F32Array]
    changes: dict[str, F32Array]
    codes: FreeCodes | None = None

    @property
    def n_cols(self) -> int:
        return self.tensor.shape[-1]

    def stored(self, start: int, stop: int) -> U8Array:
        """Blocks u8[n, row_bytes] with the changed scales, in F16."""
        blocks = self._changed(start, stop)
        return blocks.view(np.uint8).reshape(stop - start, -1)

    def weights(self) -> F32Array:
        """All weights f32[n_rows, n_cols], by the changed scales."""
        n_rows = len(self.scales["d"])
        decode = self.tensor.format.decode
        parts = [decode(self.stored(i, min(i + _ROWS, n_rows)), self.n_cols) for i in range(0, n_rows, _ROWS)]
        return np.concatenate(parts)

    def fold(self, gradient: F32Array) -> dict[str, F32Array]:
        """Gradient of the changes, field -> f32[n_rows, n_blocks], from that of the weights f32[n_rows, n_cols]."""
        folded = {field: np.empty_like(self.changes[field]) for field in self.fields}
        n_rows, n_blocks = self.scales["d"].shape
        for start in range(0, n_rows, _ROWS):
            stop = min(start + _ROWS, n_rows)
            for field in self.fields:
                blocks = self._blocks(start, stop)
                blocks[field] = self.scales[field][start:stop].astype(np.float16).view(np.uint16)
                for other in self.fields:
                    if other != field:
                        blocks[other] = 0
                part = self.tensor.format.decode(blocks.view(np.uint8).reshape(stop - start, -1), self.n_cols)
                shape = (stop - start, n_blocks, -1)
                folded[field][start:stop] = np.einsum(
                    "rbi,rbi->rb", part.reshape(shape), gradient[start:stop].reshape(shape)
                )
        return folded

    def with_free_codes(self, original: Tensor, folder: Path) -> BlockScales:
        """The same with codes that can move, whose positions lie in `folder`; OSError where they cannot."""
        layout = layout_of(self.tensor.format)
        assert layout is not None
        codes, n_rows = open_codes(layout, original, folder), len(self.scales["d"])
        for start in range(0, n_rows, _ROWS):
            stop = min(start + _ROWS, n_rows)
            blocks = self._blocks(start, stop)
            values = self.tensor.format.decode(blocks.view(np.uint8).reshape(stop - start, -1), self.n_cols)
            codes.place(blocks, values, original.rows(start, stop), start)
        return replace(self, codes=codes)

    def move_codes(self, gradient: F32Array, rate: float) -> None:
        """One step of the codes' positions against the gradient of the weights f32[n_rows, n_cols]."""
        assert self.codes is not None
        n_rows = len(self.scales["d"])
        parts = [self._changed(i, min(i + _ROWS, n_rows)) for i in range(0, n_rows, _ROWS)]
        self.codes.move(gradient, np.concatenate([self.codes.lines(part)[0] for part in parts]), rate)

    def n_moved(self) -> int:
        """Codes that are others than the file's."""
        moved, n_rows = 0, len(self.scales["d"])
        for start in range(0, n_rows, _ROWS) if self.codes is not None else ():
            stop = min(start + _ROWS, n_rows)
            now, was = (each._blocks(start, stop) for each in (self, replace(self, codes=None)))
            one, other = (
                self.tensor.format.decode(blocks.view(np.uint8).reshape(stop - start, -1), self.n_cols)
                for blocks in (now, was)
            )
            moved += int(np.count_nonzero(one != other))
        return moved

    def _changed(self, start: int, stop: int) -> Blocks:
        blocks = self._blocks(start, stop)
        for field in self.fields:
            changed = self.scales[field][start:stop] * (1 + self.changes[field][start:stop])
            blocks[field] = changed.astype(np.float16).view(np.uint16)
        return blocks

    def _blocks(self, start: int, stop: int) -> Blocks:
        """As in the file, but for codes that have moved."""
        layout = layout_of(self.tensor.format)
        assert layout is not None
        row_bytes = self.tensor.format.row_bytes(self.n_cols)
        data = read_at(self.path, self.tensor.offset + start * row_bytes, (stop - start) * row_bytes)
        blocks: Blocks = data.copy().view(layout.dtype).reshape(stop - start, -1)
        return blocks if self.codes is None else self.codes.with_codes(blocks, start)


def read_block_scales(path: Path, tensor: GgufTensor) -> BlockScales | None:
    """The scales of a tensor; None where its format has no blocks that can be changed."""
    layout = layout_of(tensor.format)
    if layout is None:
        return None
    fields = ("d", layout.unit_of_offset) if layout.unit_of_offset else ("d",)
    n_rows = int(np.prod(tensor.shape[:-1]))
    shape = (n_rows, tensor.shape[-1] // tensor.format.block_len)
    found = BlockScales(path, tensor, fields, {}, {field: np.zeros(shape, np.float32) for field in fields})
    for field in fields:
        parts = [found._blocks(i, min(i + _ROWS, n_rows))[field] for i in range(0, n_rows, _ROWS)]
        found.scales[field] = np.concatenate(parts).view(np.float16).astype(np.float32)
    return found

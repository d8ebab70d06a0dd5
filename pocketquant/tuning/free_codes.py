"""The codes of a quantized tensor as numbers that can move, so that they follow gradients of the whole model.

Each weight has a position among the levels of its format. At first it is that of the original weight, kept within the
cell of the code that rounding chose. Positions move against the gradient of the decoded weight, as if the code followed
every step (the straight-through estimator of Bengio et al., 2013); a code changes when its position leaves the cell.
Positions near the edge of their cell leave it first, and these are the codes that cost least to change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.layout import Blocks, Layout, Scales
from pocketquant.model import Tensor

_MARGIN = 0.02
"""Least distance of a position from the edge of its cell at first, in units of the distance between levels."""

_MOMENTUM = 0.9
_SQUARE_DECAY = 0.98
"""Adam's two decay rates, of the mean and of the mean square of the gradients."""


@dataclass
class FreeCodes:
    """The positions of one tensor's weights.

    Attributes:
        layout: the layout of the tensor's format.
        positions: f32[n_rows, n_cols], mapped from a file.
        momentum: f32[n_rows, n_cols], mapped from a file.
        square: running mean of the squared gradients at the positions.
        steps: number of moves so far.
    """

    layout: Layout
    positions: F32Array
    momentum: F32Array
    square: float = 0.0
    steps: int = 0

    def codes(self, start: int, stop: int) -> U8Array:
        """u8[n, n_cols], the levels nearest to the positions of rows [start, stop)."""
        return _nearest(self.layout, self.positions[start:stop])

    def with_codes(self, blocks: Blocks, start: int) -> Blocks:
        """Blocks of the rows from `start` on, with the present codes and the scales they have."""
        stop = start + len(blocks)
        scales = self.layout.scales(blocks.view(np.uint8).reshape(len(blocks), -1))
        packed = self.layout.pack(self.codes(start, stop), scales)
        return packed.view(self.layout.dtype).reshape(blocks.shape)

    def place(self, blocks: Blocks, values: F32Array, originals: F32Array, start: int) -> None:
        """Sets the positions of the rows from `start` on; the blocks decode to values f32[n, n_cols]."""
        layout, levels = self.layout, self.layout.levels
        scale, offset = self.scales_and_offsets(blocks)
        is_free = scale != 0
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=is_free)
        codes = _nearest(layout, (values - offset) * inverse)
        gap = _gap(layout)
        edges = np.concatenate([levels[:1] - gap / 2, (levels[1:] + levels[:-1]) / 2, levels[-1:] + gap / 2])
        low, high = edges[codes] + _MARGIN * gap, edges[codes + 1] - _MARGIN * gap
        wanted = np.clip((originals - offset) * inverse, low, high)
        self.positions[start : start + len(blocks)] = np.where(is_free, wanted, levels[codes])

    def move(self, gradient: F32Array, scale: F32Array, rate: float) -> None:
        """Moves all positions one step.

        Args:
            gradient: f32[n_rows, n_cols], of the loss by the weights.
            scale: f32[n_rows, n_cols], weight per level.
            rate: the step of a position whose gradient is as large as the tensor's root mean square, in units of the
                distance between levels.
        """
        layout, gap = self.layout, _gap(self.layout)
        by_position = gradient * scale
        self.steps += 1
        self.square += (1 - _SQUARE_DECAY) * (float(np.mean(by_position**2, dtype=np.float64)) - self.square)
        self.momentum *= np.float32(_MOMENTUM)
        self.momentum += np.float32(1 - _MOMENTUM) * by_position
        rms = (self.square / (1 - _SQUARE_DECAY**self.steps)) ** 0.5
        if rms > 0:
            self.positions -= np.float32(rate * gap / (1 - _MOMENTUM**self.steps) / rms) * self.momentum
            np.clip(self.positions, layout.levels[0] - gap / 2, layout.levels[-1] + gap / 2, out=self.positions)

    def scales_and_offsets(self, blocks: Blocks) -> tuple[F32Array, F32Array]:
        """Weight per level and weight at level zero, f32[n, n_cols] each."""
        layout = self.layout
        found: Scales = layout.scales(blocks.view(np.uint8).reshape(len(blocks), -1))
        n_sub_blocks = layout.block_len // layout.sub_block_len
        d, dmin = (
            np.repeat(unit.view(np.float16).astype(np.float32), n_sub_blocks, axis=1) for unit in (found.d, found.dmin)
        )
        scale, offset = d * found.scale, np.float32(layout.offset_sign) * (dmin * found.offset)
        return np.repeat(scale, layout.sub_block_len, axis=1), np.repeat(offset, layout.sub_block_len, axis=1)


def open_codes(layout: Layout, tensor: Tensor, folder: Path) -> FreeCodes:
    """Positions in files of their own, before `place` sets them; OSError if the files cannot be made."""
    shape = (tensor.n_rows, tensor.n_cols)
    positions, momentum = (np.memmap(folder / f"{tensor.name}.{i}", np.float32, "w+", shape=shape) for i in range(2))
    return FreeCodes(layout, positions, momentum)


def _gap(layout: Layout) -> np.float32:
    """Mean distance between levels."""
    return np.float32((layout.levels[-1] - layout.levels[0]) / (len(layout.levels) - 1))


def _nearest(layout: Layout, positions: F32Array) -> U8Array:
    levels = layout.levels
    if layout.is_even:
        return np.clip(np.rint(positions - levels[0]), 0, len(levels) - 1).astype(np.uint8)
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, positions).astype(np.uint8)

"""Blocks that can be changed: scales, codes, and gradients by them, for every block format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pocketquant.formats import FORMATS
from pocketquant.gguf_file.reading import GgufTensor
from pocketquant.model import Role, Tensor
from pocketquant.tuning.block_scales import BlockScales, read_block_scales

ROWS, COLS, OFFSET = 6, 512, 96
BLOCKS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS"]
WITH_OFFSETS = {"Q2_K": "dmin", "Q4_K": "dmin", "Q5_K": "dmin", "Q4_1": "m", "Q5_1": "m"}


@pytest.fixture(params=BLOCKS)
def scales(request: pytest.FixtureRequest, tmp_path: Path) -> BlockScales:
    kind = FORMATS[request.param]
    weights = (
        np.random.default_rng(1).standard_normal((ROWS, COLS)).astype(np.float32) * np.arange(1, ROWS + 1)[:, None]
    )
    data = kind.encode(np.ascontiguousarray(weights, np.float32))
    path = tmp_path / "blocks"
    path.write_bytes(bytes(OFFSET) + data.tobytes())
    found = read_block_scales(path, GgufTensor("w", (ROWS, COLS), kind, OFFSET, data.nbytes))
    assert found is not None
    return found


def original(scales: BlockScales) -> np.ndarray:
    row_bytes = scales.tensor.format.row_bytes(COLS)
    return np.frombuffer(scales.path.read_bytes()[OFFSET:], np.uint8).reshape(ROWS, row_bytes)


def test_unchanged_scales_give_the_bytes_back(scales: BlockScales) -> None:
    assert scales.fields == ("d", *([WITH_OFFSETS[scales.tensor.format.name]] if len(scales.fields) > 1 else []))
    assert (len(scales.fields) > 1) == (scales.tensor.format.name in WITH_OFFSETS)
    np.testing.assert_array_equal(scales.stored(0, ROWS), original(scales))
    np.testing.assert_array_equal(scales.weights(), scales.tensor.format.decode(original(scales), COLS))


def test_a_change_touches_the_scales_of_its_block_only(scales: BlockScales) -> None:
    before, length = scales.weights(), scales.tensor.format.block_len
    scales.changes["d"][3, 1] = 0.25
    after = scales.weights()
    changed = np.argwhere(after != before)
    assert len(changed)
    assert set(changed[:, 0]) == {3}
    assert length <= changed[:, 1].min()
    assert changed[:, 1].max() < 2 * length
    assert np.count_nonzero(scales.stored(0, ROWS) != original(scales)) <= 2


def test_gradients_are_those_of_the_weights(scales: BlockScales) -> None:
    """Weights are linear in a scale, and doubled F16 numbers are exact: the difference is the derivative."""
    gradient = np.random.default_rng(2).standard_normal((ROWS, COLS)).astype(np.float32)
    before, folded = scales.weights(), scales.scale_gradients(gradient)
    for field in scales.fields:
        scales.changes[field][:] = 1.0
        difference = (scales.weights() - before) * gradient
        scales.changes[field][:] = 0.0
        expected = difference.reshape(ROWS, -1, scales.tensor.format.block_len).sum(axis=2)
        np.testing.assert_allclose(folded[field], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.fixture
def free(scales: BlockScales, tmp_path: Path) -> tuple[BlockScales, np.ndarray]:
    """With codes that can move, and the originals; those are far from what the rounder chose for one weight in 50."""
    rng = np.random.default_rng(3)
    originals = scales.weights() + 0.02 * rng.standard_normal((ROWS, COLS)).astype(np.float32)
    originals[rng.random((ROWS, COLS)) < 0.02] *= 2
    tensor = Tensor("w", Role.FFN_UP, 0, (ROWS, COLS), "F32", Held(originals))
    return scales.with_free_codes(tensor, tmp_path), originals


@dataclass(frozen=True)
class Held:
    """Rows that are in memory."""

    values: np.ndarray

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop]


def test_free_codes_start_as_they_are(free: tuple[BlockScales, np.ndarray]) -> None:
    scales, _ = free
    assert scales.codes is not None
    assert scales.n_moved() == 0
    np.testing.assert_array_equal(scales.stored(0, ROWS), original(scales))
    scales.changes["d"][:] = 0.5
    for start, stop in ((0, 2), (2, 5), (5, ROWS)):
        blocks = scales.stored(start, stop)
        np.testing.assert_array_equal(blocks, scales.stored(0, ROWS)[start:stop])


def test_codes_move_against_the_gradient(free: tuple[BlockScales, np.ndarray]) -> None:
    scales, originals = free
    assert scales.codes is not None
    before, gradient = scales.weights(), np.zeros((ROWS, COLS), np.float32)
    errors = np.abs(originals - before)
    chosen = errors > np.quantile(errors, 0.9)
    gradient[chosen] = np.sign(before - originals)[chosen]  # where weights should go is where they came from
    for _ in range(4):
        scales.move_codes(gradient, 0.05)
    after = scales.weights()
    moved = after != before
    assert 0 < moved.sum() == scales.n_moved()
    assert not moved[~chosen].any()
    assert (((after - before) * gradient)[moved] < 0).all()
    for _ in range(400):
        scales.move_codes(gradient, 0.5)
    data = scales.stored(0, ROWS)
    np.testing.assert_array_equal(scales.weights(), scales.tensor.format.decode(data, COLS))
    assert np.abs(scales.weights() - after).max() > 0  # to the end of the levels, and no further


def test_formats_without_blocks_have_no_scales(tmp_path: Path) -> None:
    tensor = GgufTensor("w", (ROWS, COLS), FORMATS["F16"], 0, 2 * ROWS * COLS)
    assert read_block_scales(tmp_path / "unread", tensor) is None

"""What rounding inputs to 8 bits loses, against the definition written out in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from rounded_inputs import rounding_errors

from pocketquant.calibration.hessian import HessianSums, MatrixRange
from pocketquant.formats import FORMATS
from pocketquant.formats.activations import COARSE, FINE, add_rounding_errors
from pocketquant.llama.observing import Matmul

F32Array = npt.NDArray[np.float32]


def make_rows(n_cols: int, seed: int = 3) -> F32Array:
    rng = np.random.default_rng(seed)
    rows = (rng.standard_t(3, (40, n_cols)) * rng.lognormal(0.0, 1.5, n_cols)).astype(np.float32)
    rows[::7] = 0
    return rows


@pytest.mark.parametrize(
    ("n_cols", "coarse", "fine"), [(512, 256, 32), (256, 256, 32), (320, 320, 32), (32, 32, 32), (50, 50, 50)]
)
def test_columns_of_a_block_share_a_scale(n_cols: int, coarse: int, fine: int) -> None:
    rows, sums = make_rows(n_cols), np.zeros((2, n_cols))
    add_rounding_errors(rows, sums)
    np.testing.assert_allclose(sums[0], rounding_errors(rows, coarse, is_half=False), rtol=1e-6)
    np.testing.assert_allclose(sums[1], rounding_errors(rows, fine, is_half=True), rtol=1e-6)


@pytest.mark.parametrize("size", [3e-7, 1e-5, 1e-3, 1e3])
def test_the_scale_for_32_columns_is_kept_in_f16(size: float) -> None:
    rows, sums = (make_rows(64) * np.float32(size)).astype(np.float32), np.zeros((2, 64))
    add_rounding_errors(rows, sums)
    np.testing.assert_allclose(sums[1], rounding_errors(rows, 32, is_half=True), rtol=1e-6)


def test_zero_rows_lose_nothing_and_sums_grow() -> None:
    sums = np.zeros((2, 256))
    add_rounding_errors(np.zeros((5, 256), np.float32), sums)
    assert not sums.any()
    rows, once = make_rows(256), np.zeros((2, 256))
    add_rounding_errors(rows, once)
    for part in (rows[:9], rows[9:10], rows[10:]):
        add_rounding_errors(part, sums)
    np.testing.assert_allclose(sums, once, rtol=1e-12)


def test_one_large_input_costs_its_whole_block() -> None:
    rows, sums = np.full((1, 512), 0.01, np.float32), np.zeros((2, 512))
    rows[0, 40] = 100
    add_rounding_errors(rows, sums)
    lost = np.isclose(sums, 1e-4)  # rounded to zero, all of it is lost
    assert np.flatnonzero(lost[0]).tolist() == [i for i in range(COARSE) if i != 40]
    assert np.flatnonzero(lost[1]).tolist() == [i for i in range(FINE, 2 * FINE) if i != 40]


def test_formats_have_one_of_the_blocks_that_are_measured() -> None:
    assert {item.activation_block for item in FORMATS.values() if not item.is_plain} == {COARSE, FINE}
    assert not any(item.activation_block for item in FORMATS.values() if item.is_plain)


def test_experts_get_the_errors_of_their_own_tokens_and_unseen_ones_none() -> None:
    name, k = "blk.0.ffn_up_exps.weight", 64
    sums = HessianSums({name: MatrixRange(name, k, 1, 4)}, 0)
    inputs = make_rows(k)[:8]
    chosen = np.array([[0, 1], [1, 3], [3, 0], [1, 0], [3, 1], [0, 3], [1, 3], [0, 1]], np.int32)  # never 2
    sums.add(Matmul(name, (4, 1), inputs.reshape(1, 8, 1, k), chosen))
    assert sums.counts[name].tolist() == [6, 0, 5]
    for expert in (1, 2, 3):
        expected = np.zeros((2, k))
        add_rounding_errors(inputs[(chosen == expert).any(axis=1)], expected)
        np.testing.assert_allclose(sums.rounding[name][expert - 1], expected, rtol=1e-12)
        assert expected.any() == (expert != 2)

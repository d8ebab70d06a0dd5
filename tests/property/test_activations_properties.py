"""Properties of what rounding inputs loses that hold for any inputs."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pocketquant.formats import F32Array
from pocketquant.formats.activations import add_rounding_errors

ROWS = st.integers(1, 20).flatmap(
    lambda n: arrays(np.float32, (3, 32 * n), elements=st.floats(-256, 256, width=32), fill=st.floats(-1, 1, width=32))
)


def sums_of(rows: F32Array) -> np.ndarray:
    sums = np.zeros((2, rows.shape[1]))
    add_rounding_errors(rows, sums)
    return sums


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_no_input_loses_more_than_half_a_step(rows: F32Array) -> None:
    coarse, fine = sums_of(rows)
    n_cols = rows.shape[1]
    for found, block in ((coarse, 256 if n_cols % 256 == 0 else n_cols), (fine, 32)):
        peaks = np.abs(rows.astype(np.float64)).reshape(3, -1, block).max(axis=2)
        # the last code is up to 127 steps out, each of them wrong by half of F16's last bit; below 2**-14 by 2**-25
        steps = np.repeat(peaks / 127 * (0.5 + 127 * 2.0**-11) + (127 * 2.0**-25 if block == 32 else 0), block, axis=1)
        assert (found <= np.square(steps).sum(axis=0) * (1 + 1e-5)).all()
        assert (found >= 0).all()


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(1, 2), st.permutations(range(3)))
def test_rows_apart_are_rows_together_in_any_order(rows: F32Array, cut: int, order: list[int]) -> None:
    mixed = np.ascontiguousarray(rows[order])
    np.testing.assert_allclose(sums_of(mixed[:cut]) + sums_of(mixed[cut:]), sums_of(rows), rtol=1e-12)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(-6, 6))
def test_inputs_twice_as_large_lose_four_times_as_much(rows: F32Array, power: int) -> None:
    rows = np.where(np.abs(rows) < 1, 0, rows).astype(np.float32)  # scales that F16 holds in full
    np.testing.assert_array_equal(sums_of(rows * np.float32(2.0**power)), sums_of(rows) * 4.0**power)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (2, 32), elements=st.floats(-256, 256, width=32)))
def test_blocks_know_nothing_of_each_other(rows: F32Array) -> None:
    wide = np.concatenate([rows * np.float32(64), rows, rows[::-1]], axis=1)
    np.testing.assert_array_equal(sums_of(np.ascontiguousarray(wide))[1, 32:64], sums_of(rows)[1])

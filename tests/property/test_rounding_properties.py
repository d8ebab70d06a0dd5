"""Properties of rounding by curvature that hold for any weights and any moment."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pocketquant.formats import FORMATS, F32Array
from pocketquant.quant.rounding import Rounding, factor_hessian, round_matrix, round_rows

NAMES = st.sampled_from(
    ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
)
ROWS = arrays(np.float32, (3, 256), elements=st.floats(-8, 8, width=32), fill=st.floats(-1, 1, width=32))
SEEDED = st.builds(
    lambda seed, shape: np.random.default_rng(seed).standard_t(shape, (3, 256)).astype(np.float32),
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 4, 30]),
)
STEPS = st.builds(Rounding, st.booleans(), st.integers(0, 2))


def moment_of(seed: int, n_input: int, rank: int) -> F32Array:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((rank, n_input)) * rng.lognormal(0.0, 2.0, n_input)
    return (inputs.T @ inputs / rank).astype(np.float32)


MOMENTS = st.builds(moment_of, st.integers(0, 2**32 - 1), st.just(256), st.sampled_from([1, 40, 700]))
OUTPUTS = st.builds(moment_of, st.integers(0, 2**32 - 1), st.just(3), st.sampled_from([1, 9]))


@settings(max_examples=60, deadline=None)
@given(NAMES, st.one_of(ROWS, SEEDED), MOMENTS, STEPS)
def test_no_row_is_worse_than_the_plain_kernel(name: str, rows: F32Array, moment: F32Array, steps: Rounding) -> None:
    factored, quant_format = factor_hessian(moment), FORMATS[name]
    hessian = factored.matrix.astype(np.float64)
    plain = quant_format.encode(rows, np.ascontiguousarray(factored.matrix.diagonal()))
    ours, theirs = (
        ((errors @ hessian) * errors).sum(axis=1)
        for errors in (
            quant_format.decode(data, 256).astype(np.float64) - rows
            for data in (round_rows(rows, quant_format, factored, steps), plain)
        )
    )
    size = ((rows.astype(np.float64) @ hessian) * rows).sum(axis=1)
    assert (ours <= theirs * (1 + 1e-4) + 1e-9 * size).all()


@settings(max_examples=40, deadline=None)
@given(NAMES, st.one_of(ROWS, SEEDED), MOMENTS, OUTPUTS, STEPS)
def test_no_matrix_is_worse_than_by_the_plain_kernel(
    name: str, rows: F32Array, moment: F32Array, outer: F32Array, steps: Rounding
) -> None:
    inputs, outputs, quant_format = factor_hessian(moment), factor_hessian(outer), FORMATS[name]
    hessian, across = inputs.matrix.astype(np.float64), outputs.matrix.astype(np.float64)

    def loss(errors: F32Array) -> float:
        return float(((across @ errors.astype(np.float64) @ hessian) * errors).sum())

    plain = quant_format.encode(rows, np.ascontiguousarray(inputs.matrix.diagonal()))
    ours = round_matrix(rows, quant_format, inputs, outputs, steps)
    bound = loss(quant_format.decode(plain, 256) - rows)
    assert loss(quant_format.decode(ours, 256) - rows) <= bound * (1 + 1e-4) + 1e-9 * loss(rows)


@settings(max_examples=40, deadline=None)
@given(NAMES, st.one_of(ROWS, SEEDED), MOMENTS, STEPS, st.integers(1, 2))
def test_rows_apart_are_rows_together(name: str, rows: F32Array, moment: F32Array, steps: Rounding, cut: int) -> None:
    factored, quant_format = factor_hessian(moment), FORMATS[name]
    apart = [round_rows(piece, quant_format, factored, steps) for piece in (rows[:cut], rows[cut:])]
    np.testing.assert_array_equal(np.concatenate(apart), round_rows(rows, quant_format, factored, steps))

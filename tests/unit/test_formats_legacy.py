"""The formats of 32 weights and IQ4: known bytes, edge values, and what the search is worth."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from numba import njit

from pocketquant.formats import FORMATS
from pocketquant.formats.half import f16_bits, f16_round, f16_value
from pocketquant.formats.iq4 import IQ4_XS, LEVELS
from pocketquant.formats.scale_search import block_weights, in_half, load, store

F32Array = npt.NDArray[np.float32]
NAMES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS"]
SEARCHED = [name for name in NAMES if name != "Q8_0"]


def roundtrip(name: str, rows: F32Array, importance: F32Array | None = None) -> F32Array:
    return FORMATS[name].decode(FORMATS[name].encode(rows, importance), rows.shape[1])


def weighted_error(rows: F32Array, decoded: F32Array, importance: F32Array | None = None) -> float:
    weights = np.ones(rows.shape[1]) if importance is None else importance
    return float((weights * (rows.astype(np.float64) - decoded) ** 2).sum())


@njit
def _all_bits(values: F32Array, bits: npt.NDArray[np.uint16]) -> None:
    for i in range(values.size):
        bits[i] = f16_bits(values[i])


@njit
def _all_values(bits: npt.NDArray[np.uint16], values: F32Array) -> None:
    for i in range(bits.size):
        values[i] = f16_value(bits[i])


@njit
def _all_rounded(values: F32Array, lanes_out: F32Array, scalars_out: F32Array, unit: np.float32) -> None:
    for i in range(0, values.size, 16):
        store(lanes_out, i, in_half(load(values, i), unit))
    for i in range(values.size):
        scalars_out[i] = f16_round(values[i] * unit) / unit


def test_every_half_has_numpys_value() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    values = np.empty(65536, dtype=np.float32)
    _all_values(bits, values)
    assert np.array_equal(values.view(np.uint32), bits.view(np.float16).astype(np.float32).view(np.uint32))


def test_halves_round_as_numpys_and_saturate() -> None:
    rng = np.random.default_rng(0)
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (finite[1:] + finite[:-1]) / 2
    values = np.concatenate(
        [
            middles,
            np.nextafter(middles, np.float32(np.inf)),
            np.nextafter(middles, np.float32(0)),
            rng.integers(0, 0x7F800000, 100_000, dtype=np.uint32).view(np.float32),
        ]
    )
    values = np.concatenate([values, -values])
    bits = np.empty(values.size, dtype=np.uint16)
    _all_bits(values, bits)
    assert np.array_equal(bits, np.clip(values, -65504, 65504).astype(np.float16).view(np.uint16))


@pytest.mark.parametrize("unit", [1.0, 2.0**-12, 2.0**-20, 2.0**30])
def test_lanes_round_to_the_halves_that_scalars_do(unit: float) -> None:
    values = np.random.default_rng(1).standard_normal(16_000).astype(np.float32)
    lanes, scalars = np.empty_like(values), np.empty_like(values)
    _all_rounded(values, lanes, scalars, np.float32(unit))
    assert np.array_equal(lanes, scalars)


def test_weights_are_scaled_by_block_and_zeros_become_ones() -> None:
    importance = np.concatenate([np.zeros(32), np.full(31, 2.0), [8.0]]).astype(np.float32)
    expected = np.concatenate([np.ones(32), np.full(31, 0.25), [1.0]])
    assert np.array_equal(block_weights(importance, 64, 32), expected)
    assert np.array_equal(block_weights(None, 64, 32), np.ones(64))


def test_q4_0_bytes() -> None:
    rows = np.arange(-8, 24, dtype=np.float32)[None] / 2
    # 11.5 lies farthest out and becomes code 0: scale -11.5 / 8, codes round(x / scale) + 8
    codes = np.clip(np.floor(rows[0] / -1.4375 + 8.5), 0, 15).astype(np.uint8)
    expected = np.float16(-1.4375).tobytes() + (codes[:16] | codes[16:] << 4).tobytes()
    assert FORMATS["Q4_0"].encode(rows).tobytes() == expected


def test_q8_0_rounds_halves_away_from_zero() -> None:
    rows = np.zeros((1, 32), dtype=np.float32)
    rows[0, :6] = [127, 0.5, -0.5, 1.5, -2.5, 0.49999997]
    codes = FORMATS["Q8_0"].encode(rows)[0, 2:].view(np.int8)
    assert codes[:7].tolist() == [127, 1, -1, 2, -3, 0, 0]


@pytest.mark.parametrize(
    ("name", "scale", "minimum", "low", "high"),
    [("Q4_1", 0.25, -1.5, 0, 15), ("Q5_0", -0.25, 0.0, -16, 15), ("Q5_1", 0.125, 0.75, 0, 31)],
)
def test_weights_on_a_grid_come_back_exactly(name: str, scale: float, minimum: float, low: int, high: int) -> None:
    codes = np.random.default_rng(2).integers(low, high + 1, (3, 64))
    codes[:, ::32], codes[:, 1::32] = low, high
    rows = (codes * scale + minimum).astype(np.float32)
    assert np.array_equal(roundtrip(name, rows), rows)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_iq4_nl_gives_its_own_levels_back(sign: float) -> None:
    rows = np.tile(LEVELS, 4)[None] * np.float32(sign / 256)
    assert np.array_equal(roundtrip("IQ4_NL", rows), rows)
    assert np.array_equal(roundtrip("IQ4_NL", rows, np.arange(1, 65, dtype=np.float32)), rows)


def test_iq4_xs_layout() -> None:
    block = np.zeros((1, 1), dtype=IQ4_XS)
    block["d"] = np.float16(0.5).view(np.uint16)
    block["scales_l"] = [[[0x10, 0x32, 0x54, 0x76]]]
    block["scales_h"] = 0b1110010011100100
    block["qs"] = 0x80  # code 0 in the first half, 8 in the second
    decoded = FORMATS["IQ4_XS"].decode(block.view(np.uint8), 256).reshape(8, 2, 16)
    multiples = np.array([0, 1, 2, 3, 4, 5, 6, 7]) + 16 * np.array([0, 1, 2, 3, 0, 1, 2, 3]) - 32
    assert np.array_equal(decoded[:, 0, 0], -127 * 0.5 * multiples)
    assert np.array_equal(decoded[:, 1, 5], 1 * 0.5 * multiples)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    rows = np.zeros((2, 512), dtype=np.float32)
    rows[1, 256:] = 1.0
    decoded = roundtrip(name, rows)
    assert not decoded[:, :256].any()
    assert np.allclose(decoded[1, 256:], 1.0, rtol=2.0**-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-40, 1e-20, 1e-7, 3e-6, 6e4])
def test_any_weight_within_range_becomes_a_finite_one(name: str, size: float) -> None:
    rows = np.random.default_rng(3).uniform(-1, 1, (2, 512)).astype(np.float32) * np.float32(size)
    for importance in (None, np.linspace(0, 1, 512, dtype=np.float32)):
        decoded = roundtrip(name, rows, importance)
        assert np.isfinite(decoded).all()
        assert weighted_error(rows, decoded, importance) <= weighted_error(rows, np.zeros_like(rows), importance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e9, -1e9, 1e30, 3e38])
def test_a_weight_beyond_the_range_is_refused(name: str, size: float) -> None:
    for importance in (None, np.linspace(0, 1, 512, dtype=np.float32)):
        rows = np.random.default_rng(3).standard_normal((2, 512)).astype(np.float32)
        rows[1, 300] = size
        with pytest.raises(OverflowError, match=f"beyond the range of {name} .*use bf16 or f32"):
            FORMATS[name].encode(rows, importance)


@pytest.mark.parametrize("name", NAMES)
def test_a_block_without_importance_is_rounded_as_if_all_mattered_equally(name: str) -> None:
    rows = np.random.default_rng(4).standard_normal((4, 512)).astype(np.float32)
    importance = np.ones(512, dtype=np.float32)
    importance[32:64] = 0.0
    plain = weighted_error(rows[:, 32:64], roundtrip(name, rows)[:, 32:64])
    assert weighted_error(rows[:, 32:64], roundtrip(name, rows, importance)[:, 32:64]) <= 1.05 * plain
    nothing = np.zeros(512, dtype=np.float32)
    assert np.array_equal(roundtrip(name, rows, nothing), roundtrip(name, rows, np.ones(512, dtype=np.float32)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("exponent", [-100, 100])
def test_only_the_ratios_of_importance_matter(name: str, exponent: int) -> None:
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((4, 512)).astype(np.float32)
    importance = rng.lognormal(0, 1, 512).astype(np.float32)
    scaled = importance * np.float32(2.0**exponent)
    assert np.array_equal(FORMATS[name].encode(rows, scaled), FORMATS[name].encode(rows, importance))


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_lowers_the_error_it_weighs(name: str) -> None:
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((16, 512)).astype(np.float32)
    importance = rng.chisquare(1, 512).astype(np.float32)
    plain = weighted_error(rows, roundtrip(name, rows), importance)
    assert weighted_error(rows, roundtrip(name, rows, importance), importance) < 0.97 * plain


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "IQ4_NL"])
def test_search_is_near_the_best_of_all_halves(name: str) -> None:
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((40, 32)).astype(np.float32)
    importance = rng.lognormal(0, 1, 32).astype(np.float32)
    levels = {"Q4_0": np.arange(-8, 8), "Q5_0": np.arange(-16, 16), "IQ4_NL": LEVELS}[name].astype(np.float32)
    halves = np.arange(1, 0x7C00, 4, dtype=np.uint16).view(np.float16).astype(np.float32)
    reach = np.abs(rows).max() / np.abs(levels).max()
    halves = halves[(halves > 0.3 * reach / 4) & (halves < 1.3 * reach)]
    best = np.full(len(rows), np.inf)
    for scale in np.concatenate([halves, -halves]):
        ordered = np.sort(levels * scale)
        nearest = ordered[np.searchsorted((ordered[1:] + ordered[:-1]) / 2, rows)]
        best = np.minimum(best, (importance * (rows - nearest) ** 2).sum(axis=1))
    assert weighted_error(rows, roundtrip(name, rows, importance), importance) < 1.03 * best.sum()


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_and_ragged_rows(name: str) -> None:
    assert FORMATS[name].encode(np.zeros((0, 512), dtype=np.float32)).shape == (0, FORMATS[name].row_bytes(512))
    with pytest.raises(ValueError, match="no multiple"):
        FORMATS[name].encode(np.zeros((1, 500), dtype=np.float32))

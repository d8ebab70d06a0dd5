"""The K-quants: layouts, edge cases, and what a search must never get wrong."""

from __future__ import annotations

import hashlib
import importlib

import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numba import njit

from pocketquant.formats import FORMATS, lanes

NAMES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
F32 = npt.NDArray[np.float32]


def weights(n_rows: int, n_cols: int, seed: int = 0) -> F32:
    return (np.random.default_rng(seed).standard_t(4, (n_rows, n_cols)) * 0.02).astype(np.float32)


def layout(name: str) -> np.dtype[np.void]:
    block: np.dtype[np.void] = importlib.import_module(f"pocketquant.formats.{name.lower()}").BLOCK
    return block


def scales_of(name: str, data: npt.NDArray[np.uint8]) -> F32:
    """Every F16 scale in encoded rows, as f32."""
    blocks = data.view(layout(name))
    fields = [field for field in ("d", "dmin") if field in (blocks.dtype.names or ())]
    return np.stack([blocks[field].copy().view(np.float16) for field in fields]).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_layout_has_ggml_size(name: str) -> None:
    assert layout(name).itemsize == FORMATS[name].block_bytes


@pytest.mark.parametrize("name", NAMES)
def test_decode_equals_gguf_py(name: str) -> None:
    data = np.random.default_rng(1).integers(0, 256, (64, FORMATS[name].row_bytes(1024)), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random bytes hold infinite scales too
        expected = dequantize(data, GGMLQuantizationType[name])
    np.testing.assert_array_equal(FORMATS[name].decode(data, 1024), expected)


# One block each with d = dmin = 1: bytes set by hand, and what one weight must then be.
BY_HAND = {
    "Q2_K": ({("scales", 15): 0x4B, ("qs", 63): 0xC0}, 255, 11 * 3 - 4),
    "Q3_K": ({("scales", 0): 0x50, ("scales", 8): 0x30, ("qs", 42): 3, ("hmask", 10): 16}, 138, (53 - 32) * (7 - 4)),
    "Q4_K": ({("scales", 0): 3, ("scales", 4): 2, ("qs", 5): 0x0E}, 5, 3 * 14 - 2),
    "Q5_K": ({("scales", 9): 0x57, ("qh", 1): 32, ("qs", 65): 0x90}, 161, 7 * 25 - 5),
    "Q6_K": ({("scales", 6): -3, ("ql", 33): 0xF0, ("qh", 1): 0xC0}, 97, -3 * (63 - 32)),
}


@pytest.mark.parametrize("name", NAMES)
def test_decode_of_block_written_by_hand(name: str) -> None:
    by_hand, weight, value = BY_HAND[name]
    block = np.zeros(1, layout(name))
    for unit in ("d", "dmin"):
        if unit in (block.dtype.names or ()):
            block[unit] = 0x3C00
    for (field, place), byte in by_hand.items():
        block[field][0, place] = byte
    assert FORMATS[name].decode(block.view(np.uint8).reshape(1, -1), 256)[0, weight] == value


# Equal for SSE2, AVX2 and AVX-512 code. A change of the search changes them: refresh them with the figures of
# benchmarks/kernels_kquants.py before and after in hand.
DIGESTS = {
    "Q2_K": ["9848a2014955cffd", "e2bc087f3ed0b411"],
    "Q3_K": ["299c6c7d3e3304d7", "9e5722fd981b6b13"],
    "Q4_K": ["15d96c6f3c97b97f", "4ddef055a2c1a8e8"],
    "Q5_K": ["e7907dab7cbc435f", "acbb188ea1df88f5"],
    "Q6_K": ["7a0cd78a51b5aeb5", "3f805620026df578"],
}


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_same_on_every_machine(name: str) -> None:
    values = ((np.arange(3 * 512, dtype=np.int64) * 2654435761 >> 7) % 4093 - 2046).astype(np.float32) / 4096
    rows = (values * np.abs(values)).astype(np.float32).reshape(3, 512)
    importance = (1 + np.arange(512) * 40503 % 257).astype(np.float32)
    digests = [
        hashlib.sha256(FORMATS[name].encode(rows, given).tobytes()).hexdigest()[:16] for given in (None, importance)
    ]
    assert digests == DIGESTS[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_codes_are_the_nearest_under_the_stored_scales(name: str, weighted: bool) -> None:
    """No other code of a weight would decode nearer to it: every code is decoded under the stored scales."""
    format = FORMATS[name]
    rows = weights(4, 512)
    importance = np.random.default_rng(2).lognormal(0, 1.5, 512).astype(np.float32) if weighted else None
    data = format.encode(rows, importance)
    error = np.abs(format.decode(data, 512) - rows)
    blocks = data.view(layout(name)).copy()
    best = np.full_like(rows, np.inf)
    code_fields = {"Q2_K": ["qs"], "Q3_K": ["qs", "hmask"], "Q4_K": ["qs"], "Q5_K": ["qs", "qh"], "Q6_K": ["ql", "qh"]}
    # bytes of equal bits give every weight the same code
    patterns = {"Q2_K": [[b * 0x55] for b in range(4)], "Q4_K": [[b * 0x11] for b in range(16)]}
    patterns["Q3_K"] = [[b * 0x55, h * 0xFF] for b in range(4) for h in range(2)]
    patterns["Q5_K"] = [[b * 0x11, h * 0xFF] for b in range(16) for h in range(2)]
    patterns["Q6_K"] = [[b * 0x11, h * 0x55] for b in range(16) for h in range(4)]
    for pattern in patterns[name]:
        for field, byte in zip(code_fields[name], pattern, strict=True):
            blocks[field] = byte
        decoded = format.decode(blocks.view(np.uint8).reshape(data.shape), 512)
        best = np.minimum(best, np.abs(decoded - rows))
    np.testing.assert_allclose(error, best, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_zero_rows_become_zero(name: str) -> None:
    data = FORMATS[name].encode(np.zeros((2, 512), np.float32), np.ones(512, np.float32))
    assert not scales_of(name, data).any()
    assert not FORMATS[name].decode(data, 512).any()


@pytest.mark.parametrize("name", NAMES)
def test_zero_part_in_a_block_becomes_zero(name: str) -> None:
    rows = weights(2, 256)
    rows[:, 64:96] = 0
    assert not FORMATS[name].decode(FORMATS[name].encode(rows), 256)[:, 64:96].any()


@pytest.mark.parametrize("name", NAMES)
def test_block_without_importance_counts_as_plain(name: str) -> None:
    rows = weights(2, 512)
    importance = np.ones(512, np.float32)
    importance[:256] = 0
    plain, mixed = FORMATS[name].encode(rows), FORMATS[name].encode(rows, importance)
    np.testing.assert_array_equal(mixed, plain)


@pytest.mark.parametrize("name", NAMES)
def test_part_without_importance_still_gets_codes(name: str) -> None:
    rows = weights(4, 256)
    importance = np.ones(256, np.float32)
    importance[32:64] = 0
    decoded = FORMATS[name].decode(FORMATS[name].encode(rows, importance), 256)
    assert np.square(decoded - rows)[:, 32:64].sum() < 0.3 * np.square(rows)[:, 32:64].sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [2.0**-90, 2.0**70])
def test_only_ratios_of_importance_matter(name: str, factor: float) -> None:
    rows = weights(2, 512)
    importance = np.random.default_rng(3).chisquare(1, 512).astype(np.float32)
    scaled = (importance * np.float32(factor)).astype(np.float32)
    np.testing.assert_array_equal(FORMATS[name].encode(rows, importance), FORMATS[name].encode(rows, scaled))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-20, 1e-9, 1e-7, 1e-5, 6e4, 9e5])
def test_any_magnitude_gives_finite_scales(name: str, magnitude: float) -> None:
    unit = np.clip(weights(2, 512) * 10, -1, 1)
    rows = (unit * np.float64(magnitude)).astype(np.float32)
    data = FORMATS[name].encode(rows, np.linspace(0, 1, 512, dtype=np.float32))
    assert np.isfinite(scales_of(name, data)).all()
    decoded = FORMATS[name].decode(data, 512)
    error = np.square((decoded - rows) / np.float64(magnitude)).sum() if magnitude > 1e-40 else 0.0
    assert error <= np.square(rows / np.float64(magnitude)).sum() * (1 + 1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e9, -1e9, 1e20, 3e38])
def test_a_weight_beyond_the_range_is_refused(name: str, size: float) -> None:
    for importance in (None, np.linspace(0, 1, 512, dtype=np.float32)):
        rows = weights(2, 512)
        rows[1, 300] = size
        with pytest.raises(OverflowError, match=f"beyond the range of {name} .*use bf16 or f32"):
            FORMATS[name].encode(rows, importance)


@pytest.mark.parametrize("name", NAMES)
def test_equal_weights_survive(name: str) -> None:
    for value in (0.75, -0.75):
        rows = np.full((1, 256), value, np.float32)
        np.testing.assert_allclose(FORMATS[name].decode(FORMATS[name].encode(rows), 256), rows, rtol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_importance_moves_the_error_to_where_it_costs_less(name: str) -> None:
    rows = weights(16, 512)
    importance = np.ones(512, np.float32)
    importance[::16] = 1000
    plain = np.square(FORMATS[name].decode(FORMATS[name].encode(rows), 512) - rows)
    given = np.square(FORMATS[name].decode(FORMATS[name].encode(rows, importance), 512) - rows)
    assert given[:, ::16].sum() < 0.5 * plain[:, ::16].sum()
    assert (given @ importance).sum() < (plain @ importance).sum()


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_do_not_fit_raise(name: str) -> None:
    with pytest.raises(ValueError, match="300 columns are no multiple of 256"):
        FORMATS[name].encode(weights(1, 300))
    with pytest.raises(ValueError, match=r"importance has shape \[512\], expected \[256\]"):
        FORMATS[name].encode(weights(1, 256), np.ones(512, np.float32))


@njit
def _lane_results(a: F32, b: F32, out: F32) -> tuple[float, float, float, int, float]:
    x, y = lanes.load(a, 1), lanes.load(b, 0)
    lanes.store(out, 0, lanes.rounded(x * y + 0.25))
    lanes.store(out, 16, lanes.lowest(x, y) - lanes.highest(x, 0.0) / y)
    lanes.store(out, 32, lanes.where_less(x, y, lanes.splat(1.0), 2.0))
    low = lanes.smallest(x)
    return lanes.total(x), low, lanes.largest(x), lanes.first_equal(x, low), lanes.lane(x, 3)


def test_lanes_equal_numpy() -> None:
    a, b = weights(1, 17)[0] * 100, np.linspace(1, 4, 16, dtype=np.float32)
    out = np.zeros(48, np.float32)
    total, low, high, place, third = _lane_results(a, b, out)
    x = a[1:]
    np.testing.assert_array_equal(out[:16], np.rint(x * b + np.float32(0.25)))
    np.testing.assert_array_equal(out[16:32], np.minimum(x, b) - np.maximum(x, 0) / b)
    np.testing.assert_array_equal(out[32:], np.where(x < b, 1, 2))
    assert total == pytest.approx(x.sum(), rel=1e-5)
    assert (low, high, place, third) == (x.min(), x.max(), x.argmin(), x[3])

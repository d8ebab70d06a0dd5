"""Properties of the K-quants that hold for any rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pocketquant.formats import FORMATS

F32 = npt.NDArray[np.float32]

# Root mean square error over a block, as a share of its largest weight. A code step is 2 / codes of the range; half a
# step is the worst a weight can miss its code by, and quantized scales add to that.
BOUNDS = {"Q2_K": 0.45, "Q3_K": 0.25, "Q4_K": 0.1, "Q5_K": 0.05, "Q6_K": 0.03}

NAMES = st.sampled_from(sorted(BOUNDS))
ROWS = arrays(np.float32, (3, 512), elements=st.floats(-8, 8, width=32), fill=st.floats(-1, 1, width=32))
SEEDED = st.builds(
    lambda seed, shape: np.random.default_rng(seed).standard_t(shape, (3, 512)).astype(np.float32),
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 4, 30]),
)
GIVEN = arrays(np.float32, 512, elements=st.floats(0, 1e4, width=32), fill=st.floats(0, 2, width=32))
IMPORTANCE = st.one_of(st.none(), GIVEN)


@settings(max_examples=60, deadline=None)
@given(NAMES, st.one_of(ROWS, SEEDED), IMPORTANCE, st.integers(1, 2))
def test_rows_apart_are_rows_together(name: str, rows: F32, importance: F32 | None, cut: int) -> None:
    encode = FORMATS[name].encode
    apart = np.concatenate([encode(rows[:cut], importance), encode(rows[cut:], importance)])
    np.testing.assert_array_equal(apart, encode(rows, importance))


@settings(max_examples=60, deadline=None)
@given(NAMES, st.one_of(ROWS, SEEDED), IMPORTANCE)
def test_blocks_apart_are_blocks_together(name: str, rows: F32, importance: F32 | None) -> None:
    encode = FORMATS[name].encode
    halves = [
        encode(rows[:, part], None if importance is None else importance[part])
        for part in (slice(0, 256), slice(256, 512))
    ]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), encode(rows, importance))


@settings(max_examples=100, deadline=None)
@given(NAMES, st.one_of(ROWS, SEEDED))
def test_error_is_bounded(name: str, rows: F32) -> None:
    decoded = FORMATS[name].decode(FORMATS[name].encode(rows), 512)
    error = np.sqrt(np.square(decoded - rows).reshape(3, 2, 256).mean(axis=-1))
    # below 1e-4 the F16 scale itself is too coarse
    assert (error <= BOUNDS[name] * np.abs(rows).reshape(3, 2, 256).max(axis=-1) + 1e-4).all()


@settings(max_examples=60, deadline=None)
@given(NAMES, SEEDED, GIVEN)
def test_importance_never_makes_its_own_error_worse(name: str, rows: F32, importance: F32) -> None:
    """Counted with importance, coding with it beats coding without it, up to 5 % that a search may miss."""
    format = FORMATS[name]
    errors = [
        float((np.square(format.decode(format.encode(rows, used), 512) - rows) @ importance).sum())
        for used in (importance, None)
    ]
    assert errors[0] <= errors[1] * 1.05


@settings(max_examples=60, deadline=None)
@given(NAMES, st.integers(0, 2**32 - 1), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
def test_any_bytes_decode_as_in_gguf_py(name: str, seed: int, d: int, dmin: int) -> None:
    module = __import__(f"pocketquant.formats.{name.lower()}", fromlist=["BLOCK"])
    data = np.random.default_rng(seed).integers(0, 256, (2, FORMATS[name].row_bytes(512)), dtype=np.uint8)
    blocks = data.view(module.BLOCK)
    blocks["d"] = d
    if "dmin" in module.BLOCK.names:
        blocks["dmin"] = dmin
    with np.errstate(all="ignore"):
        expected = dequantize(data, GGMLQuantizationType[name])
    np.testing.assert_array_equal(FORMATS[name].decode(data, 512), expected)


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_encoding_what_was_decoded_loses_little(name: str) -> None:
    rows = np.random.default_rng(5).normal(size=(8, 512)).astype(np.float32)
    format = FORMATS[name]
    once = format.decode(format.encode(rows), 512)
    twice = format.decode(format.encode(once), 512)
    assert np.square(twice - once).mean() < 0.1 * np.square(once - rows).mean()

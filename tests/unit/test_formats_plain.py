"""F32, F16 and BF16: what counts as finite, for every 16-bit word there is."""

from __future__ import annotations

import numpy as np
import pytest

from pocketquant.formats.plain import is_finite


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_16_bit_word_alone_and_among_others(dtype: str) -> None:
    words = np.arange(65536, dtype="<u2")
    values = words.view("<f2").astype(np.float32) if dtype == "F16" else (words.astype("<u4") << 16).view("<f4")
    finite = np.isfinite(values)
    others = np.array([0x0001, 0x8001], "<u2")
    assert [is_finite(words[i : i + 1], dtype) for i in range(65536)] == finite.tolist()
    assert [is_finite(np.append(others, words[i]), dtype) for i in range(0, 65536, 7)] == finite[::7].tolist()
    assert is_finite(words[finite], dtype)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
def test_one_bad_f32_among_many(value: float) -> None:
    values = np.linspace(-3.4e38, 3.4e38, 1000, dtype=np.float64).astype(np.float32)
    assert is_finite(values, "F32")
    values[500] = value
    assert not is_finite(values, "F32")


def test_nothing_is_finite() -> None:
    assert is_finite(np.empty(0, "<u2"), "BF16")

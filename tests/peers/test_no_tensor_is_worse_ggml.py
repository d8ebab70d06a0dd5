"""No tensor loses more than with llama.cpp's own quantizer: every format, on ordinary weights and on hard ones.

The measure is the one that importance is meant for: the sum over a tensor of importance * (weight - decoded)**2, all
importance one where none is given. A tensor may lose 0.1 % more than what `ggml_quantize_chunk` makes of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from ggml_library import open_ggml

from pocketquant.formats import FORMATS

F32 = npt.NDArray[np.float32]
Random = np.random.Generator
SHAPE = (64, 1024)
NAMES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
ROWS: dict[str, Callable[[Random], npt.NDArray[np.float64]]] = {
    "normal": lambda random: random.standard_normal(SHAPE) * 0.02,
    "uniform": lambda random: random.uniform(-1, 1, SHAPE),
    "all positive": lambda random: np.abs(random.standard_normal(SHAPE)),
    "far from zero": lambda random: random.uniform(0.5, 1, SHAPE),
    "around minus one": lambda random: -1 + 0.1 * random.standard_normal(SHAPE),
    "heavy-tailed": lambda random: random.standard_t(2.5, SHAPE),
    "sparse": lambda random: random.standard_normal(SHAPE) * (random.random(SHAPE) < 0.05),
    "one outlier a row": lambda random: with_outliers(random),
    "constant": lambda random: np.full(SHAPE, 0.37) * random.choice([-1, 1], (SHAPE[0], 1)),
    "two values": lambda random: random.choice([-0.0371, 0.0371], SHAPE),
    "three values": lambda random: random.integers(-1, 2, SHAPE) * 0.0123,
    "sixteen values": lambda random: random.integers(-8, 8, SHAPE) * 0.0111,
    "subnormal scales": lambda random: random.standard_normal(SHAPE) * 1e-4,
    "tiny": lambda random: random.standard_normal(SHAPE) * 1e-20,
}
IMPORTANCE: dict[str, Callable[[Random], npt.NDArray[np.float64]] | None] = {
    "none": None,
    "lognormal": lambda random: random.lognormal(0, 1, SHAPE[1]),
    "every 97th column": lambda random: np.where(np.arange(SHAPE[1]) % 97, 1e-6, 1.0),
    "one column at 1e4": lambda random: np.where(np.arange(SHAPE[1]) == SHAPE[1] // 3, 1e4, 1.0),
    "zeros in places": lambda random: random.lognormal(0, 1, SHAPE[1]) * (random.random(SHAPE[1]) < 0.6),
}


def with_outliers(random: Random) -> npt.NDArray[np.float64]:
    rows = random.standard_normal(SHAPE)
    rows[np.arange(SHAPE[0]), random.integers(0, SHAPE[1], SHAPE[0])] *= 50
    return rows


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    return open_ggml()


def losses(ggml: ctypes.CDLL, name: str, rows: F32, importance: F32 | None) -> tuple[float, float, float]:
    """What a tensor loses with us and with ggml, and what it would lose as zeros."""
    theirs = np.zeros((rows.shape[0], FORMATS[name].row_bytes(rows.shape[1])), np.uint8)
    pointer = None if importance is None else importance.ctypes.data
    ggml.ggml_quantize_chunk(FORMATS[name].ggml_id, rows.ctypes.data, theirs.ctypes.data, 0, *rows.shape, pointer)
    weight = np.ones(rows.shape[1]) if importance is None else importance.astype(np.float64)
    decoded = [FORMATS[name].decode(data, rows.shape[1]) for data in (FORMATS[name].encode(rows, importance), theirs)]
    ours, peers, zeros = (
        float((np.square(values - rows.astype(np.float64)) * weight).sum())
        for values in (*decoded, np.zeros_like(rows))
    )
    return ours, peers, zeros


@pytest.mark.parametrize("rows_kind", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_is_worse_than_ggmls(ggml: ctypes.CDLL, name: str, rows_kind: str) -> None:
    worse = {}
    for importance_kind, make_importance in IMPORTANCE.items():
        random = np.random.default_rng([*rows_kind.encode(), *importance_kind.encode()])
        rows = ROWS[rows_kind](random).astype(np.float32)
        importance = make_importance(random).astype(np.float32) if make_importance else None
        ours, theirs, zeros = losses(ggml, name, rows, importance)
        # 1e-12: what is exact but for the last bits of F32
        if ours > 1.001 * theirs + 1e-12 * zeros:
            worse[importance_kind] = ours / theirs if theirs else float("inf")
    assert not worse


@pytest.mark.parametrize("name", NAMES)
def test_on_average_trained_like_tensors_are_no_worse(ggml: ctypes.CDLL, name: str) -> None:
    ratios = []
    for rows_kind in ("normal", "heavy-tailed", "uniform"):
        for importance_kind in ("none", "lognormal", "one column at 1e4"):
            random = np.random.default_rng([7, *rows_kind.encode(), *importance_kind.encode()])
            rows, make_importance = ROWS[rows_kind](random).astype(np.float32), IMPORTANCE[importance_kind]
            importance = make_importance(random).astype(np.float32) if make_importance else None
            ours, theirs, _ = losses(ggml, name, rows, importance)
            ratios.append(ours / theirs)
    assert np.mean(ratios) <= (1.0 if name == "Q8_0" else 0.98), ratios

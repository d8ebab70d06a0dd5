"""Rounding with Hessians: exact bytes, never worse than the format's own encoder, near the best where that is known."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from statistics_maker import make_statistics

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.calibration.statistics import COUNT, INPUT, OUTPUT, ROUNDING, fingerprint, open_statistics
from pocketquant.calibration.statistics_writing import About, triangles, write_statistics
from pocketquant.errors import RecipeError
from pocketquant.formats import FORMATS, F32Array
from pocketquant.formats.layout import Scales
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.model import Role
from pocketquant.quant.rounding import (
    DEFAULT,
    FactoredHessian,
    Rounding,
    encoding,
    factor_cache,
    factor_hessian,
    losses,
    round_matrix,
    round_rows,
    two_sided_loss,
)
from pocketquant.quant.rounding.cholesky import factor_in_place, restore
from pocketquant.quant.rounding.encoding import STEPS, with_rounding
from pocketquant.quant.rounding.factor_cache import cached, factored_bytes
from pocketquant.quant.rounding.matmul import subtract_matmul
from pocketquant.quant.rounding.state import grid_of, new_state, scale_and_offset, set_scales
from pocketquant.texts.corpus import TextRecord

BLOCK_FORMATS = [
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
]  # fmt: skip


def hessian_of(k: int, seed: int, n_sample: int | None = None) -> F32Array:
    """A Hessian of correlated inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((k // 4, k)) * rng.lognormal(0.0, 1.0, k)
    inputs = rng.standard_normal((n_sample or 2 * k, k // 4)) @ mixing / np.sqrt(k)
    inputs += 0.2 * rng.standard_normal(inputs.shape) * rng.lognormal(0.0, 1.0, k)
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def width_of(name: str) -> int:
    """Columns of several blocks, in two windows where blocks are small enough."""
    layout = FORMATS[name].layout
    assert layout is not None
    return 512 if layout.block_len == 256 else 288


def weights_of(n: int, k: int, seed: int) -> F32Array:
    return (np.random.default_rng(seed).standard_t(5, (n, k)) * 0.02).astype(np.float32)


def exact_losses(data: np.ndarray, name: str, weights: F32Array, hessian: F32Array) -> np.ndarray:
    errors = FORMATS[name].decode(data, weights.shape[1]).astype(np.float64) - weights
    return ((errors @ hessian.astype(np.float64)) * errors).sum(axis=1)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_packed_codes_and_scales_decode_to_the_values_they_stand_for(name: str) -> None:
    layout, rng = FORMATS[name].layout, np.random.default_rng(3)
    assert layout is not None
    n, k = 3, 512
    codes = rng.integers(0, len(layout.levels), (n, k)).astype(np.uint8)
    parts, blocks = (n, k // layout.sub_block_len), (n, k // layout.block_len)
    high = 1 if layout.dmin_field and not layout.has_sub_blocks else layout.offset_high
    offset = rng.integers(min(high, 1) if not layout.has_sub_blocks else 0, high + 1, parts).astype(np.int16)
    scale = rng.integers(layout.scale_low, layout.scale_high + 1, parts).astype(np.int16)
    units = rng.normal(0, 1e-3, (2, *blocks)).astype(np.float16).view(np.uint16)
    units[1] *= bool(layout.dmin_field)
    scales = Scales(scale, offset, units[0], units[1])
    data = layout.pack(codes, scales)
    for written, read in zip(scales, layout.scales(data), strict=True):
        assert np.array_equal(written, read)
    state = new_state(np.ones((n, k), np.float32), layout)
    set_scales(state, layout, 0, scales)
    lines = [[scale_and_offset(grid_of(layout), state, row, part) for part in range(parts[1])] for row in range(n)]
    line = np.repeat(np.array(lines, np.float32) / state.shrink[:, None, None], layout.sub_block_len, axis=1)
    expected = line[..., 0] * layout.levels[codes] + line[..., 1]
    assert np.array_equal(FORMATS[name].decode(data, k), expected)


def test_product_sums_each_element_in_one_order() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 600, 300), dtype=np.float32)
    b = np.ascontiguousarray(b[:300])
    wide = np.hstack([b, b])[:, :304]
    out = np.zeros((600, 304), np.float32)
    subtract_matmul(a, wide, out)
    np.testing.assert_allclose(out, -(a.astype(np.float64) @ wide), atol=1e-3)
    for start, stop in ((0, 1), (5, 12), (7, 600)):
        part = np.zeros((stop - start, 304), np.float32)
        subtract_matmul(a[start:stop], wide, part)
        assert np.array_equal(part, out[start:stop])


@pytest.mark.parametrize("k", [1, 17, 128, 301])
def test_the_cholesky_factor_is_that_of_lapack(k: int) -> None:
    hessian = hessian_of(max(k, 4), 21)[:k, :k].astype(np.float64) + 0.01 * np.eye(k)
    matrix, expected = hessian.copy(), np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    assert factor_in_place(matrix)
    np.testing.assert_allclose(np.triu(matrix), expected, atol=1e-12 * expected.max())
    assert np.array_equal(np.tril(matrix, -1), np.tril(hessian, -1))
    restore(matrix, hessian.diagonal().copy())
    assert np.array_equal(matrix, hessian)
    hessian[0, 0] = -1.0
    assert not factor_in_place(hessian)


def test_losses_are_the_quadratic_form() -> None:
    factored, outputs = factor_hessian(hessian_of(320, 1)), factor_hessian(hessian_of(64, 2))
    errors = np.random.default_rng(2).standard_normal((64, 320)).astype(np.float32)
    exact = ((errors.astype(np.float64) @ factored.matrix) * errors).sum(axis=1)
    np.testing.assert_allclose(losses(errors, factored), exact, rtol=1e-4)
    both = float(((outputs.matrix @ errors.astype(np.float64) @ factored.matrix) * errors).sum())
    assert two_sided_loss(errors, factored, outputs) == pytest.approx(both, rel=1e-4)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_each_step_loses_less_than_the_one_before(name: str) -> None:
    k = width_of(name)
    weights, factored = weights_of(12, k, 4), factor_hessian(hessian_of(k, 5))
    totals = [
        exact_losses(round_rows(weights, FORMATS[name], factored, steps), name, weights, factored.matrix)
        for steps in (STEPS["search"], STEPS["feedback"], Rounding(sweeps=1), Rounding(sweeps=3))
    ]
    assert (totals[-1] <= totals[0] * (1 + 1e-5)).all()
    assert (totals[3] <= totals[2] * (1 + 1e-5)).all()
    assert (totals[2] <= totals[1] * (1 + 1e-5)).all()
    assert totals[1].sum() < 0.6 * totals[0].sum()
    assert totals[2].sum() < 0.97 * totals[1].sum()


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_without_correlation_it_is_no_worse_than_the_plain_kernel(name: str) -> None:
    weights, factored = weights_of(16, 256, 6), factor_hessian(np.eye(256, dtype=np.float32))
    plain = FORMATS[name].encode(weights)
    ours = exact_losses(round_rows(weights, FORMATS[name], factored), name, weights, factored.matrix)
    theirs = exact_losses(plain, name, weights, factored.matrix)
    assert (ours <= theirs * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_bytes_do_not_depend_on_how_rows_are_cut(name: str) -> None:
    k = width_of(name)
    weights, factored = weights_of(11, k, 7), factor_hessian(hessian_of(k, 8))
    whole = round_rows(weights, FORMATS[name], factored, Rounding(sweeps=1))
    pieces = [
        round_rows(weights[a:b], FORMATS[name], factored, Rounding(sweeps=1)) for a, b in ((0, 1), (1, 6), (6, 11))
    ]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_codes_are_near_the_best_of_all() -> None:
    """Inputs correlated in pairs: under the scales found, every pair's best codes can be looked for one by one."""
    rng = np.random.default_rng(9)
    hessian = np.eye(32, dtype=np.float32)
    for i in range(0, 32, 2):
        hessian[i, i + 1] = hessian[i + 1, i] = rng.uniform(-0.95, 0.95)
    factored, weights = factor_hessian(hessian, damping=0.0), weights_of(8, 32, 10)
    data = round_rows(weights, FORMATS["Q4_0"], factored)
    found = exact_losses(data, "Q4_0", weights, hessian)
    d = data[:, :2].copy().view(np.float16).astype(np.float64)
    levels = np.arange(-8, 8)
    pairs = np.array(list(itertools.product(levels, levels)))
    for row in range(len(weights)):
        best = 0.0
        for i in range(0, 32, 2):
            errors = pairs * d[row] - weights[row, i : i + 2]
            best += ((errors @ hessian[i : i + 2, i : i + 2]) * errors).sum(axis=1).min()
        assert best * (1 - 1e-6) <= found[row] <= best * 1.1


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q4_1", "IQ4_XS"])
def test_both_sides(name: str) -> None:
    weights = weights_of(96, 256, 11)
    inputs, outputs = factor_hessian(hessian_of(256, 12)), factor_hessian(hessian_of(96, 13))

    def loss(data: np.ndarray) -> float:
        errors = FORMATS[name].decode(data, 256).astype(np.float64) - weights
        return float(((outputs.matrix @ errors @ inputs.matrix) * errors).sum())

    one = loss(round_rows(weights, FORMATS[name], inputs))
    fed_back = loss(round_matrix(weights, FORMATS[name], inputs, outputs, Rounding(sweeps=0)))
    both = loss(round_matrix(weights, FORMATS[name], inputs, outputs))
    descended = loss(round_matrix(weights, FORMATS[name], inputs, outputs, Rounding(feedback=False)))
    assert both < fed_back < 0.9 * one
    assert descended < one
    flat = factor_hessian(np.eye(96, dtype=np.float32))
    alone = round_rows(weights, FORMATS[name], inputs)
    errors = [
        FORMATS[name].decode(data, 256) - weights
        for data in (round_matrix(weights, FORMATS[name], inputs, flat), alone)
    ]
    assert losses(errors[0], inputs).sum() == pytest.approx(losses(errors[1], inputs).sum(), rel=0.01)


@pytest.mark.parametrize("kind", ["dead", "zero", "rank-one", "few"])
def test_hessians_that_cannot_be_inverted(kind: str) -> None:
    hessian = hessian_of(256, 14)
    if kind == "dead":
        hessian[::3] = hessian[:, ::3] = 0.0
    elif kind == "zero":
        hessian[:] = 0.0
    elif kind == "rank-one":
        hessian = np.outer(hessian[3], hessian[3])
    else:
        hessian = hessian_of(256, 14, n_sample=5)
    weights, factored = weights_of(5, 256, 15), factor_hessian(hessian)
    for name in ("Q4_K", "Q6_K", "Q5_1"):
        data = round_rows(weights, FORMATS[name], factored)
        plain = FORMATS[name].encode(weights, np.ascontiguousarray(factored.matrix.diagonal()))
        ours, theirs = (exact_losses(each, name, weights, factored.matrix) for each in (data, plain))
        assert (ours <= theirs * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_weights_of_any_size(name: str) -> None:
    weights, factored = weights_of(6, 256, 16), factor_hessian(hessian_of(256, 17))
    weights[1] = 0.0
    weights[2, 32:] = 0.0
    weights[3] = 0.01
    weights[4, 7] = 1.0
    sizes = [1e-30, 1e-9, 1.0, 1e4]
    rows = np.concatenate([weights * np.float32(size) for size in sizes])
    data = round_rows(rows, FORMATS[name], factored)
    values = FORMATS[name].decode(data, 256)
    assert np.isfinite(values).all()
    assert not values[1::6].any()
    plain = FORMATS[name].encode(rows, np.ascontiguousarray(factored.matrix.diagonal()))
    ours, theirs = (exact_losses(each, name, rows, factored.matrix) for each in (data, plain))
    assert (ours <= theirs * (1 + 1e-4)).all()


def test_what_is_not_a_hessian() -> None:
    for wrong in (np.zeros((3, 4)), np.full((4, 4), np.nan), -np.eye(4), np.array([[1.0, 9.0], [9.0, 1.0]])):
        with pytest.raises(ValueError, match="not a Hessian"):
            factor_hessian(wrong.astype(np.float32))


def test_factored_hessians_stay_in_the_cache_while_there_is_room() -> None:
    made: list[int] = []

    def ask(number: int, room: int) -> int:
        def make() -> FactoredHessian:
            made.append(number)
            return factor_hessian(np.eye(16, dtype=np.float32) * (number + 1), damping=number / 100)

        return len(cached(("test", number), 16, make, room).matrix)

    room = kept_bytes() + 3 * factored_bytes(16)
    for number in (0, 1, 2, 0, 3, 0, 2, 1):  # the fourth takes the place of what was not asked for the longest
        assert ask(number, room) == 16
        assert kept_bytes() <= room
    assert made[:4] == [0, 1, 2, 3]
    assert made.count(0) == 1
    ask(4, 1)
    assert kept_bytes() == factored_bytes(16)  # itself, though there is no room


def test_threads_that_want_one_hessian_factor_it_once() -> None:
    made: list[int] = []

    def make() -> FactoredHessian:
        made.append(1)
        return factor_hessian(hessian_of(256, 3))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: cached("wanted by all", 256, make), range(32)))
    assert len(made) == 1
    assert all(one is found[0] for one in found)


def kept_bytes() -> int:
    return sum(factored_bytes(len(factored.matrix)) for factored in factor_cache._cache.values())


def test_groups_of_the_vocabulary_are_joined_where_their_hessians_would_not_fit(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(checkpoint)
    path = make_statistics(model, tmp_path / "s", outputs=["embed/output"], n_group=5)
    statistics = open_statistics(path)
    monkeypatch.setattr(encoding, "HEAD_CACHE_BYTES", 2 * factored_bytes(256) + 1)
    planned = plan(model, open_recipe("q4_k_m"))
    encoder = with_rounding(planned, statistics).rounding["token_embd.weight"]
    assert isinstance(encoder, encoding.VocabularyEncoder)
    head = statistics.head()
    assert head is not None
    assert head.embed_output is not None
    assert np.array_equal(encoder.groups, head.row_group * 2 // 5)
    for group, parts in enumerate(((0, 1, 2), (3, 4))):
        rows = encoder.groups == group
        expected = sum((head.row_group == part).sum() * head.hessian(part).astype(np.float64) for part in parts)
        expected = expected / rows.sum() + head.frequency[rows].mean() * head.embed_output
        made = encoder._hessian(group, next(item.tensor for item in planned.tensors if item.tensor.role is Role.EMBED))
        np.testing.assert_allclose(
            made.matrix, factor_hessian(expected.astype(np.float32)).matrix, rtol=1e-4, atol=1e-6
        )


@pytest.fixture
def statistics(tmp_path: Path, demo_gguf: Callable[[str], Path]) -> Path:
    """Statistics of two layers of the embedded model: one with its outputs, one that shares its inputs."""
    arrays, pieces = {}, []
    tensors = {tensor.name: tensor for tensor in open_gguf(demo_gguf("f32")).tensors}
    up, gate = (tensors[f"blk.0.ffn_{kind}.weight"] for kind in ("up", "gate"))
    for name, side in ((up.name + INPUT, up.n_cols), (up.name + OUTPUT, up.n_rows)):
        arrays[name], arrays[name + COUNT] = triangles(1, side), ("I64", (1,))
        pieces += [(name, 0, hessian_of(side, side)), (name + COUNT, None, np.array([99]))]
    arrays[up.name + ROUNDING] = ("F32", (1, 2 * up.n_cols))
    path = tmp_path / "made.stats"
    about = About(
        99, fingerprint(open_model(demo_gguf("f32"))), (TextRecord("a.txt", 99, "0" * 64),), {gate.name: up.name}
    )
    write_statistics(path, about, arrays, pieces)
    return path


def test_a_plan_is_rounded_by_statistics(statistics: Path, demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    opened, source = open_statistics(statistics), demo_gguf("f32")
    bare = plan(open_model(source), open_recipe("q4_k_m"))
    rounded = with_rounding(bare, opened)
    assert {name: encoder.whole for name, encoder in rounded.rounding.items()} == {
        "blk.0.ffn_up.weight": True,
        "blk.0.ffn_gate.weight": False,
    }
    assert rounded.metadata["pocketquant.rounding"].value == "two-sided; 99 tokens of a.txt"
    paths = [tmp_path / f"{n}.gguf" for n in ("one", "three", "bare")]
    write(rounded, paths[0], threads=1)
    write(with_rounding(bare, opened), paths[1], threads=3)
    write(bare, paths[2])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    original, ours, plain = ({t.name: t for t in open_gguf(path).tensors} for path in (source, paths[0], paths[2]))
    factored = factor_hessian(opened.input("blk.0.ffn_gate.weight"))  # type: ignore[arg-type]
    for name, tensor in original.items():
        rows = [each[name].rows(0, tensor.n_rows) for each in (original, ours, plain)]
        if name == "blk.0.ffn_gate.weight":
            assert losses(rows[1] - rows[0], factored).sum() < 0.8 * losses(rows[2] - rows[0], factored).sum()
        elif name != "blk.0.ffn_up.weight":
            assert np.array_equal(rows[1], rows[2])


def test_statistics_of_another_shape_are_refused(statistics: Path, demo_gguf: Callable[[str], Path]) -> None:
    opened = open_statistics(statistics)
    opened.shared["blk.0.ffn_down.weight"] = "blk.0.ffn_up.weight"  # type: ignore[index]
    with pytest.raises(RecipeError, match="another model"):
        with_rounding(plan(open_model(demo_gguf("f32")), open_recipe("q4_k_m")), opened)


def test_statistics_of_another_model_are_refused(statistics: Path, demo_gguf: Callable[[str], Path]) -> None:
    other = replace(open_statistics(statistics), model_sha256="1" * 64)
    with pytest.raises(RecipeError, match="another model"):
        with_rounding(plan(open_model(demo_gguf("f32")), open_recipe("q4_k_m")), other)


def test_encoders_travel_to_other_processes(statistics: Path, demo_gguf: Callable[[str], Path]) -> None:
    rounded = with_rounding(plan(open_model(demo_gguf("f32")), open_recipe("q4_k_m")), open_statistics(statistics))
    encoder = rounded.rounding["blk.0.ffn_gate.weight"]
    item = next(item for item in rounded.tensors if item.tensor.name == "blk.0.ffn_gate.weight")
    here = encoder.encode(item.tensor, 3, 9, item.format)
    assert np.array_equal(pickle.loads(pickle.dumps(encoder)).encode(item.tensor, 3, 9, item.format), here)


def test_default_takes_every_step() -> None:
    assert STEPS["two-sided"] == DEFAULT

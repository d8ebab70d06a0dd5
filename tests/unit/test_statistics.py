"""Statistics files: what is written is read, merged by weight, and refused where it is not what it claims to be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketquant import open_model
from pocketquant.calibration.hessian import group_rows
from pocketquant.calibration.statistics import (
    COUNT,
    EMBED_OUTPUT,
    HEAD_ROUNDING,
    INPUT,
    OUTPUT,
    ROUNDING,
    check_statistics,
    fingerprint,
    open_statistics,
    packed,
    side_of,
    unpacked,
)
from pocketquant.calibration.statistics_writing import (
    HEAD_HESSIANS,
    About,
    Piece,
    lay_out,
    merge_statistics,
    triangles,
    write_statistics,
)
from pocketquant.errors import RecipeError
from pocketquant.texts.corpus import TextRecord

UP, GATE, EXPERTS = "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight", "blk.0.ffn_up_exps.weight"
N_VOCAB = 12


def symmetric(rng: np.random.Generator, k: int) -> np.ndarray:
    rows = rng.standard_normal((3 * k, k)).astype(np.float32)
    return rows.T @ rows


def contents(seed: int, *, tokens: int, groups: list[int], outputs: bool = True) -> dict[str, np.ndarray]:
    """Name -> array, matrices [n, k, k] before they are packed."""
    rng = np.random.default_rng(seed)
    arrays = {
        GATE + INPUT + COUNT: np.array([tokens]),
        GATE + INPUT: np.stack([symmetric(rng, 5)]),
        EXPERTS + INPUT + COUNT: np.array([tokens, 0, tokens // 2]),
        EXPERTS + INPUT: np.stack([symmetric(rng, 4), np.zeros((4, 4), np.float32), symmetric(rng, 4)]),
        GATE + ROUNDING: rng.random((1, 10), np.float32),
        EXPERTS + ROUNDING: rng.random((3, 8), np.float32) * np.array([[1], [0], [1]], np.float32),
        HEAD_ROUNDING: rng.random((1, 10), np.float32),
        "head/row_group": np.array(groups, np.int32),
        "head/variance": rng.random(N_VOCAB),
        "head/frequency": rng.dirichlet(np.ones(N_VOCAB)),
        HEAD_HESSIANS + COUNT: np.full(max(groups) + 1, tokens),
        HEAD_HESSIANS: np.stack([symmetric(rng, 5) for _ in range(max(groups) + 1)]),
    }
    if outputs:
        arrays[UP + OUTPUT + COUNT] = np.array([tokens])
        arrays[UP + OUTPUT] = np.stack([symmetric(rng, 7)])
        arrays[EMBED_OUTPUT + COUNT] = np.array([tokens])
        arrays[EMBED_OUTPUT] = np.stack([symmetric(rng, 5)])
    return arrays


def write(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    *,
    tokens: int,
    text: str = "a",
    model: str = "m",
    kernels: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    pieces: list[Piece] = []
    for name, array in arrays.items():
        if array.ndim == 3:
            layout[name] = triangles(len(array), array.shape[1])
            pieces += [(name, i, matrix) for i, matrix in enumerate(array)]
        else:
            layout[name] = (
                {"i": {4: "I32", 8: "I64"}, "f": {4: "F32", 8: "F64"}}[array.dtype.kind][array.itemsize],
                array.shape,
            )
            pieces.append((name, None, array))
    texts, shared = (TextRecord(text, tokens, text * 64),), {UP: GATE, GATE: GATE, EXPERTS: EXPERTS}
    about = About(tokens, model, texts, shared, kernels or {})
    write_statistics(path, about, layout, pieces)
    return dict(arrays)


GROUPS = [0, 0, 1, 1, 1, 2, 2, 0, 1, 2, 2, 2]


@pytest.fixture
def stats(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    return tmp_path / "a.stats", write(tmp_path / "a.stats", contents(1, tokens=100, groups=GROUPS), tokens=100)


def test_what_is_written_is_read(stats: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, arrays = stats
    read = open_statistics(path)
    assert (read.tokens, read.model_sha256, read.texts) == (100, "m", (TextRecord("a", 100, "a" * 64),))
    np.testing.assert_array_equal(read.input(UP), arrays[GATE + INPUT][0])  # the input of both stands under one name
    np.testing.assert_array_equal(read.input(GATE), arrays[GATE + INPUT][0])
    np.testing.assert_array_equal(read.output(UP), arrays[UP + OUTPUT][0])
    assert read.output(GATE) is None
    assert read.input("blk.9.ffn_up.weight") is None
    np.testing.assert_array_equal(read.input(EXPERTS, 2), arrays[EXPERTS + INPUT][2])
    assert read.input(EXPERTS, 1) is None  # no token came by
    np.testing.assert_array_equal(read.rounding(UP), arrays[GATE + ROUNDING].reshape(2, 5))
    np.testing.assert_array_equal(read.rounding(EXPERTS, 2), arrays[EXPERTS + ROUNDING][2].reshape(2, 4))
    np.testing.assert_array_equal(read.head_rounding(), arrays[HEAD_ROUNDING].reshape(2, 5))
    assert (read.share(EXPERTS, 2), read.n_unseen_experts, read.has_outputs) == (0.5, 1, True)
    with pytest.raises(RecipeError, match="3 experts; say which one"):
        read.input(EXPERTS)
    with pytest.raises(RecipeError, match="number 3 was asked for"):
        read.matrix(EXPERTS + INPUT, 3)
    with pytest.raises(RecipeError, match="number 3 was asked for"):
        read.rounding(EXPERTS, 3)


def test_the_head_gives_back_every_rows_own_share(stats: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, arrays = stats
    head = open_statistics(path).head()
    assert head is not None
    np.testing.assert_array_equal(head.hessians, arrays[HEAD_HESSIANS])
    np.testing.assert_array_equal(head.row_group, GROUPS)
    np.testing.assert_array_equal(head.embed_output, arrays[EMBED_OUTPUT][0])
    np.testing.assert_allclose(head.frequency.sum(), 1)
    for group in range(3):
        rows = np.flatnonzero(np.array(GROUPS) == group)
        np.testing.assert_allclose(head.row_scale[rows].mean(), 1, rtol=1e-6)
        variance = arrays["head/variance"][rows]
        np.testing.assert_allclose(head.row_scale[rows], variance / variance.mean(), rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 63, 64, 65, 130])
def test_triangles_keep_symmetric_matrices(k: int) -> None:
    matrix = symmetric(np.random.default_rng(k), k)
    assert side_of(len(packed(matrix))) == k
    np.testing.assert_array_equal(unpacked(packed(matrix)), matrix)
    assert side_of(k * (k + 1) // 2 + k) == 0 if k > 1 else side_of(2) == 0


def test_merging_weighs_by_tokens(tmp_path: Path) -> None:
    a = write(tmp_path / "a", contents(1, tokens=100, groups=GROUPS), tokens=100)
    b = write(tmp_path / "b", contents(2, tokens=300, groups=GROUPS, outputs=False), tokens=300, text="b")
    merge_statistics([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    merged = open_statistics(tmp_path / "c")
    assert merged.tokens == 400
    assert [text.name for text in merged.texts] == ["a", "b"]
    for name in (GATE + INPUT, HEAD_HESSIANS):
        for i in range(len(a[name])):
            np.testing.assert_allclose(merged.matrix(name, i), a[name][i] / 4 + b[name][i] * 0.75, rtol=1e-4)
    np.testing.assert_allclose(merged.input(EXPERTS, 2), (a[EXPERTS + INPUT][2] + 3 * b[EXPERTS + INPUT][2]) / 4, 1e-5)
    assert merged.input(EXPERTS, 1) is None
    for name in (GATE + ROUNDING, HEAD_ROUNDING):
        np.testing.assert_allclose(merged.array(name), a[name] / 4 + b[name] * 0.75, rtol=1e-6)
    np.testing.assert_array_equal(merged.output(UP), a[UP + OUTPUT][0])  # only one file has gradients
    np.testing.assert_allclose(
        merged.array("head/variance"), a["head/variance"] / 4 + b["head/variance"] * 0.75, rtol=1e-12
    )


def test_statistics_say_which_kernels_made_them(tmp_path: Path) -> None:
    of_one, of_other = {"llama_cpp_features": "AVX2", "llama_cpp": "1"}, {"llama_cpp_features": "AMX", "llama_cpp": "1"}
    for number, (name, kernels) in enumerate((("a", of_one), ("b", of_one), ("c", of_other), ("d", {}))):
        held = contents(number, tokens=100, groups=GROUPS, outputs=False)
        write(tmp_path / name, held, tokens=100, text=name, kernels=kernels)
    assert open_statistics(tmp_path / "a").kernels == of_one
    for names, expected in (
        ("ab", of_one),
        ("ac", {"llama_cpp_features": "several", "llama_cpp": "1"}),
        ("ad", {"llama_cpp_features": "several", "llama_cpp": "several"}),
    ):
        merge_statistics([tmp_path / name for name in names], tmp_path / "merged")
        assert open_statistics(tmp_path / "merged").kernels == expected


def test_merging_spreads_other_groups_row_by_row(tmp_path: Path) -> None:
    # every row its own group in the second file, so that what each row adds is known exactly
    a = write(tmp_path / "a", contents(1, tokens=100, groups=GROUPS), tokens=100)
    b = write(tmp_path / "b", contents(2, tokens=300, groups=list(range(N_VOCAB))), tokens=300, text="b")
    merge_statistics([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    merged = open_statistics(tmp_path / "c").head()
    assert merged is not None
    assert merged.n_group == 3
    for group in range(3):
        rows = np.flatnonzero(np.array(GROUPS) == group)
        expected = a[HEAD_HESSIANS][group] / 4 + b[HEAD_HESSIANS][rows].mean(axis=0) * 0.75
        np.testing.assert_allclose(merged.hessian(group), expected, rtol=1e-4, atol=1e-5)


def test_merging_weighs_experts_by_the_tokens_sent_to_them(tmp_path: Path) -> None:
    parts = []
    for seed, counts in ((1, [10, 0, 60]), (2, [90, 5, 0])):
        arrays = contents(seed, tokens=100, groups=GROUPS)
        rng = np.random.default_rng(seed)
        arrays[EXPERTS + INPUT + COUNT] = np.array(counts)
        arrays[EXPERTS + ROUNDING] = rng.random((3, 8), np.float32) * (np.array(counts)[:, None] > 0).astype(np.float32)
        parts.append(write(tmp_path / str(seed), arrays, tokens=100, text=str(seed))[EXPERTS + ROUNDING])
    merge_statistics([tmp_path / "1", tmp_path / "2"], tmp_path / "c")
    merged = open_statistics(tmp_path / "c")
    for expert, (of_a, of_b) in enumerate([(0.1, 0.9), (0, 1), (1, 0)]):
        expected = of_a * parts[0][expert] + of_b * parts[1][expert]
        np.testing.assert_allclose(merged.rounding(EXPERTS, expert).reshape(-1), expected, rtol=1e-6)


def test_inputs_and_gradients_of_one_text_are_joined(tmp_path: Path) -> None:
    whole = contents(1, tokens=100, groups=GROUPS)
    gradients = {name: array for name, array in whole.items() if OUTPUT in name}
    inputs = {name: array for name, array in whole.items() if name not in gradients}
    write(tmp_path / "inputs", inputs, tokens=100)
    write(tmp_path / "gradients", gradients, tokens=0)
    merge_statistics([tmp_path / "inputs", tmp_path / "gradients"], tmp_path / "c")
    joined = open_statistics(tmp_path / "c")
    assert joined.tokens == 100
    np.testing.assert_array_equal(joined.output(UP), whole[UP + OUTPUT][0])
    np.testing.assert_array_equal(joined.input(UP), whole[GATE + INPUT][0])


def test_what_must_not_be_merged(tmp_path: Path) -> None:
    arrays = contents(1, tokens=100, groups=GROUPS)
    write(tmp_path / "a", arrays, tokens=100)
    write(tmp_path / "again", arrays, tokens=100)
    write(tmp_path / "other", arrays, tokens=100, text="b", model="n")
    wide = {GATE + INPUT: np.eye(6, dtype=np.float32)[None], GATE + ROUNDING: np.ones((1, 12), np.float32)}
    write(tmp_path / "wide", arrays | wide, tokens=9, text="c")
    for name, said in (("again", "count twice"), ("other", "of several"), ("wide", r"blk\.0\.ffn_gate\.weight/input")):
        with pytest.raises(RecipeError, match=said):
            merge_statistics([tmp_path / "a", tmp_path / name], tmp_path / "c")
        assert not (tmp_path / "c").exists()


def test_matrices_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    arrays = contents(1, tokens=100, groups=GROUPS)
    arrays[GATE + INPUT][0, 2, 2] = np.nan
    arrays[GATE + ROUNDING][0, 7] = np.nan
    write(tmp_path / "a", arrays, tokens=100)
    with pytest.raises(RecipeError, match=r"ffn_gate\.weight/input is not finite"):
        open_statistics(tmp_path / "a").input(UP)
    with pytest.raises(RecipeError, match=r"ffn_gate\.weight/rounding is not finite"):
        open_statistics(tmp_path / "a").rounding(UP)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def set_entry(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda header: header.pop("__metadata__"), "no statistics"),
        (lambda header: header["__metadata__"].update(format="else"), "no statistics"),
        (lambda header: header["__metadata__"].update(version="1"), "of version 1, this program reads 2"),
        (lambda header: header["__metadata__"].update(about="[]"), "no statistics"),
        (lambda header: header["__metadata__"].update(about='{"tokens": 1}'), "no statistics"),
        (lambda header: header.update(extra=7), "no array of statistics"),
        (lambda header: header.pop(GATE + INPUT + COUNT), "has no count"),
        (set_entry(GATE + INPUT, shape=[1, 14]), "no array of statistics"),
        (set_entry(GATE + INPUT, shape=[-1, -15]), "no array of statistics"),
        (set_entry(GATE + INPUT, shape=[1 << 39, 1 << 39]), "no array of statistics"),
        (set_entry(GATE + INPUT, data_offsets=[1 << 40, (1 << 40) + 60]), "not inside the file"),
        (set_entry(GATE + INPUT, dtype="F16"), "no array of statistics"),
        (set_entry(EXPERTS + INPUT + COUNT, shape=[2], data_offsets=[0, 16]), "2 counts of 3 matrices"),
        (lambda header: header.pop(GATE + ROUNDING), r"ffn_gate\.weight/rounding: expected \[1, 10\] numbers"),
        (lambda header: header.pop(EXPERTS + ROUNDING), r"ffn_up_exps\.weight/rounding: expected \[3, 8\] numbers"),
        (lambda header: header.pop(HEAD_ROUNDING), r"head/rounding: expected \[1, 10\] numbers"),
        (set_entry(GATE + ROUNDING, shape=[2, 5]), "no array of statistics"),  # one for each kind of scale: even
        (set_entry(EXPERTS + ROUNDING, shape=[4, 6]), r"ffn_up_exps\.weight/rounding: expected \[3, 8\] numbers"),
        (set_entry(HEAD_ROUNDING, shape=[1, 8], data_offsets=[0, 32]), r"head/rounding: expected \[1, 10\] numbers"),
        (lambda header: header.pop(GATE + INPUT), r"ffn_gate\.weight/rounding: stands beside no inputs"),
        (lambda header: header.pop(HEAD_HESSIANS), "head/rounding: stands beside no inputs"),
        (set_entry("head/variance", shape=[11], data_offsets=[0, 88]), "differ in the number of rows"),
    ],
)
def test_hostile_headers(
    change: Callable[[dict[str, Any]], None], said: str, stats: tuple[Path, dict[str, np.ndarray]]
) -> None:
    path, _ = stats
    edit(path, change)
    with pytest.raises(RecipeError, match=said):
        open_statistics(path)


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"\xff" * 64, b"\x08" + b"\0" * 7 + b"[[[[[[[[", b"GGUF" * 9])
def test_hostile_bytes(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(RecipeError, match="no statistics"):
        open_statistics(tmp_path / "x")


def test_bytes_that_no_array_claims(stats: tuple[Path, dict[str, np.ndarray]]) -> None:
    with open(stats[0], "ab") as file:
        file.write(b"more")
    with pytest.raises(RecipeError, match="its arrays end at byte"):
        open_statistics(stats[0])


def test_truncated_at_any_place(stats: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    data = stats[0].read_bytes()
    for length in range(0, len(data), 97):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(RecipeError):
            open_statistics(tmp_path / "cut")


def test_a_head_whose_rows_are_in_no_group_is_refused(tmp_path: Path) -> None:
    arrays = contents(1, tokens=100, groups=GROUPS)
    arrays["head/row_group"][3] = 3
    write(tmp_path / "a", arrays, tokens=100)
    with pytest.raises(RecipeError, match="in none of its 3 groups"):
        open_statistics(tmp_path / "a").head()


def test_groups_hold_rows_of_like_frequency() -> None:
    counts = np.random.default_rng(4).zipf(1.3, 5000).clip(max=10000) - 1
    groups = group_rows(counts)
    assert set(groups) == set(range(32))
    seen = [counts[groups == group] for group in range(28)]
    assert all(low.min() >= high.max() for low, high in pairwise(seen))
    assert seen[0].min() > 0
    assert all((counts[groups == group] == 0).all() for group in range(28, 32))
    assert len(seen[0]) < len(seen[10]) < len(seen[27])
    np.testing.assert_array_equal(group_rows(np.zeros(5000, np.int64), 4), np.repeat(np.arange(4), 1250))
    assert len(set(group_rows(np.array([3, 0, 1])))) <= 3


def test_statistics_know_their_model(checkpoint: Path, stats: tuple[Path, dict[str, np.ndarray]]) -> None:
    model = open_model(checkpoint)
    with pytest.raises(RecipeError, match="made from another model"):
        check_statistics(open_statistics(stats[0]), model.tensors)
    arrays = contents(1, tokens=100, groups=GROUPS)
    write(stats[0], arrays, tokens=100, model=fingerprint(model))
    check_statistics(open_statistics(stats[0]), model.tensors)


def test_a_file_has_its_length_before_it_is_filled(tmp_path: Path) -> None:
    layout = lay_out(About(0, "m", (), {}), {UP + OUTPUT + COUNT: ("I64", (2,)), UP + OUTPUT: triangles(2, 3)})
    layout.create(tmp_path / "a")
    assert (tmp_path / "a").stat().st_size == layout.file_bytes
    assert open_statistics(tmp_path / "a").output(UP, 1) is None  # nothing was counted yet
    matrix = symmetric(np.random.default_rng(1), 3)
    layout.put(tmp_path / "a", [(UP + OUTPUT, 1, matrix), (UP + OUTPUT + COUNT, 1, np.array(5))])
    read = open_statistics(tmp_path / "a")
    np.testing.assert_array_equal(read.output(UP, 1), matrix)
    assert read.output(UP, 0) is None
    with pytest.raises(ValueError, match="numbers for an entry"):
        layout.put(tmp_path / "a", [(UP + OUTPUT, 1, symmetric(np.random.default_rng(1), 4))])

"""Sums of squared inputs: how they are added, written, merged, and that a strange layout is refused."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pocketquant.calibration.importance import ImportanceSums, importance_of, merge_sums, read_sums, write_sums
from pocketquant.errors import EvalError, RecipeError
from pocketquant.gguf_file.reading import read_header
from pocketquant.llama.kernels import note_on_sum
from pocketquant.quant import read_importance

pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")

from pocketquant.llama import observing
from pocketquant.llama.library import require_runtime


def matrix(scale: float = 1.0, *, n_cols: int = 6, name: str = "text.txt") -> ImportanceSums:
    rng = np.random.default_rng(3)
    sums = {"blk.0.ffn_up.weight": rng.random((1, n_cols)) * scale, "blk.0.ffn_up_exps.weight": rng.random((3, 4))}
    counts = {"blk.0.ffn_up.weight": np.array([64]), "blk.0.ffn_up_exps.weight": np.array([20, 0, 44])}
    return ImportanceSums(sums, counts, 32, (name,))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    sums = matrix()
    write_sums(sums, tmp_path / "m.gguf")
    header = read_header(tmp_path / "m.gguf")
    assert {key: value.value for key, value in header.metadata.items()} == {
        "general.type": "imatrix",
        "imatrix.datasets": ["text.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 32,
    }
    assert {tensor.name: tensor.shape for tensor in header.tensors} == {
        "blk.0.ffn_up.weight.in_sum2": (1, 6),
        "blk.0.ffn_up.weight.counts": (1, 1),
        "blk.0.ffn_up_exps.weight.in_sum2": (3, 4),
        "blk.0.ffn_up_exps.weight.counts": (3, 1),
    }
    again = read_sums(tmp_path / "m.gguf")
    for name, array in sums.sums.items():
        np.testing.assert_array_equal(again.sums[name], array.astype(np.float32))
        np.testing.assert_array_equal(again.counts[name], sums.counts[name])
    assert (again.context, again.datasets, again.n_chunks) == (32, ("text.txt",), 2)


def test_the_matrix_in_memory_is_the_one_in_the_file(tmp_path: Path) -> None:
    write_sums(matrix(), tmp_path / "m.gguf")
    ours, read = importance_of(matrix(), "m.gguf"), read_importance(tmp_path / "m.gguf")
    assert (ours.file, ours.datasets, ours.n_chunks) == (read.file, read.datasets, read.n_chunks)
    assert ours.weights.keys() == read.weights.keys()
    for name, array in ours.weights.items():
        np.testing.assert_array_equal(array, read.weights[name])
    assert ours.weights["blk.0.ffn_up.weight"].shape == (6,)
    np.testing.assert_array_equal(ours.weights["blk.0.ffn_up_exps.weight"][1], np.ones(4))  # saw no input


def test_merging_adds_sums_counts_and_datasets() -> None:
    merged = merge_sums([matrix(), matrix(3.0, name="other.txt"), matrix(2.0, name="other.txt")])
    assert merged.datasets == ("text.txt", "other.txt")
    assert merged.n_chunks == 6
    np.testing.assert_allclose(merged.sums["blk.0.ffn_up.weight"], 6 * matrix().sums["blk.0.ffn_up.weight"])
    np.testing.assert_array_equal(merged.counts["blk.0.ffn_up_exps.weight"], [60, 0, 132])


def test_a_matrix_says_which_kernels_made_it(tmp_path: Path) -> None:
    ours = {"llama_cpp_features": "AVX2 = 1", "llama_cpp_kernels": "CPU", "llama_cpp_batch": "512"}
    theirs = ours | {"llama_cpp_features": "AVX512 = 1"}
    one, same, other = (
        replace(matrix(scale, name=name), kernels=kernels)
        for scale, name, kernels in ((1.0, "a", ours), (2.0, "b", ours), (3.0, "c", theirs))
    )
    write_sums(one, tmp_path / "m.gguf")
    metadata = read_header(tmp_path / "m.gguf").metadata
    assert metadata["pocketquant.kernels.llama_cpp_features"].value == "AVX2 = 1"
    assert read_sums(tmp_path / "m.gguf").kernels == ours
    assert merge_sums([one, same]).kernels == ours
    assert merge_sums([one, other]).kernels == ours | {"llama_cpp_features": "several"}
    assert merge_sums([one, matrix(2.0)]).kernels == dict.fromkeys(ours, "several")
    assert note_on_sum({"one": one.kernels, "same": same.kernels}) == ""
    said = note_on_sum({"one": one.kernels, "same": same.kernels, "other": other.kernels})
    assert "other kernels of llama.cpp than one: other (what llama.cpp was compiled for)" in said


def test_matrices_of_different_models_are_not_merged() -> None:
    with pytest.raises(RecipeError, match=r"blk\.0\.ffn_up\.weight: 1 x 6 sums in one, 1 x 8 in another"):
        merge_sums([matrix(), matrix(n_cols=8)])


def test_squares_are_summed_by_column_whatever_the_strides() -> None:
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((2, 3, 5, 16)).astype(np.float32)[:, :, :, ::1]
    wide = rng.standard_normal((2, 3, 5, 40)).astype(np.float32)
    wide[..., :16] = inputs
    for given in (inputs, wide[..., :16], np.asfortranarray(inputs)):
        sums = np.zeros((1, 16))
        observing._add_squares(given, 1, 1, sums)
        np.testing.assert_allclose(sums[0], (inputs.astype(np.float64) ** 2).sum(axis=(0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_each_expert_sums_the_tokens_sent_to_it(shared: bool) -> None:
    rng = np.random.default_rng(6)
    inputs = rng.standard_normal((9, 1 if shared else 2, 8)).astype(np.float32)
    chosen = np.array([[0, 2], [2, 3], [3, 0], [2, 0], [0, 3], [3, 2], [2, 3], [0, 2], [3, 0]], np.int32)
    sums, counts = np.zeros((5, 8)), np.zeros(5, np.int64)
    observing._add_routed(inputs, chosen, sums, counts)
    expected, seen = np.zeros((5, 8)), np.zeros(5)
    for token, experts in enumerate(chosen):
        for place, expert in enumerate(experts):
            expected[expert] += inputs[token, 0 if shared else place].astype(np.float64) ** 2
            seen[expert] += 1
    np.testing.assert_allclose(sums, expected, rtol=1e-12)
    np.testing.assert_array_equal(counts, seen)
    assert counts[1] == counts[4] == 0


def test_a_copy_on_another_device_has_the_name_of_its_weight() -> None:
    assert observing.weight_name("CUDA0#blk.0.attn_k.weight#0") == "blk.0.attn_k.weight"
    assert observing.weight_name("blk.0.attn_k.weight") == "blk.0.attn_k.weight"


def test_the_layout_of_the_installed_library_is_known() -> None:
    multiply, routed = observing._check_layout(observing._bind(require_runtime()))
    assert multiply != routed


@pytest.mark.parametrize("moved", ["type", "ne", "nb", "op", "src"])
def test_another_layout_is_refused(moved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = []
    for name, kind in observing._Node._fields_:
        if name == moved:
            fields.append(("new_member", ctypes.c_uint64))
        fields.append((name, kind))
    monkeypatch.setattr(observing, "_Node", type("_Node", (ctypes.Structure,), {"_fields_": fields}))
    with pytest.raises(EvalError, match="keeps its tensors in a way that is not known here"):
        observing.Observer(observing.InputSums())

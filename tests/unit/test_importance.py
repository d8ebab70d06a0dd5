"""Importance matrices: what llama.cpp's format means, and everything that is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from qwen35_inventory import Dimensions, build_model
from typer.testing import CliRunner

from pocketquant import open_model, open_recipe, plan
from pocketquant.calibration.importance import ImportanceSums, write_sums
from pocketquant.cli.app import app
from pocketquant.errors import PocketquantError, RecipeError
from pocketquant.model import Model, Role, Tensor
from pocketquant.quant import Importance, check_importance, read_importance
from pocketquant.quant.planning import importance_gaps

Arrays = Mapping[str, npt.NDArray[np.generic]]


def write_matrix(path: Path, arrays: Arrays, kind: str = "imatrix", chunks: int = 9) -> Path:
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["one.txt", "two.txt"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def f32(*values: object) -> npt.NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def entry(name: str, sums: npt.NDArray[np.float32], counts: npt.NDArray[np.float32]) -> dict[str, npt.NDArray]:
    return {f"{name}.in_sum2": sums, f"{name}.counts": counts}


def test_weights_are_mean_squares(tmp_path: Path) -> None:
    experts = f32([2, 4, 6], [9, 9, 9], [10, 0, 5])
    arrays = entry("a", f32(2, 4, 8), f32(4)) | entry("b", experts, f32([2], [0], [5]))
    read = read_importance(write_matrix(tmp_path / "m.gguf", arrays))
    np.testing.assert_array_equal(read.weights["a"], f32(0.5, 1, 2))
    np.testing.assert_array_equal(read.weights["b"], f32([1, 2, 3], [1, 1, 1], [2, 0, 1]))
    assert read.weights["a"].dtype == np.float32
    assert (read.file, read.datasets, read.n_chunks) == ("m.gguf", ("one.txt", "two.txt"), 9)


def test_one_division_in_f32_as_llama_cpp_does(tmp_path: Path) -> None:
    sums = np.random.default_rng(0).lognormal(0, 3, 1000).astype(np.float32)
    read = read_importance(write_matrix(tmp_path / "m.gguf", entry("a", sums, f32(51200))))
    assert read.weights["a"].tobytes() == (sums / np.float32(51200)).tobytes()


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        (entry("a", f32(1, np.nan), f32(1)), "a: not finite"),
        (entry("a", f32(1, np.inf), f32(1)), "a: not finite"),
        (entry("a", f32(1, 2), f32(np.inf)), "a: not finite"),
        (entry("a", f32(1, -2), f32(1)), "a: negative"),
        (entry("a", f32(1, 2), f32(-1)), "a: negative"),
        (entry("a", f32(1, 2, 3), f32(1, 1)), "a: 3 sums do not divide among 2 counts"),
        ({"a.in_sum2": f32(1)}, "a: .counts is missing"),
        ({"a.counts": f32(1)}, "a: .in_sum2 is missing"),
        ({"a.in_sum2": np.ones(2, np.float16), "a.counts": f32(1)}, "a.in_sum2: stored as F16"),
        ({"a": f32(1)}, "no entries"),
    ],
)
def test_broken_entries_are_refused(arrays: Arrays, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=complaint):
        read_importance(write_matrix(tmp_path / "m.gguf", arrays))


def test_every_broken_entry_is_named(tmp_path: Path) -> None:
    arrays = entry("a", f32(-1), f32(1)) | entry("b", f32(np.nan), f32(1)) | entry("c", f32(1), f32(1))
    with pytest.raises(RecipeError, match=r"2 fault.*\n  a: negative\n  b: not finite$"):
        read_importance(write_matrix(tmp_path / "m.gguf", arrays))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"general\.type = model, expected imatrix"):
        read_importance(write_matrix(tmp_path / "m.gguf", entry("a", f32(1), f32(1)), kind="model"))
    old = tmp_path / "old.dat"
    old.write_bytes(b"\x01\x00\x00\x00")
    with pytest.raises(RecipeError, match=r"llama-imatrix --in-file old\.dat"):
        read_importance(old)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_importance(tmp_path / "missing.gguf")
    whole = write_matrix(tmp_path / "m.gguf", entry("a", np.ones(64, np.float32), f32(1))).read_bytes()
    for length in (4, 40, len(whole) // 2, len(whole) - 64):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(PocketquantError):
            read_importance(tmp_path / "cut.gguf")


def test_a_matrix_of_another_model_is_refused() -> None:
    model = build_model(Dimensions())
    check_importance(Importance({"blk.0.ffn_up.weight": np.ones(256, np.float32)}), model)
    strange = {
        "blk.0.ffn_up.weight": np.ones(255, np.float32),
        "blk.0.ffn_down.weight": np.ones((2, 512), np.float32),
        "blk.9.ffn_up.weight": np.ones(256, np.float32),
    }
    with pytest.raises(RecipeError) as caught:
        check_importance(Importance(strange, "m.gguf"), model)
    message = str(caught.value)
    assert "m.gguf: 3 entries do not fit" in message
    assert "blk.0.ffn_up.weight: has 255 weights, the tensor wants 256" in message
    assert "blk.0.ffn_down.weight: has 2 x 512 weights, the tensor wants 512" in message
    assert "blk.9.ffn_up.weight: no such tensor" in message


def test_experts_have_a_row_of_weights_each() -> None:
    plain = build_model(Dimensions()).tensors[0]
    experts = Tensor("blk.0.ffn_up_exps.weight", Role.FFN_UP, 0, (3, 8, 16), "F32", plain.source)
    model = Model("qwen35moe", {}, (experts,), {})
    check_importance(Importance({experts.name: np.ones((3, 16), np.float32)}), model)
    with pytest.raises(RecipeError, match="has 16 weights, the tensor wants 3 x 16"):
        check_importance(Importance({experts.name: np.ones(16, np.float32)}), model)


def test_a_matrix_of_half_the_blocks_is_said(checkpoint: Path) -> None:
    model, recipe = open_model(checkpoint), open_recipe("q4_0")
    matrices = [t for t in model.tensors if len(t.shape) > 1 and not t.keep_f32 and t.layer is not None]
    whole = {t.name: np.ones(t.n_cols, np.float32) for t in matrices}
    half = {t.name: whole[t.name] for t in matrices if t.layer in (0, 1)}
    one_less = {name: array for name, array in whole.items() if name != "blk.3.attn_q.weight"}
    assert importance_gaps(plan(model, recipe, Importance(whole, "w"))) == ()
    n_half, n_whole = len(half), len(whole)
    [gap] = importance_gaps(plan(model, recipe, Importance(half, "h")))
    assert f"no entries for {n_whole - n_half} of {n_whole} matrices of the blocks, all of block 2, 3 among them" in gap
    [gap] = importance_gaps(plan(model, recipe, Importance(one_less, "o")))
    assert gap.endswith(
        f"no entries for 1 of {n_whole} matrices of the blocks: they are rounded without importance "
        "(blk.3.attn_q.weight)"
    )


def test_the_run_says_it_too(checkpoint: Path, tmp_path: Path) -> None:
    half = [t for t in open_model(checkpoint).tensors if len(t.shape) > 1 and not t.keep_f32 and t.layer in (0, 1)]
    ones = {t.name: np.ones((1, t.n_cols), np.float32) for t in half}
    write_sums(ImportanceSums(ones, {name: np.ones(1, np.float32) for name in ones}, 32), tmp_path / "half.gguf")
    arguments = ["quantize", str(checkpoint), "--recipe", "q4_0", "--imatrix", str(tmp_path / "half.gguf"), "--dry-run"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert "all of block 2, 3 among them" in result.stderr
    assert any("all of block 2, 3 among them" in note for note in json.loads(result.stdout)["notes"])

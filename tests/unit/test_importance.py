"""Importance matrices: what llama.cpp's format means, and everything that is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from qwen35_inventory import Dimensions, build_model

from pocketquant.errors import PocketquantError, RecipeError
from pocketquant.model import Model, Role, Tensor
from pocketquant.quant import Importance, check_importance, read_importance

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

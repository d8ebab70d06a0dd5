"""Every built-in recipe gives llama.cpp's type to every tensor: same file, same flags, tensor for tensor.

llama.cpp's dry run names the type it chose for each tensor without reading data, so the files here are headers
followed by a hole; one file is really quantized, to show that the dry run tells the truth.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from qwen35_inventory import QWEN35_08B, QWEN35_4B, QWEN35_9B, QWEN35_35B_A3B, Dimensions, build_model

from pocketquant.gguf_file.reading import read_header
from pocketquant.model import Model, Tensor
from pocketquant.quant import builtin_recipes, choose_formats, open_recipe, plan

llama = pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")

LIKE_LLAMA = [name for name in builtin_recipes() if not name.startswith("pocket_")]
MIXTURE = Dimensions(n_ff=0, n_expert=6, n_expert_used=2, n_ff_exp=256, n_ff_shared=512)
SHAPES = {
    "4 layers": Dimensions(),
    "8 layers, 4 query heads per kv head": Dimensions(n_layer=8, n_head=8, n_kv=2),
    "8 layers, untied": Dimensions(n_layer=8, tied=False),
    "32 layers": Dimensions(n_layer=32),
    "30 layers, untied, gqa 4": Dimensions(n_layer=30, n_head=4, n_kv=1, tied=False),
    "rows of 320": Dimensions(n_layer=8, n_embd=320, n_ff=800),
    "rows of 320, untied": Dimensions(n_layer=8, n_embd=320, n_ff=1024, tied=False),
    "0.8B": QWEN35_08B,
    "4B": replace(QWEN35_4B, n_vocab=1024),
    "9B": replace(QWEN35_9B, n_vocab=1024),
    "35B-A3B": replace(QWEN35_35B_A3B, n_vocab=1024),
    "6 experts, 8 layers": replace(MIXTURE, n_layer=8),
    "8 experts, 8 layers": replace(MIXTURE, n_layer=8, n_expert=8),
    "8 experts, 32 layers, gqa 4, untied": replace(MIXTURE, n_layer=32, n_expert=8, n_kv=1, tied=False),
    "experts of 96": replace(MIXTURE, n_layer=8, n_ff_exp=96, n_ff_shared=320),
}
_LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\w+), (.*)")


@pytest.fixture(scope="module", autouse=True)
def llama_log() -> Iterator[list[str]]:
    """Collects llama.cpp's log in place of printing it."""
    lines: list[str] = []
    callback = llama.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
    before, before_data = llama.llama_log_callback(), ctypes.c_void_p()
    llama.llama_backend_init()
    llama.llama_log_get(ctypes.byref(before), ctypes.byref(before_data))
    llama.llama_log_set(callback, ctypes.c_void_p(0))
    yield lines
    llama.llama_log_set(before, before_data)


@pytest.mark.parametrize("importance", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("recipe_name", LIKE_LLAMA)
@pytest.mark.parametrize("shape", SHAPES)
def test_types_are_llama_cpp_s(
    shape: str, recipe_name: str, importance: bool, llama_log: list[str], sparse_files: dict[str, Path]
) -> None:
    recipe = open_recipe(recipe_name)
    model = build_model(SHAPES[shape], dtype="BF16")
    if recipe_name == "bf16":
        # llama.cpp leaves a tensor alone that has the wanted type, so the source must have another one.
        model = build_model(SHAPES[shape], dtype="F16")
    ours = {tensor.name: format.name for tensor, format, _ in choose_formats(model, recipe, importance)}
    key = f"{shape} {model.tensors[0].dtype}"
    if key not in sparse_files:
        sparse_files[key] = _write_hole(model, sparse_files["folder"])
    source = sparse_files[key]
    llama_log.clear()
    result = _quantize(source, source.with_suffix(".out"), recipe.file_type, model.tensors, importance, dry_run=True)
    assert result == 0, "".join(llama_log[-5:])
    assert ours == _types_in(llama_log)


@pytest.fixture(scope="module")
def sparse_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"folder": tmp_path_factory.mktemp("sparse")}


@pytest.mark.parametrize("shape", [Dimensions(n_layer=8, n_embd=320, n_ff=1024), replace(MIXTURE, n_layer=8)])
@pytest.mark.parametrize("recipe_name", ["q4_k_m", "q4_0"])
def test_dry_run_tells_the_truth(recipe_name: str, shape: Dimensions, tmp_path: Path) -> None:
    recipe = open_recipe(recipe_name)
    model = build_model(shape)
    source, target = tmp_path / "f32.gguf", tmp_path / "quantized.gguf"
    full = plan(model, open_recipe("f32"))
    with source.open("wb") as file:
        file.write(full.header)
        for item in full.tensors:
            file.seek(len(full.header) + item.offset)
            file.write(item.tensor.rows(0, item.tensor.n_rows).tobytes())
        file.truncate(full.file_bytes)
    assert _quantize(source, target, recipe.file_type, model.tensors, True, dry_run=False) == 0
    theirs = {tensor.name: tensor.format.name for tensor in read_header(target).tensors}
    assert theirs == {tensor.name: format.name for tensor, format, _ in choose_formats(model, recipe, True)}


def _write_hole(model: Model, folder: Path) -> Path:
    """A GGUF whose header is real and whose data was never written; a few blocks on disk at most."""
    stored = "f16" if model.tensors[0].dtype == "F16" else "bf16"
    empty = plan(model, open_recipe(stored))
    path = folder / f"{len(list(folder.iterdir()))}.gguf"
    with path.open("wb") as file:
        file.write(empty.header)
        file.truncate(empty.file_bytes)
    return path


def _quantize(
    source: Path, target: Path, file_type: int, tensors: Sequence[Tensor], importance: bool, *, dry_run: bool
) -> int:
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run = file_type, 1, dry_run
    if importance:
        widths = {tensor.name: prod(tensor.shape[:-2]) * tensor.n_cols for tensor in tensors}
        ones = np.ones(max(widths.values()), dtype=np.float32)
        pointer = ones.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        matrix = (llama.llama_model_imatrix_data * (len(tensors) + 1))()
        for entry, tensor in zip(matrix, tensors, strict=False):
            entry.name, entry.data, entry.size = tensor.name.encode(), pointer, widths[tensor.name]
        params.imatrix = matrix
    return int(llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)))


def _types_in(log: list[str]) -> dict[str, str]:
    """Tensor name -> type, from lines `[1/9] NAME - [shape], type = bf16, size = .. -> .. MiB (q4_K)`."""
    types: dict[str, str] = {}
    for line in "".join(log).splitlines():
        match = _LINE.search(line)
        if match is not None:
            new = re.search(r"-> .*\((\w+)\)", match[3])
            types[match[1]] = (new[1] if new is not None else match[2]).upper()
    return types

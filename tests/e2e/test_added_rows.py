"""The pages on adding a format and an architecture, done as they say to a copy of the package."""

from __future__ import annotations

import json

import pytest
from page_edits import ROOT, EditedPackage, apply_page

from pocketquant.demo import checkpoint_dir

FORMAT_SCRIPT = """
import sys
import numpy as np
from pocketquant import open_model
from pocketquant.formats import FORMATS
from pocketquant.quant.allocation import DEVICES
from pocketquant.quant.prediction import PREDICTED

made, source = open_model(sys.argv[1]), {tensor.name: tensor for tensor in open_model(sys.argv[2]).tensors}
for tensor in made.tensors:
    if not tensor.keep_f32:
        assert tensor.dtype == "TOY4", tensor.name
        ours, theirs = (np.float64(item.rows(0, min(64, item.n_rows))) for item in (tensor, source[tensor.name]))
        assert np.square(ours - theirs).sum() < 0.02 * np.square(theirs).sum(), tensor.name
toy, rows = FORMATS["TOY4"], np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
data, importance = toy.encode(rows), np.r_[np.full(32, 100), np.ones(32)].astype(np.float32)
assert (toy.encode(rows[3:5]) == data[3:5]).all()
blocks = np.ascontiguousarray(data).view(toy.layout.dtype)
codes = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=2).reshape(8, 64)
assert (toy.layout.pack(codes, toy.layout.scales(data)) == data).all()
assert toy.encode(rows, importance).shape == data.shape
assert "TOY4" in DEVICES["any"] and "TOY4" not in DEVICES["phone"] and "TOY4" in PREDICTED
"""

ARCHITECTURE_SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from checkpoint_maker import text_config, weights_for, write_json_files, write_safetensors
from pocketquant import open_model

folder = Path(sys.argv[1])
if not folder.exists():
    folder.mkdir()
    config = text_config(architectures=["ToyForCausalLM"], tie_word_embeddings=False)
    write_json_files(folder, config)
    write_safetensors(folder / "model.safetensors", weights_for(config))
source = open_model(folder)
assert source.architecture == "toy" and len(source.tensors) == 3 + 4 * 9
for made in sys.argv[2:]:
    made = open_model(made)
    assert [(t.name, t.role, t.layer, t.shape) for t in made.tensors] == [
        (t.name, t.role, t.layer, t.shape) for t in source.tensors
    ]
    exact = {tensor.name: tensor for tensor in source.tensors}
    for tensor in made.tensors:
        if tensor.dtype in ("F32", "BF16"):
            assert (tensor.rows(0, tensor.n_rows) == exact[tensor.name].rows(0, tensor.n_rows)).all()
"""


@pytest.fixture(scope="module")
def with_format(tmp_path_factory: pytest.TempPathFactory) -> EditedPackage:
    return apply_page(ROOT / "docs/add-a-format.md", tmp_path_factory.mktemp("format"))


@pytest.fixture(scope="module")
def with_architecture(tmp_path_factory: pytest.TempPathFactory) -> EditedPackage:
    return apply_page(ROOT / "docs/add-an-architecture.md", tmp_path_factory.mktemp("architecture"))


def test_a_toy_format_is_quantized_checked_inspected_and_decoded(with_format: EditedPackage) -> None:
    command = ["-m", "pocketquant"]
    with_format.run(*command, "quantize", checkpoint_dir(), "--recipe", "toy.toml", "--out", "toy.gguf")
    seen = json.loads(with_format.run(*command, "inspect", "toy.gguf", "--json").stdout)
    assert {item["type"] for item in seen["tensors"]} == {"TOY4", "F32"}
    with_format.run(*command, "check", "toy.gguf", "--source", checkpoint_dir())
    with_format.run("-c", FORMAT_SCRIPT, "toy.gguf", checkpoint_dir())


def test_a_toy_format_is_offered_where_a_recipe_names_no_format(with_format: EditedPackage) -> None:
    recipe = (with_format.folder / "toy.toml").read_text()
    (with_format.folder / "odd.toml").write_text(recipe.replace('"TOY4"', '"TOY5"'))
    quantize = ["-m", "pocketquant", "quantize", checkpoint_dir(), "--out", "odd.gguf"]
    assert "TOY4" in with_format.run(*quantize, "--recipe", "odd.toml", code=2).stderr


def test_a_toy_architecture_converts_to_a_file_that_opens_again(with_architecture: EditedPackage) -> None:
    command = ["-m", "pocketquant"]
    with_architecture.run("-c", ARCHITECTURE_SCRIPT, "toy")
    with_architecture.run(*command, "convert", "toy", "--type", "bf16", "--out", "toy.gguf")
    with_architecture.run(*command, "convert", "toy.gguf", "--type", "f32", "--out", "again.gguf")
    with_architecture.run("-c", ARCHITECTURE_SCRIPT, "toy", "toy.gguf", "again.gguf")
    with_architecture.run(*command, "check", "toy.gguf", "--source", "toy")

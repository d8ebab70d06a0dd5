"""`compare`: two files side by side, against what each says by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint
from gguf_maker import changed
from typer.testing import CliRunner

from pocketquant import compare, open_model, open_recipe, plan, write
from pocketquant.cli.app import app
from pocketquant.demo import checkpoint_dir
from pocketquant.errors import EvalError
from pocketquant.eval.difference import find_differences
from pocketquant.gguf_file.reading import read_header
from pocketquant.texts.embedded import read_texts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    model = open_model(checkpoint_dir())
    for recipe in ("q4_k_m", "q8_0"):
        write(plan(model, open_recipe(recipe)), folder / f"{recipe}.gguf")
    return {path.stem: path for path in folder.iterdir()}


def shown(*words: object) -> str:
    result = CliRunner().invoke(app, ["compare", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_tensor_is_measured_against_its_twin(files: dict[str, Path]) -> None:
    found = find_differences(files["q4_k_m"], files["q8_0"])
    models = [{tensor.name: tensor for tensor in open_model(files[name]).tensors} for name in ("q4_k_m", "q8_0")]
    assert {pair.name for pair in found.tensors} == models[0].keys()
    for pair in found.tensors:
        ours, theirs = (each[pair.name].rows(0, each[pair.name].n_rows).astype(np.float64) for each in models)
        expected = np.sqrt(((ours - theirs) ** 2).sum() / (ours**2).sum()) if (ours != theirs).any() else 0
        assert pair.relative_difference == pytest.approx(expected, rel=1e-6)
        assert pair.is_equal == (expected == 0)
    for place, path in enumerate((files["q4_k_m"], files["q8_0"])):
        assert sum(sizes[place] for sizes in found.bytes_by_type().values()) == sum(
            tensor.nbytes for tensor in read_header(path).tensors
        )
    assert {pair.key for pair in found.metadata} == {"general.file_type", "pocketquant.recipe"}


def test_a_file_is_the_same_as_itself(files: dict[str, Path]) -> None:
    found = find_differences(files["q8_0"], files["q8_0"])
    assert all(pair.is_equal for pair in found.tensors)
    assert found.metadata == ()
    assert f"{len(found.tensors)} of {len(found.tensors)} tensors are the same" in shown(files["q8_0"], files["q8_0"])


def test_what_only_one_file_has_is_shown(files: dict[str, Path], tmp_path: Path) -> None:
    def without(parts: Any) -> None:
        del parts.metadata["general.name"]

    other = changed(files["q8_0"], tmp_path / "other.gguf", without)
    [pair] = find_differences(other, files["q8_0"]).metadata
    assert (pair.key, pair.first) == ("general.name", None)
    assert pair.second is not None
    assert "general.name" in shown(other, files["q8_0"])


def test_another_architecture_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    write(
        plan(open_model(make_checkpoint(tmp_path / "moe", num_experts=6)), open_recipe("bf16")), tmp_path / "moe.gguf"
    )
    with pytest.raises(EvalError, match=r"another model|different models"):
        find_differences(tmp_path / "moe.gguf", files["q8_0"])


def test_the_divergence_is_that_of_eval_in_both_directions(files: dict[str, Path]) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    first, second = files["q4_k_m"], files["q8_0"]
    words = (first, second, "--text", "package:prose", "--chunks", 2, "--context", 64)
    document = json.loads(shown(*words, "--json"))
    assert document["schema"] == "pocketquant.compare/1"
    texts = read_texts(["package:prose"])
    for name, (model, reference) in {"first_to_second": (second, first), "second_to_first": (first, second)}.items():
        expected = compare(model, reference, texts, context=64, chunks=2).metrics
        assert document["divergence"][name]["metrics"]["kld"]["mean"] == pytest.approx(expected.kld.mean, rel=1e-9)
    text = shown(*words)
    assert "KL(A || B)" in text
    assert "KL(B || A)" in text


def test_without_a_text_nothing_is_run(files: dict[str, Path]) -> None:
    document = json.loads(shown(files["q4_k_m"], files["q8_0"], "--json"))
    assert document["divergence"] is None
    assert len(document["tensors"]) == len(read_header(files["q8_0"]).tensors)
    result = CliRunner().invoke(app, ["compare", str(files["q8_0"]), str(files["q8_0"]), "--chunks", "2"])
    assert result.exit_code == 2
    assert "is used only with --text" in " ".join(result.output.split())

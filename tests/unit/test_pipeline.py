"""Writing: bytes independent of threads and chunks, and nothing replaced unless the new file is whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, text_config, weights_for

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.errors import OutputError, RecipeError, SourceError
from pocketquant.files.replacing import flushed_meanwhile
from pocketquant.gguf_file import writing as pipeline
from pocketquant.gguf_file.opening import open_gguf


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("recipe", ["bf16", "q8_0", "q4_k_m"])
def test_bytes_depend_on_neither_threads_nor_chunks(
    recipe: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(open_model(checkpoint), open_recipe(recipe))
    write(planned, tmp_path / "one.gguf", threads=1)
    write(planned, tmp_path / "five.gguf", threads=5)
    monkeypatch.setattr(pipeline, "CHUNK_WEIGHTS", 2000)
    write(planned, tmp_path / "small.gguf", threads=3)
    assert (tmp_path / "one.gguf").stat().st_size == planned.file_bytes
    assert digest(tmp_path / "one.gguf") == digest(tmp_path / "five.gguf") == digest(tmp_path / "small.gguf")


@pytest.mark.parametrize("recipe", ["q4_k_m", "bf16"])
def test_from_a_gguf_equals_from_the_checkpoint(recipe: str, checkpoint: Path, tmp_path: Path) -> None:
    write(plan(open_model(checkpoint), open_recipe("f32")), tmp_path / "f32.gguf")
    write(plan(open_model(checkpoint), open_recipe(recipe)), tmp_path / "direct.gguf")
    write(plan(open_gguf(tmp_path / "f32.gguf"), open_recipe(recipe)), tmp_path / "two-steps.gguf")
    assert digest(tmp_path / "direct.gguf") == digest(tmp_path / "two-steps.gguf")


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    weights = weights_for(text_config())
    weights["model.layers.2.mlp.gate_proj.weight"][0, 0] = np.nan
    planned = plan(open_model(make_checkpoint(tmp_path / "c", weights=weights)), open_recipe("bf16"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.gguf").write_bytes(b"good")
    with pytest.raises(SourceError, match="non-finite"):
        write(planned, out / "model.gguf", threads=2)
    assert [path.name for path in out.iterdir()] == ["model.gguf"]
    assert (out / "model.gguf").read_bytes() == b"good"


def test_a_source_that_shrinks_while_being_read_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    planned = plan(open_model(folder), open_recipe("bf16"))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match="changed, replaced or removed while it was read"):
        write(planned, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_targets_that_cannot_be_written(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(open_model(checkpoint), open_recipe("bf16"))
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        write(planned, tmp_path / "missing" / "out.gguf")
    with pytest.raises(OutputError, match="is a folder"):
        write(planned, tmp_path)


def test_f16_refuses_a_weight_beyond_its_range(tmp_path: Path) -> None:
    weights = weights_for(text_config())
    weights["model.layers.2.mlp.gate_proj.weight"][5, 5] = 1e5
    planned = plan(open_model(make_checkpoint(tmp_path / "c", weights=weights)), open_recipe("f16"))
    with pytest.raises(RecipeError, match=r"blk\.2\.ffn_gate\.weight: weight of magnitude .* beyond the range of F16"):
        write(planned, tmp_path / "out.gguf")


def test_an_error_of_the_flushing_thread_reaches_the_caller(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), flushed_meanwhile(tmp_path / "missing"):
        pass

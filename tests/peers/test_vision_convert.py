"""Every tensor byte and metadata key of a vision tower against llama.cpp's own converter, on the same checkpoints."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from vision_maker import make_vision_checkpoint, vision_config

from pocketquant import open_recipe, plan, write
from pocketquant.convert.vision import open_vision
from pocketquant.files.reading import read_at
from pocketquant.gguf_file.reading import read_header

KINDS = ("f32", "f16", "bf16", "q8_0")
OURS_ONLY = {"pocketquant.recipe", "pocketquant.version"}
WIDE = vision_config(depth=1, hidden_size=96, num_heads=2, intermediate_size=80)
"""A feed-forward width that Q8_0 cannot hold, as 4304 of the largest towers; an odd number of blocks."""


def write_ours(checkpoint: Path, folder: Path) -> None:
    model = open_vision(checkpoint)
    assert model is not None
    for kind in KINDS:
        write(plan(model, open_recipe(kind)), folder / f"mmproj-ours-{kind}.gguf")


def write_theirs(checkpoint: Path, folder: Path, oracle_python: Path) -> None:
    """One process makes all files, as starting it takes longest."""
    script = Path(__file__).with_name("llama_convert_mmproj.py")
    run = subprocess.run([oracle_python, script, checkpoint, folder, *KINDS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def contents(path: Path) -> dict[str, tuple[object, ...]]:
    """Tensor name -> shape, type and bytes."""
    return {
        tensor.name: (tensor.shape, tensor.format.name, read_at(path, tensor.offset, tensor.nbytes).tobytes())
        for tensor in read_header(path).tensors
    }


def metadata(path: Path) -> dict[str, tuple[str, object]]:
    found = read_header(path).metadata.items()
    return {key: (value.kind, value.value) for key, value in found if key not in OURS_ONLY}


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize(("prefix", "vision"), [("model.visual.", vision_config()), ("visual.", WIDE)])
def test_bytes_and_metadata_equal_the_peers(
    prefix: str, vision: dict[str, object], dtype: str, tmp_path: Path, oracle_python: Path
) -> None:
    checkpoint = make_vision_checkpoint(tmp_path / "Tiny-1M", prefix=prefix, dtype=dtype, vision=vision)
    write_ours(checkpoint, tmp_path)
    write_theirs(checkpoint, tmp_path, oracle_python)
    for kind in KINDS:
        ours, theirs = tmp_path / f"mmproj-ours-{kind}.gguf", tmp_path / f"mmproj-theirs-{kind}.gguf"
        mine, others = contents(ours), contents(theirs)
        assert {name: entry[:2] for name, entry in mine.items()} == {name: entry[:2] for name, entry in others.items()}
        assert [name for name, entry in mine.items() if entry != others[name]] == []
        assert metadata(ours) == metadata(theirs)


def test_breaks_today_03_the_peer_writes_an_empty_tower_under_a_prefix_that_is_whole_here(
    tmp_path: Path, oracle_python: Path
) -> None:
    checkpoint = make_vision_checkpoint(tmp_path / "Tiny-1M", prefix="model.language_model.visual.")
    write_ours(checkpoint, tmp_path)
    write_theirs(checkpoint, tmp_path, oracle_python)
    assert read_header(tmp_path / "mmproj-theirs-f32.gguf").tensors == ()
    (tmp_path / "known").mkdir()
    same = make_vision_checkpoint(tmp_path / "known" / "Tiny-1M", prefix="model.visual.")
    write_theirs(same, tmp_path / "known", oracle_python)
    for kind in ("f32", "f16", "bf16"):
        assert contents(tmp_path / f"mmproj-ours-{kind}.gguf") == contents(
            tmp_path / "known" / f"mmproj-theirs-{kind}.gguf"
        )


def test_the_fixture_has_no_two_equal_tensors(tmp_path: Path) -> None:
    model = open_vision(make_vision_checkpoint(tmp_path / "Tiny-1M"))
    assert model is not None
    seen = {tensor.rows(0, tensor.n_rows).tobytes() for tensor in model.tensors}
    assert len(seen) == len(model.tensors)
    frames = [tensor.rows(0, tensor.n_rows) for tensor in model.tensors[:2]]
    assert not np.isclose(*frames).any(axis=1).all()

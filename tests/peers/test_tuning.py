"""Tuned blocks: gradients against differences of real runs, and a file that loses less in llama.cpp."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_checkpoint import golden_checkpoint

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.demo import text_path
from pocketquant.gguf_file.reading import GgufTensor, read_header
from pocketquant.texts.calibration import CalibrationSettings, cut_texts

pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")

from pocketquant.eval import compare
from pocketquant.texts.corpus import Text
from pocketquant.tuning.tune import KEY, sample_continuations

WATCHED = {
    "dense": ("token_embd", "blk.0.attn_qkv", "blk.1.ssm_out", "blk.3.attn_k", "blk.3.ffn_down", "blk.2.ssm_beta"),
    "experts": ("blk.3.ffn_", "output"),  # a change below a router sends tokens elsewhere: no derivative sees that
}


@pytest.fixture(scope="module", params=["dense", "experts"])
def made(
    request: pytest.FixtureRequest,
    oracle_python: Path,
    demo_gguf: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, Path]:
    """The file that was tuned, its reference, and the folder of what came of it."""
    if subprocess.run([oracle_python, "-c", "import numba"], capture_output=True).returncode:
        pytest.skip("the interpreter with torch has no numba, which pocketquant needs; pip install numba there")
    folder = tmp_path_factory.mktemp("tuning")
    if request.param == "dense":
        file, reference = demo_gguf("q4_k_s"), demo_gguf("f32")
    else:
        model, file, reference = open_model(golden_checkpoint(folder / "moe")), folder / "file", folder / "reference"
        write(plan(model, open_recipe("q4_k_s")), file)
        write(plan(model, open_recipe("f32")), reference)
    windows, _, _ = cut_texts(reference, [text_path("calibration")], CalibrationSettings(128, 96, threads=1))
    more = sample_continuations(reference, windows, 64, threads=2)
    np.save(folder / "windows.npy", windows)
    np.save(folder / "more.npy", more)
    script, root = Path(__file__).with_name("tuning_run.py"), Path(__file__).parents[2]
    command = [oracle_python, script, root, file, reference, folder, *WATCHED[request.param]]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return file, reference, folder


def read(path: Path, name: str) -> Any:
    return json.loads((path / name).read_text())


def test_gradients_are_derivatives(made: tuple[Path, Path, Path]) -> None:
    derivatives = read(made[2], "derivatives.json")
    assert len(derivatives) >= 6
    largest = max(abs(measured) for _, measured in derivatives.values())
    for name, (by_gradient, measured) in derivatives.items():
        # F16 rounds every scale that is moved, so derivatives are known to some percent of the largest
        assert by_gradient == pytest.approx(measured, rel=0.1, abs=0.06 * largest), name


def test_it_loses_less_on_text_that_it_has_not_seen(made: tuple[Path, Path, Path]) -> None:
    file, reference, folder = made
    tuned = read(folder, "tuned.json")
    assert tuned["after"] < 0.97 * tuned["before"]
    text = [Text("evaluation", text_path("evaluation"))]
    losses = [
        compare(path, reference, text, context=128, chunks=60, threads=2).metrics.kld.mean
        for path in (file, folder / "tuned.gguf")
    ]
    assert losses[1] < 0.98 * losses[0]


@pytest.mark.parametrize(("name", "n_code_bytes"), [("tuned", 50), ("scales", 0)])
def test_only_scales_codes_and_the_metadata_change(made: tuple[Path, Path, Path], name: str, n_code_bytes: int) -> None:
    file, other = made[0], made[2] / f"{name}.gguf"
    before, after = read_header(file), read_header(other)
    assert set(after.metadata) - set(before.metadata) == {KEY}
    assert "text.txt" in str(after.metadata[KEY].value)
    assert all(after.metadata[key] == value for key, value in before.metadata.items())
    n_scales = n_codes = 0
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (old.name, old.shape, old.format) == (new.name, new.shape, new.format)
        blocks = [stored(path, tensor) for path, tensor in ((file, old), (other, new))]
        layout = old.format.layout
        if layout is None:
            np.testing.assert_array_equal(*blocks)
            continue
        for field in layout.dtype.names or ():
            one, two = (data.view(layout.dtype)[field] for data in blocks)
            if field in ("d", layout.dmin_field):
                n_scales += np.count_nonzero(one != two)
            elif field.startswith("q"):
                n_codes += np.count_nonzero(one != two)
            else:
                np.testing.assert_array_equal(one, two)
    assert n_scales > 1000
    assert (n_codes > n_code_bytes) == (n_code_bytes > 0)


def stored(path: Path, tensor: GgufTensor) -> np.ndarray:
    return np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.offset)


def test_the_same_twice(made: tuple[Path, Path, Path]) -> None:
    assert (made[2] / "tuned.gguf").read_bytes() == (made[2] / "again.gguf").read_bytes()


def test_what_cannot_be_tuned_is_refused(made: tuple[Path, Path, Path]) -> None:
    refused = read(made[2], "refused.json")
    assert "is tuned already" in refused["tuned"]
    assert "nothing to tune" in refused["plain"]
    assert "does not pay" in refused["worse"]
    assert refused["worse"].endswith("False")  # nothing was written

"""`pocketquant imatrix` and what `make` does with importance: files, resuming, merging, reports, refusals."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pocketquant.calibration.importance import read_sums, write_sums
from pocketquant.demo import checkpoint_dir, text_path
from pocketquant.errors import EvalError
from pocketquant.gguf_file.reading import read_header
from pocketquant.quant import read_importance
from pocketquant.texts.calibration import CalibrationSettings

pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")

from pocketquant.calibration.imatrix import collect_importance

COMMAND = str(Path(sys.executable).with_name("pocketquant"))
TEXT = text_path("calibration")


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result


def test_a_matrix_covers_every_matrix_of_the_blocks(demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    made = json.loads(run("imatrix", demo_gguf("f32"), "--text", TEXT, "--chunks", 3, "-o", out, "--json").stdout)
    importance = read_importance(out)
    weights = {
        tensor.name: tensor.shape[-1]
        for tensor in read_header(demo_gguf("f32")).tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2 and "conv1d" not in tensor.name
    }
    assert {name: len(array) for name, array in importance.weights.items()} == weights
    assert all((counts == 3 * 512).all() for counts in read_sums(out).counts.values())
    assert (importance.n_chunks, importance.datasets) == (3, ("calibration.txt",))
    assert (made["windows"], made["tokens"], made["entries"]) == (3, 3 * 512, len(weights))
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    run("quantize", demo_gguf("f32"), "--recipe", "q4_k_m", "--imatrix", out, "-o", tmp_path / "q.gguf")
    assert read_header(tmp_path / "q.gguf").metadata["quantize.imatrix.chunks_count"].value == 3


def test_an_interrupted_run_goes_on_to_the_same_bytes(demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    state, seen = tmp_path / "state", list[int]()

    def collect(stop_after: int | None, chunks: int = 5) -> None:
        def count(done: int, _: int) -> None:
            seen.append(done)
            if done == stop_after:
                raise KeyboardInterrupt

        sums, _ = collect_importance(
            demo_gguf("f32"),
            TEXT,
            CalibrationSettings(128, chunks, threads=1, save_seconds=0),
            state=state,
            resume=True,
            progress=count,
        )
        write_sums(sums, tmp_path / f"{stop_after is None and len(seen)}.gguf")
        state.unlink()

    collect(None)
    whole = (tmp_path / f"{len(seen)}.gguf").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        collect(3)
    assert state.exists()
    with pytest.raises(EvalError, match=r"other settings \(tokens\)"):
        collect(None, chunks=4)
    del seen[:]
    collect(None)
    assert seen == [2, 3, 4, 5]  # the third window was interrupted before it was saved
    assert (tmp_path / "4.gguf").read_bytes() == whole
    state.write_bytes(b"PK nonsense")
    with pytest.raises(EvalError, match="not the state of an unfinished importance matrix"):
        collect(None)


def test_merging_adds_two_texts_up(demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    text = TEXT.read_text()
    for name, piece in (("a", text[:5000]), ("b", text[5000:10000])):
        (tmp_path / f"{name}.txt").write_text(piece)
        arguments = ["--context", 128, "--chunks", 2, "--quiet", "-o", tmp_path / f"{name}.gguf"]
        run("imatrix", demo_gguf("f32"), "--text", tmp_path / f"{name}.txt", *arguments)
    run("imatrix", "--merge", tmp_path / "a.gguf", tmp_path / "b.gguf", "--out", tmp_path / "c.gguf")
    a, b, merged = (read_sums(tmp_path / f"{name}.gguf") for name in "abc")
    assert merged.sums.keys() == a.sums.keys()
    for name, array in merged.sums.items():
        np.testing.assert_allclose(array, a.sums[name].astype(np.float64) + b.sums[name], rtol=1e-6)
        assert (merged.counts[name] == 4 * 128).all()
    assert (merged.datasets, merged.n_chunks) == (("a.txt", "b.txt"), 4)


def test_the_model_can_write_the_text(demo_gguf: Callable[[str], Path]) -> None:
    def sample(seed: int) -> np.ndarray:
        return collect_importance(demo_gguf("f32"), "self", CalibrationSettings(64, 2, threads=1, seed=seed))[1].windows

    first = sample(7)
    assert first.shape == (2, 64)
    np.testing.assert_array_equal(first, sample(7))
    assert (first != sample(8)).any()
    assert (first[0, 1:] != first[1, 1:]).any()
    assert len(np.unique(first)) > 30


def test_make_calibrates_and_says_so(tmp_path: Path) -> None:
    small = ["--recipe", "q4_0", "--context", 128, "--chunks", 12, "--quiet"]
    own = ["--calibrate-chunks", 24]
    kinds = {"a": own, "self": ["--calibrate", "self", "--calibrate-chunks", 2], "none": ["--imatrix", "none"]}
    planned = json.loads(
        run("make", checkpoint_dir(), "-o", tmp_path / "a", *small, *own, "--dry-run", "--json").stdout
    )
    reports = {}
    for folder, options in kinds.items():
        run("make", checkpoint_dir(), "-o", tmp_path / folder, *small, *options)
        reports[folder] = json.loads((tmp_path / folder / "report.json").read_text())
    [matrix] = (tmp_path / "a").glob("*-imatrix.gguf")
    [model] = (tmp_path / "a").glob("*Q4_0.gguf")
    importance = reports["a"]["importance"]
    assert planned["files"] == [{"file": model.name, "file_bytes": model.stat().st_size}]
    assert importance["text"]["sha256"] == hashlib.sha256(TEXT.read_bytes()).hexdigest()
    assert (importance["windows"], importance["tokens"], importance["file"]) == (24, 24 * 128, matrix.name)
    assert matrix.name in (tmp_path / "a/SHA256SUMS").read_text()
    assert read_header(model).metadata["quantize.imatrix.file"].value == matrix.name
    assert reports["self"]["importance"]["text"] is None
    assert reports["self"]["importance"]["datasets"] == ["self"]
    assert reports["none"]["importance"] is None
    assert not list((tmp_path / "none").glob("*-imatrix.gguf"))
    loss = {name: report["variants"][0]["evaluation"]["metrics"]["kld"]["mean"] for name, report in reports.items()}
    assert loss["a"] < loss["none"]
    # the matrix that was kept makes the same file
    run("quantize", checkpoint_dir(), "--recipe", "q4_0", "--imatrix", matrix, "-o", tmp_path / "q.gguf", "--quiet")
    assert (tmp_path / "q.gguf").read_bytes() == model.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["imatrix", "{model}", "-o", "{out}"], "--text"),
        (["imatrix", "{model}", "{model}", "--text", "{text}", "-o", "{out}"], "--merge"),
        (["imatrix", "--merge", "{model}", "-o", "{out}"], "not an importance matrix"),
        (["imatrix", "{model}", "--text", "{absent}", "-o", "{out}"], "cannot be read"),
        (["imatrix", "{model}", "--text", "{short}", "-o", "{out}"], "too few for one window"),
        (["make", "{source}", "-o", "{out}", "--text", "{text}", "--calibrate", "{text}"], "looks better than it is"),
        (["make", "{source}", "-o", "{out}", "--imatrix", "none", "--calibrate", "self"], "not both"),
    ],
)
def test_refusals(arguments: list[str], said: str, demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    places = {"model": demo_gguf("f32"), "out": tmp_path / "out", "text": TEXT, "source": checkpoint_dir()}
    places |= {"absent": tmp_path / "absent.txt", "short": tmp_path / "short.txt"}
    result = run(*(argument.format(**places) for argument in arguments), code=2)
    assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()

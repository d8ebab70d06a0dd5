"""Native code that dies under a command: what the user reads, and that nothing is lost or left behind.

The faults are made in the real library: a module that Python imports at its start wraps llama.cpp's functions.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, mtp_weights_for, text_config, weights_for
from gguf_maker import Parts, changed, put_together
from typer.testing import CliRunner

from pocketquant import open_recipe, plan, write
from pocketquant.cli.app import app
from pocketquant.convert.checkpoint import open_mtp
from pocketquant.convert.snapshot import local_snapshot
from pocketquant.errors import EvalError, SourceError
from pocketquant.llama.library import check_loadable
from pocketquant.model import Value
from pocketquant.release.planning import plan_release

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

RAISING = "import os, signal\nos.kill(os.getpid(), signal.{name})"
ABORTING = """
import ctypes
abort = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p)(("ggml_abort", llama_cpp.llama_cpp._lib))
abort(b"ggml.c", 7, b"GGML_ASSERT(tokens are odd) failed")
"""
HOOK = """
import llama_cpp

load = llama_cpp.llama_model_load_from_file

def faulty(path, params):
    if {condition}:
        exec({fault!r})
    return load(path, params)

llama_cpp.llama_model_load_from_file = llama_cpp.llama_cpp.llama_model_load_from_file = faulty
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run(*arguments, condition=, fault=)`: the command where loading a model is a fault under a condition."""

    def run_with(*arguments: object, condition: str, fault: str) -> subprocess.CompletedProcess[str]:
        hook = tmp_path / "hook"
        hook.mkdir(exist_ok=True)
        (hook / "sitecustomize.py").write_text(HOOK.format(condition=condition, fault=fault))
        places = [str(hook), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "pocketquant", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return run_with


def test_extra_kernels_that_die_are_done_without(run: Run, demo_gguf: Callable[[str], Path], demo_text: Path) -> None:
    command = ("eval", demo_gguf("q4_k_m"), "--reference", demo_gguf("f32"), "--text", demo_text, "--chunks", 1)
    done = run(*command, "--json", condition="params.use_extra_bufts", fault=RAISING.format(name="SIGILL"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("note: llama.cpp's extra kernels fail on this machine (SIGILL in a trial run)") == 1
    versions = json.loads(done.stdout)["provenance"]["versions"]
    assert versions["llama_cpp_kernels"] == "CPU"
    doctor = run("doctor", condition="params.use_extra_bufts", fault=RAISING.format(name="SIGILL"))
    assert doctor.returncode == 0
    assert "extra kernels fail: SIGILL in a trial run" in doctor.stdout


def test_a_library_that_dies_whatever_it_does_is_refused(
    run: Run, tmp_path: Path, demo_gguf: Callable[[str], Path], demo_text: Path
) -> None:
    command = ("imatrix", demo_gguf("q4_k_m"), "--text", demo_text, "--out", tmp_path / "out.gguf")
    done = run(*command, condition="True", fault=RAISING.format(name="SIGILL"))
    assert done.returncode == 2
    assert "does not run on this machine (SIGILL in a trial run); build it here: pip install" in done.stderr
    doctor = run("doctor", "--json", condition="True", fault=RAISING.format(name="SIGILL"))
    assert doctor.returncode == 1
    parts = {part["name"]: part for part in json.loads(doctor.stdout)["parts"]}
    assert parts["llama.cpp"]["status"] == "fail"
    assert parts["llama.cpp"]["remedy"].startswith("build it on this machine: pip install")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (RAISING.format(name="SIGILL"), "stopped by SIGILL (an instruction that this processor does not have"),
        (RAISING.format(name="SIGSEGV"), "stopped by SIGSEGV (a fault in native code)"),
        (RAISING.format(name="SIGKILL"), "stopped by SIGKILL (from outside; most often the system does this when"),
        (ABORTING, "it said: ggml.c:7: GGML_ASSERT(tokens are odd) failed"),
    ],
)
def test_what_died_is_named_and_the_old_output_stays(
    fault: str, words: str, run: Run, tmp_path: Path, demo_gguf: Callable[[str], Path], demo_text: Path
) -> None:
    model, out = demo_gguf("q4_k_m"), tmp_path / "out.gguf"
    out.write_text("old")
    done = run(
        "imatrix", model, "--text", demo_text, "--out", out, condition=f"{model.name!r}.encode() in path", fault=fault
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert f"while llama.cpp was loading {model}" in done.stderr
    assert "nothing was replaced" in done.stderr
    assert "Traceback" not in done.stderr
    assert out.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} <= {"out.gguf", "hook", "cache"}


@pytest.mark.parametrize("code", [0, 1, 70])
def test_native_code_that_ends_the_process_itself_is_no_end_of_the_command(
    code: int, run: Run, tmp_path: Path, demo_gguf: Callable[[str], Path], demo_text: Path
) -> None:
    model, out = demo_gguf("q4_k_m"), tmp_path / "out.gguf"
    command = ("imatrix", model, "--text", demo_text, "--out", out, "--json")
    done = run(*command, condition=f"{model.name!r}.encode() in path", fault=f"import os\nos._exit({code})")
    assert done.returncode == 2
    assert f"stopped by native code, which ended the process with code {code}" in done.stderr
    error = json.loads(done.stdout)
    assert (error["schema"], error["error"]["exit_code"]) == ("pocketquant.error/1", 2)
    assert not out.exists()


def test_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    from pocketquant.demo import checkpoint_dir

    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "pocketquant", "make", str(checkpoint_dir()), "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.gguf*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "stopped by SIGKILL" in talk
    assert not list(tmp_path.rglob("*.partial"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != ".making"]


def test_the_worker_dies_with_the_command(tmp_path: Path) -> None:
    from pocketquant.demo import checkpoint_dir

    process = subprocess.Popen(
        [sys.executable, "-m", "pocketquant", "make", str(checkpoint_dir()), "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.gguf*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=10)  # the worker holds the other end of stderr


def test_memory_that_runs_out_is_said(tmp_path: Path, demo_gguf: Callable[[str], Path], demo_text: Path) -> None:
    model = demo_gguf("q4_k_m")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (900 << 20, 900 << 20))

    command = [sys.executable, "-m", "pocketquant", "eval", model, "--reference", demo_gguf("f32"), "--text", demo_text]
    done = subprocess.run(
        [*command, "--context", "4096", "--chunks", "1"],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert any(word in done.stderr for word in ("memory", "cannot set up a context", "ulimit -v"))
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["mtp", "imatrix", "mmproj", "adapter"])
def test_what_is_no_text_model_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    metadata = {"general.architecture": Value("str", "qwen35")}
    metadata |= (
        {"qwen35.nextn_predict_layers": Value("u32", 1)} if kind == "mtp" else {"general.type": Value("str", kind)}
    )
    path = put_together(tmp_path / "x.gguf", metadata, {"blk.4.nextn.eh_proj.weight": (np.ones((4, 8)), "F32")})
    with pytest.raises(EvalError, match="not run by itself"):
        check_loadable(path)


def test_a_source_that_is_not_run_is_named_itself(tmp_path: Path) -> None:
    """Not by the name of the copy that a command makes of it to run."""
    config = {"mtp_num_hidden_layers": 1}
    weights = weights_for(text_config(**config)) | mtp_weights_for(text_config(**config))
    block = open_mtp(local_snapshot(make_checkpoint(tmp_path / "c", weights=weights, **config)))
    assert block is not None
    path = tmp_path / "mtp-c.gguf"
    write(plan(block, open_recipe("bf16")), path)
    with pytest.raises(EvalError, match=rf"^{re.escape(str(path))}: only a multi-token-prediction block"):
        plan_release(path)
    (tmp_path / "text.txt").write_text("some words " * 100)
    words = ["sensitivity", str(path), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "o.toml")]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, EvalError) or f"error: {path}: only a multi" in result.stderr
    assert str(path) in (result.stderr + str(result.exception))
    assert sorted(found.name for found in tmp_path.iterdir()) == ["c", "mtp-c.gguf", "text.txt"]


def test_tokens_that_stand_twice_are_refused(tmp_path: Path, demo_gguf: Callable[[str], Path]) -> None:
    def repeat(parts: Parts) -> None:
        tokens = parts.metadata["tokenizer.ggml.tokens"].value
        parts.metadata["tokenizer.ggml.tokens"] = Value("str[]", [*tokens[:-1], tokens[7]])

    path = changed(demo_gguf("q4_k_m"), tmp_path / "twice.gguf", repeat)
    with pytest.raises(SourceError, match="1 tokens stand twice in its vocabulary"):
        check_loadable(path)

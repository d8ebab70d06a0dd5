"""The trial of llama.cpp's kernels: what each way to end says, and what is remembered."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest

from pocketquant.architectures import architecture_named
from pocketquant.errors import EvalError, PocketquantWarning
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.llama import trial
from pocketquant.llama.buffers import BufferNames
from pocketquant.llama.tiny import tiny_gguf

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

LOADED = {"stage": "loaded"}
PLAIN = {"stage": "plain", "model": "qwen35"}
EXTRA = {"stage": "extra", "model": "qwen35", "kernels": ["AMX", "CPU"], "difference": 0.007, "where": "node_3"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def a_child(*stages: dict[str, object], end: str = "") -> tuple[str, ...]:
    """A process that reaches these stages and then does `end`."""
    said = "\n".join(json.dumps(stage) for stage in stages)
    return sys.executable, "-c", f"import os, signal, sys\nprint({said!r}, flush=True)\n{end}"


def dies_of(name: str) -> str:
    return f"os.kill(os.getpid(), signal.{name})"


def test_this_machine_is_tried_and_then_remembered() -> None:
    assert trial.remembered() is None
    found = trial.renew()
    assert found.runs
    assert found.use_extra or found.reason
    assert trial.remembered() == found


@pytest.mark.parametrize("signal", ["SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE"])
def test_death_in_the_extra_kernels_takes_the_plain_ones_for_good(signal: str) -> None:
    found = trial.renew(a_child(LOADED, PLAIN, end=dies_of(signal)))
    assert (found.runs, found.use_extra, found.is_lasting) == (True, False, True)
    assert found.reason == f"{signal} in a trial run"
    assert trial.remembered() == found


@pytest.mark.parametrize("stages", [(), (LOADED,), (LOADED, PLAIN, EXTRA)])
def test_death_in_the_plain_kernels_runs_nothing(stages: tuple[dict[str, object], ...]) -> None:
    assert not trial.renew(a_child(*stages, end=dies_of("SIGILL"))).runs


def test_kernels_that_compute_something_else_are_not_used() -> None:
    found = trial.renew(a_child(LOADED, PLAIN, EXTRA | {"difference": 0.4}))
    assert (found.runs, found.use_extra) == (True, False)
    assert "AMX" in found.reason
    assert "node_3" in found.reason


@pytest.mark.parametrize("end", [dies_of("SIGKILL"), dies_of("SIGABRT"), "sys.exit('no memory')"])
def test_what_the_state_of_the_machine_may_have_done_is_not_remembered(end: str) -> None:
    found = trial.renew(a_child(LOADED, PLAIN, end=end))
    assert (found.runs, found.use_extra, found.is_lasting) == (True, False, False)
    assert trial.remembered() is None


def test_a_child_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_SECONDS", 0.5)
    found = trial.renew(a_child(LOADED, PLAIN, end="import time; time.sleep(60)"))
    assert (found.runs, found.use_extra, found.is_lasting) == (True, False, False)


@pytest.mark.parametrize("record", [b"", b"[]", b"{", b'{"runs": 1}', b"[" * 10_000, b"\xff", b"x" * 100_000])
def test_a_broken_record_is_none(record: bytes) -> None:
    path = trial.record_path()
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_bytes(record)
    assert trial.remembered() is None


def test_a_cache_that_cannot_be_written_is_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert trial.renew(a_child(LOADED, PLAIN, EXTRA)).use_extra
    assert trial.remembered() is None


def test_what_was_found_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_COMMAND", ())
    trial.renew(a_child(LOADED, PLAIN, end=dies_of("SIGILL")))
    trial.trusted.cache_clear()
    try:
        with pytest.warns(PocketquantWarning, match="extra kernels fail on this machine \\(SIGILL"):
            assert not trial.trusted().use_extra
        trial.renew(a_child(LOADED, end=dies_of("SIGILL")))
        trial.trusted.cache_clear()
        with warnings.catch_warnings(), pytest.raises(EvalError, match="does not run on this machine"):
            trial.trusted()
    finally:
        trial.trusted.cache_clear()


@pytest.mark.parametrize("name", ["qwen35", "qwen35moe"])
def test_the_tiny_model_has_every_format_and_kind_of_block(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_gguf(architecture_named(name)))
    model = open_gguf(path)
    kinds = {tensor.dtype for tensor in model.tensors}
    assert {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "IQ4_XS", "F16", "BF16", "MXFP4"} <= kinds
    names = " ".join(tensor.name for tensor in model.tensors)
    assert "ssm_out" in names
    assert "attn_output" in names
    assert ("ffn_gate_exps" in names) == (name == "qwen35moe")


def test_buffers_are_read_from_the_log() -> None:
    names = BufferNames()
    for line in (
        b"load_tensors:   CPU_Mapped model buffer size =     2.31 MiB\n",
        b"load_tensors:          AMX model buffer size =     1.53 MiB\n",
        b"llama_kv_cache:        CPU KV buffer size =     0.25 MiB\n",
    ):
        names.read(line)
    assert names.found() == ["AMX", "CPU"]

"""Stdout that is full, closed, gone or cannot write a letter; signals at awkward moments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketquant.cli.options import Compute, Talk
from pocketquant.cli.tasks import Run
from pocketquant.errors import OutputError

COMMAND = [sys.executable, "-m", "pocketquant"]
SCRIPT = [str(Path(sys.executable).with_name("pocketquant"))]
INTERRUPTED = "error: interrupted; nothing was replaced\nnothing of this run is kept; the same command starts it anew"
SLOW = """
import time
from pocketquant.cli import watching, main
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "pocketquant.cli.app":
            print("importing", flush=True)
            time.sleep(60)
import sys
sys.meta_path.insert(0, Finder())
main()
"""
STUBBORN = """
import sys, time
from pocketquant import cli
import pocketquant.cli.app as module
def app(args, prog_name):
    try:
        print("working", flush=True)
        time.sleep(60)
    except BaseException:
        print("tidying", flush=True)
        time.sleep(60)
module.app = app
cli.main()
"""


@pytest.fixture(scope="module")
def gguf(demo_gguf: Callable[[str], Path]) -> Path:
    return demo_gguf("q4_k_m")


@pytest.mark.parametrize("state", ["full", "closed"])
def test_a_result_that_stdout_cannot_take_is_kept(state: str, gguf: Path, tmp_path: Path) -> None:
    whole = subprocess.run([*COMMAND, "inspect", gguf, "--json"], capture_output=True, text=True, check=True).stdout
    to = ">/dev/full" if state == "full" else ">&-"
    script = f'exec "$@" {to}'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *COMMAND, "inspect", str(gguf), "--json"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    (kept,) = tmp_path.glob("pocketquant-result-*.json")
    assert done.returncode == 2
    assert f"the result is kept in {kept}" in done.stderr
    assert "Traceback" not in done.stderr
    assert kept.read_text() == whole


def test_a_report_that_cannot_be_put_in_its_place_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is gone once the work is done, or the disk is full."""

    class Report:
        def to_json(self) -> dict[str, object]:
            return {"schema": "pocketquant.smoke/1", "answers": ["ü"]}

    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"gone/x\.json: cannot be written: .*; the report is kept in ") as caught:
        Run(Compute(), Talk(), out=tmp_path / "gone" / "x.json").keep(Report())
    (kept,) = tmp_path.glob("pocketquant-result-*.json")
    assert str(caught.value).endswith(str(kept))
    assert json.loads(kept.read_text())["answers"] == ["ü"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_talk_that_stderr_cannot_take_stops_nothing(gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "quantize", gguf, "--out", out, "--recipe", "q4_k_m", "--json"], stderr=full)
    assert done.returncode == 0
    assert out.exists()


@pytest.mark.parametrize("arguments", [("inspect", "--json"), ("inspect",), ("--help",)])
def test_a_reader_that_goes_away_gives_141(arguments: tuple[str, ...], gguf: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [*COMMAND, *arguments, *([gguf] if "inspect" in arguments else [])]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_encoding_gives_whole_json(encoding: str, gguf: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([*COMMAND, "inspect", gguf, "--json"], capture_output=True, env=environment, check=True)
    tokens = json.loads(done.stdout.decode(encoding))["metadata"]
    expected = subprocess.run([*COMMAND, "inspect", gguf, "--json"], capture_output=True, check=True)
    assert tokens == json.loads(expected.stdout)["metadata"]
    plain = subprocess.run([*COMMAND, "inspect", gguf], capture_output=True, env=environment)
    assert plain.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_modules_are_imported_is_no_traceback(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    _, talk = process.communicate(timeout=20)
    assert process.returncode == 130
    assert talk.strip() == INTERRUPTED


def test_a_second_interrupt_ends_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"working\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"tidying\n"
    process.send_signal(signal.SIGINT)  # the same one, as a terminal and the watcher both send it
    time.sleep(1.2)
    assert process.poll() is None
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - started < 1
    assert b"Traceback" not in talk


@pytest.mark.parametrize("command", [COMMAND, SCRIPT], ids=["module", "script"])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_from_outside_stays_so(number: signal.Signals, command: list[str], gguf: Path) -> None:
    script = f"trap '' {number.name.removeprefix('SIG')}; exec \"$@\""
    process = subprocess.Popen(
        ["sh", "-c", script, "sh", *command, "inspect", str(gguf), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for _ in range(5):
        time.sleep(0.1)
        process.send_signal(number)
    out, talk = process.communicate(timeout=60)
    assert process.returncode == 0, talk
    assert json.loads(out)["metadata"]


def test_a_terminal_that_is_closed_interrupts() -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGHUP)
    _, talk = process.communicate(timeout=20)
    assert (process.returncode, talk.strip()) == (130, INTERRUPTED)


def test_help_that_stdout_cannot_take_is_no_traceback(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_kernels_that_can_be_kept_nowhere_are_compiled_for_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pocketquant import cli

    monkeypatch.setattr(cli.os, "access", lambda path, mode: False)
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(cli.os, "environ", dict(os.environ))
    cli._keep_kernels_somewhere()
    folder = Path(cli.os.environ["NUMBA_CACHE_DIR"])
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_fault_of_the_program_has_its_own_code_and_no_traceback() -> None:
    code = "import sys, pocketquant.cli.app as m\nm.app = lambda **_: 1 / 0\nfrom pocketquant.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 70
    assert "ZeroDivisionError" in done.stderr
    assert "Traceback" not in done.stderr
    debug = subprocess.run([sys.executable, "-c", code, "--debug"], capture_output=True, text=True)
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr

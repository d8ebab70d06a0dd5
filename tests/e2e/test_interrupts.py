"""Runs that are interrupted, killed, or started twice: what was there stays, and what is done is kept."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketquant.demo import checkpoint_dir, text_path
from pocketquant.errors import OutputError
from pocketquant.files.leftovers import holding, work_folder

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and locks are POSIX's")

COMMAND = str(Path(sys.executable).with_name("pocketquant"))
TEXT = text_path("calibration")
SMALL = ["--context", "64", "--chunks", "6"]
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result


def run_until(
    what: str, call: int, number: signal.Signals, *arguments: object, code: int = 130
) -> subprocess.CompletedProcess[str]:
    """Runs a command that signals itself at the given call of `module:function` or `module:Class.method`."""
    module, _, path = what.partition(":")
    owner, _, name = f"{module}.{path}".rpartition(".")
    program = (
        f"import os, sys, {module}, pocketquant.cli\n"
        "calls = 0\n"
        f"original = {owner}.{name}\n"
        "def counted(*args, **kwargs):\n"
        "    global calls\n"
        "    calls += 1\n"
        f"    if calls == {call}: os.kill(os.getpid(), {int(number)})\n"
        "    return original(*args, **kwargs)\n"
        f"{owner}.{name} = counted\n"
        f"sys.argv = {['pocketquant', *map(str, arguments)]!r}\n"
        "pocketquant.cli.main()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("number", SIGNALS)
def test_imatrix_keeps_the_old_matrix_and_what_is_done(
    number: signal.Signals, demo_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    """The signal comes within a callback of llama.cpp, in the third of six windows."""
    out, model = tmp_path / "m.gguf", demo_gguf("f32")
    arguments = ["imatrix", model, "--text", TEXT, *SMALL, "--out", out]
    run(*arguments)
    whole = out.read_bytes()
    out.write_bytes(b"good")
    early = run_until("pocketquant.llama.observing:InputSums.add", 12, number, *arguments)
    assert "nothing of this run is kept; the same command starts it anew" in early.stderr
    assert names(tmp_path) == ["m.gguf"]
    interrupted = run_until("pocketquant.llama.observing:InputSums.add", 2 * 31 + 12, number, *arguments)
    assert out.read_bytes() == b"good"
    assert names(tmp_path) == [".m.gguf.unfinished", "m.gguf"]
    killed = run_until("pocketquant.llama.observing:InputSums.add", 5, signal.SIGKILL, *arguments, "--resume", code=2)
    for said in (interrupted.stderr, killed.stderr):
        assert f"finished windows are kept in {tmp_path}/.m.gguf.unfinished; the same command with --resume" in said
    assert names(tmp_path) == [".m.gguf.unfinished", "m.gguf"]
    run(*arguments, "--resume")
    assert out.read_bytes() == whole
    assert names(tmp_path) == ["m.gguf"]


def test_a_run_in_the_background_of_a_script_ends_when_asked_to(
    demo_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    """A shell has what a script starts with `&` ignore SIGINT; SIGTERM comes within an import, and waits for it."""
    arguments = ["imatrix", demo_gguf("f32"), "--text", TEXT, "--context", 64, "--out", tmp_path / "m.gguf"]
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "import pocketquant.cli\n"
        "class Asking:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'pocketquant.cli.app': os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Asking())\n"
        f"sys.argv = {['pocketquant', *map(str, arguments)]!r}\n"
        "pocketquant.cli.main()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, names(tmp_path)) == (130, []), result.stderr


@pytest.mark.parametrize(("number", "options"), [(signal.SIGINT, []), (signal.SIGTERM, ["--top-k", 16])])
def test_a_reference_goes_on_with_whole_windows(
    number: signal.Signals, options: list[object], demo_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    """Interrupted in the first of six windows, the third and the fifth, and then within the file's own header."""
    out, model = tmp_path / "out", demo_gguf("f32")
    arguments = ["reference", model, "--text", TEXT, *SMALL, "--out", out, *options]
    run(*arguments)
    whole = out.read_bytes()
    out.write_bytes(b"good")
    add, left = "pocketquant.eval.packs.pack:PackWriter.add", [".out.state", ".out.unfinished", "out"]
    early = run_until(add, 2, number, *arguments)
    assert "nothing of this run is kept; the same command starts it anew" in early.stderr
    assert (out.read_bytes(), names(tmp_path)) == (b"good", ["out"])
    for where, call in ((add, 4), (add, 4), ("pocketquant.eval.packs.pack:PackWriter.finish", 1)):
        cut = run_until(where, call, number, *arguments, "--resume")
        assert f"finished windows are kept in {tmp_path}/.out.unfinished; the same command with --resume" in cut.stderr
        assert (out.read_bytes(), names(tmp_path)) == (b"good", left)
    assert "other settings (tokens)" in run(*arguments, "--resume", "--chunks", 5, code=2).stderr
    assert (out.read_bytes(), names(tmp_path)) == (b"good", left)
    run(*arguments, "--resume")
    assert out.read_bytes() == whole
    assert names(tmp_path) == ["out"]


def test_rows_that_are_not_those_that_were_saved_are_refused(demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    out, unfinished = tmp_path / "out", tmp_path / ".out.unfinished"
    arguments = ["reference", demo_gguf("f32"), "--text", TEXT, *SMALL, "--out", out]
    run_until("pocketquant.eval.packs.pack:PackWriter.add", 4, signal.SIGINT, *arguments)
    data = bytearray(unfinished.read_bytes())
    data[-1] ^= 1
    unfinished.write_bytes(data[:-9])
    assert "holds other rows than were saved" in run(*arguments, "--resume", code=2).stderr
    (tmp_path / ".out.state").write_text('{"run": {}}')
    assert "not the state of an unfinished reference pack" in run(*arguments, "--resume", code=2).stderr
    run(*arguments)
    assert names(tmp_path) == ["out"]


def test_calibrate_keeps_all_that_it_had_summed(demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    """Interrupted in the middle of a window's layers, twice, then of its logits, and when its sums are put in the file:
    each time the next run goes on from there, and the bytes are those of a run that was left alone."""
    out, model = tmp_path / "out", demo_gguf("f32")
    arguments = ["calibrate", model, "--text", TEXT, *SMALL, "--out", out, "--threads", 1]
    run(*arguments)
    whole = out.read_bytes()
    out.write_bytes(b"good")
    kept = f"what was done is kept in {tmp_path}/.out.state; the same command with --resume goes on from there"
    early = run_until("pocketquant.llama.runtime:open_runtime", 1, signal.SIGINT, *arguments)
    assert "nothing of this run is kept; the same command starts it anew" in early.stderr
    assert (out.read_bytes(), names(tmp_path)) == (b"good", ["out"])
    for number, (where, call) in enumerate(
        (
            ("pocketquant.calibration.hessian:HessianSums.add", 10),
            ("pocketquant.calibration.hessian:HessianSums.add", 40),
            ("pocketquant.calibration.hessian:_accumulate_softmax", 2),
            ("pocketquant.calibration.hessian:HeadSums.add_logits", 2),
            ("pocketquant.calibration.saved_sums:SavedSums.close_pass", 1),
        )
    ):
        cut = run_until(where, call, SIGNALS[number % 2], *arguments, *(["--resume"] if number else []))
        assert kept in cut.stderr
        assert (out.read_bytes(), names(tmp_path)) == (b"good", [".out.state", ".out.unfinished", "out"])
    run(*arguments, "--resume")
    assert out.read_bytes() == whole
    assert names(tmp_path) == ["out"]


def test_a_killed_run_leaves_no_model_for_good(tmp_path: Path) -> None:
    out = tmp_path / "m.stats"
    arguments = ["calibrate", checkpoint_dir(), "--text", TEXT, *SMALL, "--out", out]
    # with --debug there is no second process that would tidy up after the first
    run_until("pocketquant.calibration.hessian:HessianSums.add", 40, signal.SIGKILL, *arguments, "--debug", code=-9)
    assert len(list(tmp_path.glob(".m.stats.????????/source.gguf"))) == 1
    run(*arguments)
    assert names(tmp_path) == ["m.stats"]


def test_make_goes_on_with_what_is_finished(tmp_path: Path) -> None:
    """Interrupted when the first of two files is measured: it and the matrix stay, and all bytes are the same."""
    arguments = ["make", checkpoint_dir(), "--calibrate-chunks", 4, *SMALL, "--out"]
    run(*arguments, tmp_path / "whole")
    run_until("pocketquant.files.finished:Finished.keep", 3, signal.SIGINT, *arguments, tmp_path / "out")
    assert names(tmp_path / "out") == [".making"]
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/.making").glob("*.gguf")}
    assert sorted(kept) == ["pocket-demo-3.8M-POCKET_4BIT.gguf", "pocket-demo-3.8M-imatrix.gguf"]
    run(*arguments, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / folder).iterdir()}
        for folder in ("whole", "out")
    ]
    assert digests[0] == digests[1]


def test_make_that_is_killed_leaves_no_full_precision_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["make", checkpoint_dir(), "--recipe", "q8_0", "--calibrate-chunks", 2, *SMALL, "--out", out]
    killed = run_until("pocketquant.release.make:measure_variant", 1, signal.SIGKILL, *arguments, code=2)
    assert f"what is finished is kept in {out}/.making; the same command goes on from there" in killed.stderr
    assert names(out) == [".making"]
    assert {path.name for path in (out / ".making").glob("*.gguf")} == {
        "pocket-demo-3.8M-Q8_0.gguf",
        "pocket-demo-3.8M-imatrix.gguf",
    }
    assert "finished before" not in killed.stderr


def test_an_interrupted_sweep_names_results_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["sweep", checkpoint_dir(), "-r", "q8_0", "-r", "q4_0", "--imatrix", "none", *SMALL, "--out", out]
    early = run_until("pocketquant.release.sweep:write_variant", 1, signal.SIGINT, *arguments)
    assert "nothing of this run is kept; the same command starts it anew" in early.stderr
    assert names(tmp_path) == []
    interrupted = run_until("pocketquant.release.sweep:measure_variant", 2, signal.SIGINT, *arguments)
    assert f"nothing was replaced\nwhat is finished is kept in {out}/.sweep; the same command" in interrupted.stderr
    assert names(out) == [".sweep"]
    assert len(list((out / ".sweep").glob("*.json"))) == len(list((out / ".sweep").glob("*.gguf"))) == 1
    killed = run_until("pocketquant.release.sweep:write_reports", 1, signal.SIGKILL, *arguments, code=2)
    placed = killed.stderr.split("these were finished before: ")[1].splitlines()[0]
    assert sorted(placed.split(", ")) == [str(path) for path in sorted(out.glob("*.gguf"))]


def test_a_full_disk_leaves_no_folder_behind(tmp_path: Path) -> None:
    program = (
        "import collections, shutil, sys, pocketquant.cli\n"
        "shutil.disk_usage = lambda path: collections.namedtuple('Usage', 'total used free')(9, 9, 0)\n"
        "pocketquant.cli.main()\n"
    )
    for command in ("sweep", "make"):
        arguments = [command, checkpoint_dir(), "-r", "q8_0", "--imatrix", "none", "--out", tmp_path / "out"]
        done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
        assert (done.returncode, names(tmp_path)) == (2, []), done.stderr
        assert "bytes of disk" in done.stderr


@pytest.mark.parametrize(("command", "name"), [("make", ".making"), ("sweep", ".sweep")])
def test_a_file_where_the_hidden_folder_goes_is_named(command: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"mine")
    result = run(command, checkpoint_dir(), "-r", "q8_0", "--imatrix", "none", *SMALL, "--out", tmp_path, code=2)
    assert f"{tmp_path}/{name}: is not a folder" in result.stderr
    assert (names(tmp_path), (tmp_path / name).read_bytes()) == ([name], b"mine")


def test_make_takes_nothing_up_that_was_made_otherwise(tmp_path: Path) -> None:
    arguments = ["make", checkpoint_dir(), "--recipe", "q8_0", "--imatrix", "none", *SMALL]
    run_until("pocketquant.release.measuring:write_reports", 1, signal.SIGINT, *arguments, "--out", tmp_path / "out")
    (file,) = (tmp_path / "out/.making").glob("*.gguf")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)  # not what was measured
    run(*arguments, "--out", tmp_path / "out")
    run(*arguments, "--out", tmp_path / "whole")
    for name in names(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("command", ["calibrate", "imatrix", "reference", "sweep", "make"])
def test_a_second_run_with_the_same_out_is_refused_at_once(
    command: str, demo_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    out, model = tmp_path / "out", demo_gguf("f32")
    held = {
        "imatrix": tmp_path / ".out.unfinished",
        "reference": tmp_path / ".out.unfinished",
        "sweep": out / ".sweep",
        "make": out / ".making",
    }.get(command, out)
    more = {
        "imatrix": ["--text", TEXT],
        "reference": ["--text", TEXT],
        "sweep": ["-r", "q8_0", "--imatrix", "none"],
    }.get(command, [])
    held.parent.mkdir(exist_ok=True)
    with holding(held):
        before = names(held.parent)
        result = run(command, model, *more, "--out", out, code=2)
        assert f"another run (process {os.getpid()})" in result.stderr.replace("\n", " ")
        assert [name for name in names(held.parent) if name not in (".sweep", ".making")] == before
    assert [name for name in names(held.parent) if name not in (".sweep", ".making")] == []


def test_a_lock_that_a_killed_run_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text("123456")
    with holding(tmp_path / "out"), pytest.raises(OutputError, match="another run"), holding(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupt_just_behind_a_temporary_files_making_leaves_none(number: signal.Signals, tmp_path: Path) -> None:
    program = (
        "import os, sys, tempfile, pocketquant.cli\n"
        "original = tempfile.mkstemp\n"
        "def make(*args, **kwargs):\n"
        "    found = original(*args, **kwargs)\n"
        f"    if kwargs.get('suffix') == '.partial': os.kill(os.getpid(), {int(number)})\n"
        "    return found\n"
        "tempfile.mkstemp = make\n"
        f"sys.argv = ['pocketquant', 'quantize', {str(checkpoint_dir())!r}, '-r', 'q8_0', '-o', 'm.gguf']\n"
        "pocketquant.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, names(tmp_path)) == (130, []), done.stderr


def test_a_work_folder_goes_whatever_happens(tmp_path: Path) -> None:
    def fail_in_one() -> None:
        with work_folder(tmp_path / "out") as folder:
            (folder / "deep").mkdir()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in_one()
    assert names(tmp_path) == []


def test_calibrate_follows_a_link_to_another_disk(demo_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system to link to")
    target = elsewhere / f"pocketquant-{os.getpid()}.stats"
    (tmp_path / "m.stats").symlink_to(target)
    try:
        run("calibrate", demo_gguf("f32"), "--text", TEXT, *SMALL, "--out", tmp_path / "m.stats")
        assert target.stat().st_size > 0
        assert (tmp_path / "m.stats").is_symlink()
        assert names(tmp_path) == ["m.stats"]
    finally:
        target.unlink(missing_ok=True)


def test_two_outputs_at_one_place_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("{}")
    result = run("report", tmp_path / "r.json", "--out", tmp_path / "a", "--markdown", tmp_path / "a", code=2)
    assert "two outputs would take one place" in result.stderr
    assert names(tmp_path) == ["r.json"]

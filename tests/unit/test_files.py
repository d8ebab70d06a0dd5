"""Outputs: replaced whole or not at all, never over an input or a device, and nothing is left behind for good."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocketquant.errors import OutputError
from pocketquant.files.interrupts import files_in_place, put_in_place, signals_held
from pocketquant.files.leftovers import FOLDER_LOCK, make_held_file, remove_leftovers
from pocketquant.files.replacing import check_target, refuse_overwriting, replacing, replacing_together

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="no flock and no FIFOs there")


class Stopped(BaseException):
    """What the handlers in these tests raise."""


@pytest.fixture
def stopping() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Stopped`, as the command's handlers raise an exception of theirs."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(targets: list[Path]) -> None:
    """Begins to replace them, and fails."""
    with replacing_together(targets) as temporaries:
        temporaries[0].write_text("half")
        raise ZeroDivisionError


# ---------------------------------------------------------------- replaced whole


def test_a_block_that_fails_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    target.write_text("good")
    with pytest.raises(ZeroDivisionError):
        write_half([target])
    assert (names(tmp_path), target.read_text()) == (["model.gguf"], "good")


def test_several_targets_move_together_or_not_at_all(tmp_path: Path) -> None:
    targets = [tmp_path / name for name in "abc"]
    for target in targets:
        target.write_text("old")
    with pytest.raises(ZeroDivisionError):
        write_half(targets)
    assert [target.read_text() for target in targets] == ["old"] * 3
    with replacing_together(targets) as temporaries:
        for i, temporary in enumerate(temporaries):
            temporary.write_text(f"new {i}")
        assert [target.read_text() for target in targets] == ["old"] * 3
    assert [target.read_text() for target in targets] == ["new 0", "new 1", "new 2"]
    assert names(tmp_path) == ["a", "b", "c"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with replacing(tmp_path / "made") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_until_every_file_is_in_place(number: signal.Signals, tmp_path: Path, stopping: None) -> None:
    for name in "abc":
        (tmp_path / name).write_text("old")
        (tmp_path / f"new {name}").write_text("new")

    def moves() -> Iterator[tuple[Path, Path]]:
        for name in "abc":
            yield tmp_path / f"new {name}", tmp_path / name
            signal.raise_signal(number)

    with pytest.raises(Stopped, match=number.name):
        put_in_place(moves())
    assert [(tmp_path / name).read_text() for name in "abc"] == ["new"] * 3
    assert [path.name for path in files_in_place() if path.parent == tmp_path] == ["a", "b", "c"]
    with pytest.raises(Stopped):  # and the handlers are back
        signal.raise_signal(number)


def test_a_signal_in_the_block_still_stops_it(tmp_path: Path, stopping: None) -> None:
    def write() -> None:
        with replacing_together([tmp_path / "a", tmp_path / "b"]) as temporaries:
            temporaries[0].write_text("new")
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the block went on")

    with pytest.raises(Stopped):
        write()
    assert names(tmp_path) == []


def test_an_error_outlives_a_held_signal_only_as_its_context(stopping: None) -> None:
    def fail() -> None:
        with signals_held():
            signal.raise_signal(signal.SIGTERM)
            raise KeyError("why it failed")

    with pytest.raises(Stopped) as caught:
        fail()
    assert isinstance(caught.value.__context__, KeyError)


def test_other_threads_have_no_signals_to_hold(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("new")
    thread = threading.Thread(target=put_in_place, args=([(tmp_path / "new", tmp_path / "a")],))
    thread.start()
    thread.join()
    assert names(tmp_path) == ["a"]


def test_a_rename_that_fails_says_what_was_replaced_before(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).write_text(name)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    moves = [(tmp_path / "x", tmp_path / "a"), (tmp_path / "y", tmp_path / "full")]
    with pytest.raises(OutputError, match=r"full: cannot be written: .*; these were replaced before:\n  .*/a$"):
        put_in_place(moves)
    assert (tmp_path / "a").read_text() == "x"


# ---------------------------------------------------------------- what stands there


@posix_only
def test_what_is_no_regular_file_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        for name in ("pipe", "folder", "link", "s", "/dev/null"):
            with pytest.raises(OutputError, match=r"is a folder|is a device or a pipe"), replacing(tmp_path / name):
                pytest.fail("the block ran")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert names(tmp_path) == ["folder", "link", "pipe", "s"]


@posix_only
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/model").write_text("old")
    for link, leads_to in (("link", "elsewhere/model"), ("dangling", "elsewhere/new")):
        (tmp_path / link).symlink_to(leads_to)
        with replacing(tmp_path / link) as temporary:
            assert temporary.parent == (tmp_path / "elsewhere").resolve()
            temporary.write_text(f"by {link}")
        assert os.readlink(tmp_path / link) == leads_to
    assert (tmp_path / "elsewhere/model").read_text() == "by link"
    assert (tmp_path / "elsewhere/new").read_text() == "by dangling"
    assert names(tmp_path / "elsewhere") == ["model", "new"]


def test_an_output_in_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="missing"), replacing(tmp_path / "missing/model.gguf"):
        pytest.fail("the block ran")


# ---------------------------------------------------------------- outputs and inputs


def test_an_output_over_an_input_is_refused_under_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.gguf", "b.gguf", "text.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link.gguf").symlink_to("a.gguf")
    (tmp_path / "hard.gguf").hardlink_to(tmp_path / "a.gguf")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    inputs = ["a.gguf", tmp_path / "text.txt", None, "self", "org/name", "no\0name", "x" * 5000]
    for name in ("a.gguf", "./sub/../a.gguf", "link.gguf", "hard.gguf", "text.txt"):
        with pytest.raises(OutputError, match="would replace what it is made from"):
            refuse_overwriting([Path(name)], inputs)
    with pytest.raises(OutputError, match=r"\n  link\.gguf is a\.gguf\n  .*text\.txt"):
        refuse_overwriting([Path("link.gguf"), Path("b.gguf"), Path("text.txt")], inputs)
    refuse_overwriting([Path("b.gguf"), Path("new.gguf")], inputs)
    assert (tmp_path / "a.gguf").read_text() == "a.gguf"


def test_a_folder_is_what_it_is_read_for_and_a_shard_all_of_its_set(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    (folder / "additional_chat_templates").mkdir(parents=True)
    read = ["model.safetensors", "config.json", "tokenizer.json", "additional_chat_templates/tools.jinja", "README.md"]
    for name in [*read, "old-Q8_0.gguf", "report.json", "report.md"]:
        (folder / name).write_text(name)
    for source in (folder, folder / "model.safetensors"):
        for name in read:
            with pytest.raises(OutputError, match=name):
                refuse_overwriting([folder / name], [source])
        refuse_overwriting([folder / name for name in ("old-Q8_0.gguf", "report.json", "report.md")], [source])
    (folder / "other.safetensors").write_text("")  # statistics, say
    refuse_overwriting([folder / "other.safetensors"], [folder / "model.safetensors"])
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "n-00001-of-00002.gguf"):
        (tmp_path / name).write_text(name)
    with pytest.raises(OutputError, match="m-00002-of-00002"):
        refuse_overwriting([tmp_path / "m-00002-of-00002.gguf"], [tmp_path / "m-00001-of-00002.gguf"])
    refuse_overwriting([tmp_path / "n-00001-of-00002.gguf"], [tmp_path / "m-00001-of-00002.gguf"])


def test_check_target_follows_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    assert check_target(tmp_path / "link") == (tmp_path / "file").resolve()


# ---------------------------------------------------------------- what killed runs left behind

HOLDING = """
import sys
from pathlib import Path
from pocketquant.files.replacing import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("holding", flush=True)
    sys.stdin.read()
"""


@posix_only
def test_a_killed_runs_file_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    command = [sys.executable, "-c", HOLDING, str(target)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holding\n"
    killed, living = processes
    assert len(names(tmp_path)) == 2
    killed.kill()
    killed.communicate()
    assert len(names(tmp_path)) == 2
    with replacing(target) as temporary:
        assert len(names(tmp_path)) == 2  # the living one's and this
        temporary.write_text("mine")
    assert len(names(tmp_path)) == 2
    living.communicate(b"")
    assert living.returncode == 0
    assert (names(tmp_path), target.read_text()) == (["model.gguf"], "half")


@posix_only
def test_only_leftovers_of_that_name_go(tmp_path: Path) -> None:
    others = [
        ".a.gguf.abcdefgh.partial",
        ".a.abcdefgh.partial.gguf",
        ".a.abc.partial",
        "a.abcdefgh.partial",
        ".a.unfinished",
    ]
    for name in [*others, ".a.abcdefgh.partial"]:
        (tmp_path / name).write_text("")
    (tmp_path / ".a.bcdefghi.partial").symlink_to("elsewhere")
    (tmp_path / ".a.cdefghij.partial").mkdir()
    os.mkfifo(tmp_path / ".a.defghijk.partial")
    remove_leftovers(tmp_path, ".a.", ".partial")
    assert names(tmp_path) == sorted(
        [*others, ".a.bcdefghi.partial", ".a.cdefghij.partial", ".a.defghijk.partial"],
    )
    remove_leftovers(tmp_path / "missing", ".a.", ".partial")


@posix_only
def test_a_folder_goes_with_the_lock_that_stands_for_it(tmp_path: Path) -> None:
    lock, descriptor = make_held_file(tmp_path, ".making-", FOLDER_LOCK)
    assert descriptor is not None
    folder = lock.with_suffix("")
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/file").write_text("")
    (tmp_path / ".making-mine").mkdir()
    remove_leftovers(tmp_path, ".making-", FOLDER_LOCK)
    assert (folder / "deep/file").exists()
    os.close(descriptor)
    remove_leftovers(tmp_path, ".making-", FOLDER_LOCK)
    assert names(tmp_path) == [".making-mine"]


@posix_only
def test_many_runs_at_once_take_nothing_from_each_other(tmp_path: Path) -> None:
    """Every thread opens files of its own, so they lock each other out as processes do."""
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for n in range(40):
                with replacing(tmp_path / "same") as temporary:
                    temporary.write_text(f"{i} {n}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert names(tmp_path) == ["same"]

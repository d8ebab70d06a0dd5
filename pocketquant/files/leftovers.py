"""Locks tell the temporary files of a killed process from those in use, and keep two runs from sharing their work.

A process holds the lock of each of its temporary files (flock(2)). The system drops it when the process ends, however
it ends, so a file whose lock can be had is nobody's. Where there are no such locks, as on Windows, nothing is removed,
and nothing keeps a second run away.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pocketquant.activity import note_held, note_lock
from pocketquant.errors import OutputError
from pocketquant.files.interrupts import signals_held

if sys.platform != "win32":
    import fcntl

_LONGEST_NAME = 255
"""Bytes of a file's name, on all file systems that matter."""
_RANDOM = 8
"""Letters that `tempfile` puts into a name."""

FOLDER_LOCK = ".lock"
"""Ending of a file that stands for the folder beside it, `NAME.lock` for `NAME`."""


def hidden_name(name: str, ending: str) -> str:
    """`.NAMEending` for what lies beside NAME meanwhile; a name too long for that is cut, and told by a digest."""
    room = _LONGEST_NAME - len(os.fsencode(ending)) - 1
    raw = os.fsencode(name)
    if len(raw) > room:
        mark = f"~{hashlib.sha256(raw).hexdigest()[:16]}"
        name = raw[: room - len(mark)].decode("utf-8", "ignore") + mark
    return f".{name}{ending}"


def hidden_prefix(name: str, suffix: str) -> str:
    """The same for names that end in random letters and `suffix`: what they begin with."""
    ending = f".{'x' * _RANDOM}{suffix}"
    return hidden_name(name, ending)[: -len(ending)] + "."


@contextmanager
def holding(place: Path) -> Iterator[None]:
    """Keeps other runs away from a file or folder, or from what lies beside it meanwhile, while the block runs.

    The lock is a file `.NAME.lock` beside `place`, gone afterwards; one that a killed run left is taken over.

    Raises:
        OutputError: another run holds it, or the folder is missing or cannot be written.
    """
    if sys.platform == "win32":
        yield
        return
    path = place.with_name(hidden_name(place.name.lstrip("."), FOLDER_LOCK))
    note_lock(path)  # first: an interrupt may come as soon as it is there
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise OutputError(f"{place}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(descriptor, 20).decode(errors="replace")
            os.close(descriptor)
            raise OutputError(
                f"{place}: another run (process {who}) works on it; wait for its end, or write elsewhere"
            ) from None
        except OSError:  # a file system without locks
            break
        if _is_at(path, descriptor):
            break
        os.close(descriptor)  # between the two calls another run ended, and removed it
    try:
        with suppress(OSError):  # a full disk: the lock is held all the same
            os.truncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def work_folder(beside: Path) -> Iterator[Path]:
    """A hidden folder `.NAME.xxxxxxxx` beside an output, gone when the block ends; those of killed runs go first.

    Raises:
        OutputError: the folder is missing or cannot be written.
    """
    prefix = hidden_prefix(beside.name, FOLDER_LOCK)
    remove_leftovers(beside.parent, prefix, FOLDER_LOCK)
    try:
        lock, descriptor = make_held_file(beside.parent, prefix, FOLDER_LOCK)
    except OSError as error:
        raise OutputError(f"{beside}: cannot be written: {error.strerror}") from error
    folder = lock.with_suffix("")
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)


def make_held_file(folder: Path, prefix: str, suffix: str) -> tuple[Path, int | None]:
    """Makes an empty file PREFIXxxxxxxxxSUFFIX and holds its lock until the descriptor is closed.

    Returns:
        Its path, and the descriptor; None where an open file could not be renamed.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    while True:
        with signals_held():  # between the two nobody knows of the file
            descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=folder)
            path = Path(name)
            note_held(path)
        if sys.platform == "win32":
            os.close(descriptor)
            return path, None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: `remove_leftovers` gets none there, either
            return path, descriptor
        if _is_at(path, descriptor):
            return path, descriptor
        os.close(descriptor)  # between the two calls another process took it for a leftover


def remove_leftovers(folder: Path, prefix: str, suffix: str) -> None:
    """Removes files of `make_held_file` that no living process holds, with the folders that `.lock` files stand for.

    What cannot be looked at or removed stays: it is in nobody's way.
    """
    if sys.platform == "win32":
        return
    pattern = re.compile(rf"{re.escape(prefix)}[a-z0-9_]{{{_RANDOM}}}{re.escape(suffix)}")
    try:
        with os.scandir(folder) as entries:
            found = [entry.path for entry in entries if pattern.fullmatch(entry.name) and _is_file(entry)]
    except OSError:
        return
    for name in found:
        remove_unheld(Path(name))


def remove_unheld(path: Path, *, with_folder: bool = True) -> None:
    """Removes a file of `make_held_file` unless a living process holds it, and the folder that it stands for.

    Without the folder, the lock of `holding` too: what lies in a folder of that name is kept for the next run.
    """
    if sys.platform == "win32":
        return
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(path, descriptor):  # and not renamed to its target meanwhile
            if with_folder and path.suffix == FOLDER_LOCK:
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink()
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _is_file(entry: os.DirEntry[str]) -> bool:
    return entry.is_file(follow_symlinks=False)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False

"""Checks that files are what they were when they were opened; no output is made of files that changed.

A source that is replaced or written to while it is read gives a model of two halves, which looks as good as a whole
one. So what identifies a file is kept when its header is read. It is compared at every read of its rows, and once more
before an output is put in place.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pocketquant.errors import SourceError, listing


@dataclass(frozen=True)
class FileState:
    """A file at one moment: path, bytes, time of the last change in nanoseconds, inode number and device.

    Pickled it becomes None: on another machine the same file has another inode.
    """

    path: Path
    size: int
    changed_ns: int
    inode: int
    device: int

    def __reduce__(self) -> tuple[object, ...]:
        return _elsewhere, ()

    def check(self, descriptor: int) -> None:
        """Compares the file that was just read; SourceError if it is another one, or was changed."""
        if state_of(self.path, descriptor) != self:
            raise _changed([self])


def _elsewhere() -> None:
    return None


def state_of(path: Path, descriptor: int | None = None) -> FileState:
    """The state of a file, or of the open file that was found under the path.

    Raises:
        SourceError: it cannot be looked at.
    """
    try:
        found = path.stat() if descriptor is None else os.fstat(descriptor)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    return FileState(path, found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)


def check_unchanged(states: Iterable[FileState]) -> None:
    """Compares files with what they were.

    Raises:
        SourceError: some were changed, replaced or removed (all listed).
    """
    changed = [state for state in dict.fromkeys(states) if _now(state.path) != state]
    if changed:
        raise _changed(changed)


def _now(path: Path) -> FileState | None:
    try:
        return state_of(path)
    except SourceError:
        return None


def _changed(states: Iterable[FileState]) -> SourceError:
    return SourceError(
        "changed, replaced or removed while it was read, so what came of it would be of two files; nothing was "
        f"replaced: run the command again once nobody writes there:\n{listing(str(state.path) for state in states)}"
    )

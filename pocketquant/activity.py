"""What this process is doing, kept where the process that watches over it can read it after a crash.

Native code can end a process at once: an illegal instruction, a failed assertion, memory that is not there. Python then
says nothing any more. So the work is done in a child of the command's process (`pocketquant.cli.watching`), and what
the child does stands in memory that both share. Without a watcher every function here does nothing that can be seen.
"""

from __future__ import annotations

import json
import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_NOW, _WORDS, _ENDED, _WAYS, _FILES, _END = 0, 1 << 12, 2 << 12, 3 << 12, 1 << 16, 1 << 20
"""Where the parts of the shared memory begin: what is being done, native code's last words, the end, ways on, files."""

_lock = threading.RLock()
_shared: mmap.mmap | None = None
_current: list[str] = []
_written = _FILES


@dataclass(frozen=True)
class LastSeen:
    """What a process left behind.

    Attributes:
        doing: what was being done, the newest first, in words that follow "while"; "" for nothing in particular.
        last_words: what native code said when it gave up; "" if it said nothing.
        held: temporary files it made, those that are gone included.
        locks: files that kept other runs away, likewise.
        placed: files it put in place.
        ways_on: what unfinished work is kept in, if it is there, and how to go on from it; the first that is there
            counts.
        has_ended: it came to its own end; otherwise native code ended it, with whatever exit code.
    """

    doing: str
    last_words: str
    held: tuple[Path, ...]
    locks: tuple[Path, ...]
    placed: tuple[Path, ...]
    ways_on: tuple[tuple[Path, str], ...]
    has_ended: bool


def share() -> None:
    """Makes the memory; to be called before the child is made."""
    global _shared
    _shared = mmap.mmap(-1, _END)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Says what is being done while the block runs: "llama.cpp was loading x.gguf"."""
    begin_doing(what)
    try:
        yield
    finally:
        end_doing(what)


def begin_doing(what: str) -> None:
    """As `doing`, for what has no block; `end_doing` must follow."""
    with _lock:
        _current.append(what)
        _show()


def end_doing(what: str) -> None:
    """Takes back what `begin_doing` said; nothing if it is not there."""
    with _lock:
        if what in _current:
            _current.remove(what)
            _show()


def say_last(words: str) -> None:
    """Keeps what native code said when it gave up."""
    _put(_WORDS, words)


def note_end() -> None:
    """Says that the process comes to its own end."""
    _put(_ENDED, "ended")


def note_ways_on(ways: Sequence[tuple[Path, str]]) -> None:
    """Says what unfinished work is kept in, and how to go on from each, instead of what was said before."""
    _put(_WAYS, json.dumps([[str(place), how] for place, how in ways]), _FILES - _WAYS)


def note_held(path: Path) -> None:
    """Remembers a temporary file, so that it can be removed for a process that cannot do it any more."""
    _append("t", path)


def note_lock(path: Path) -> None:
    """Remembers a file that keeps other runs away."""
    _append("l", path)


def note_placed(path: Path) -> None:
    """Remembers a finished file that was put in place."""
    _append("p", path)


def last_seen() -> LastSeen:
    """What the child did last; to be called in the watcher."""
    if _shared is None:
        return LastSeen("", "", (), (), (), (), True)
    entries = [entry for entry in _shared[_FILES:_END].split(b"\0") if entry]
    files: dict[str, list[Path]] = {"t": [], "l": [], "p": []}
    for entry in entries:
        kind, name = entry[:1].decode(), entry[1:].decode("utf-8", "surrogateescape")
        files[kind].append(Path(name))
    return LastSeen(
        _get(_NOW),
        _get(_WORDS),
        tuple(files["t"]),
        tuple(files["l"]),
        tuple(files["p"]),
        _ways_on(),
        bool(_get(_ENDED)),
    )


def _ways_on() -> tuple[tuple[Path, str], ...]:
    try:
        return tuple((Path(place), how) for place, how in json.loads(_get(_WAYS, _FILES - _WAYS) or "[]"))
    except ValueError:  # the end came while they were written, or they did not fit
        return ()


def _show() -> None:
    _put(_NOW, ", and ".join(dict.fromkeys(reversed(_current[-3:]))))


def _put(start: int, text: str, room: int = _WORDS) -> None:
    with _lock:
        if _shared is not None:
            data = text.encode("utf-8", "replace")[: room - 1]
            _shared[start : start + len(data) + 1] = data + b"\0"


def _get(start: int, room: int = _WORDS) -> str:
    assert _shared is not None
    return _shared[start : start + room].split(b"\0", 1)[0].decode("utf-8", "replace")


def _append(kind: str, path: Path) -> None:
    global _written
    with _lock:
        entry = kind.encode() + str(path).encode("utf-8", "surrogateescape") + b"\0"
        if _shared is not None and _written + len(entry) <= _END:  # beyond it the watcher knows no more
            _shared[_written : _written + len(entry)] = entry
            _written += len(entry)

"""Reading byte ranges and replacing files whole.

Ranges are read, not mapped into memory: a disk error or a file cut short meanwhile is then an error with a name instead
of a signal.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pocketquant.errors import OutputError, SourceError
from pocketquant.formats import U8Array

MAX_JSON_BYTES = 256 << 20
_FLUSH_SECONDS = 0.2


def read_at(path: Path, offset: int, nbytes: int) -> U8Array:
    """Bytes [offset, offset + nbytes) of a file as u8[nbytes].

    Raises:
        SourceError: the file cannot be read, or has become shorter than its header said.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8, count=nbytes, offset=offset)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read at byte {offset}: {error.strerror or error}") from error
    if len(data) != nbytes:
        raise SourceError(f"{path}: ends before byte {offset + nbytes}; was it changed while being read?")
    return data


def read_json(path: Path) -> Any:
    """A JSON file, refused above 256 MiB; SourceError says where it is broken."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise SourceError(f"{path}: {path.stat().st_size} bytes is more than a JSON file here may have")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"{path}: broken JSON: {error}") from error


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Gives a temporary path beside `target`; moves it there only if the block ends well.

    Raises:
        OutputError: the folder is missing or cannot be written, or the disk is full. What stood at `target` stays.
    """
    if target.is_dir():
        raise OutputError(f"{target}: is a folder; give a file name")
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def flushed_meanwhile(path: Path) -> Iterator[None]:
    """Has what the block writes to a file sent to its disk while the block goes on, so that little is left to wait for.

    Raises:
        OSError: the disk failed. The system says so once, so it must not be lost here.
    """
    is_over, failures = threading.Event(), list[OSError]()

    def flush() -> None:
        try:
            with open(path, "r+b", buffering=0) as file:
                while not is_over.wait(_FLUSH_SECONDS):
                    os.fsync(file.fileno())
        except OSError as error:
            failures.append(error)

    flusher = threading.Thread(target=flush, name="flush", daemon=True)
    flusher.start()
    try:
        yield
    finally:
        is_over.set()
        flusher.join()
    if failures:
        raise failures[0]


def usable_threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

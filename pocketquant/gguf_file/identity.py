"""Files by content: name, size and SHA-256, a split model as one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pocketquant.errors import EvalError
from pocketquant.files.reading import sha256_of
from pocketquant.files.small import open_regular
from pocketquant.gguf_file.reading import is_gguf, read_shards


@dataclass(frozen=True)
class FileIdentity:
    """A file by content: its name without folders, its size in bytes, its SHA-256."""

    name: str
    size: int
    sha256: str


def identify(path: str | Path) -> FileIdentity:
    """Name, size and SHA-256 of a file, read in small pieces.

    Raises:
        EvalError: the file cannot be read.
    """
    path = Path(path)
    with open_regular(path, EvalError) as file:
        size = os.fstat(file.fileno()).st_size
    return FileIdentity(path.name, size, sha256_of(path))


def identify_all(files: Sequence[FileIdentity]) -> FileIdentity:
    """Several files as one: the digest is that of their digests, one a line."""
    if len(files) == 1:
        return files[0]
    digests = "".join(f"{file.sha256}\n" for file in files)
    return FileIdentity(
        ", ".join(file.name for file in files),
        sum(file.size for file in files),
        hashlib.sha256(digests.encode()).hexdigest(),
    )


def identify_model(path: str | Path) -> FileIdentity:
    """As `identify`; a split GGUF is all of its shards, under the first one's name.

    Raises:
        EvalError: the file cannot be read.
        SourceError: shards are missing or do not belong together.
    """
    path = Path(path)
    first = identify(path)
    shards = [file for file, _ in read_shards(path)] if is_gguf(path) else [path]
    return first if len(shards) == 1 else replace(identify_all([identify(file) for file in shards]), name=path.name)

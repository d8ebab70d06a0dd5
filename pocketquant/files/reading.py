"""Byte ranges of files, digests of them, and which files a source is made of.

Ranges are read, not mapped into memory: a disk error or a file cut short meanwhile is then an error with a name instead
of a signal.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import numpy as np

from pocketquant.errors import SourceError
from pocketquant.files.small import open_regular
from pocketquant.files.unchanged import FileState, state_of
from pocketquant.formats import U8Array

_SHARD = re.compile(r"(.*-)\d{5}-of-\d{5}\.gguf")
_BESIDE_WEIGHTS = (
    "*.safetensors.index.json",
    "*config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "README.md",
)
"""What a checkpoint is read for but its weights."""


def read_at(path: Path, offset: int, nbytes: int, state: FileState | None = None) -> U8Array:
    """Bytes [offset, offset + nbytes) of a file as u8[nbytes].

    Args:
        path: the file.
        offset: where the range begins.
        nbytes: its length.
        state: what the file was when its header was read; None where that does not matter.

    Raises:
        SourceError: the file cannot be read, is not what it was, or has become shorter than its header said.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            data = np.fromfile(file, dtype=np.uint8, count=nbytes, offset=offset)
            if state is not None:
                state.check(file.fileno())
    except OSError as error:
        raise SourceError(f"{path}: cannot be read at byte {offset}: {error.strerror or error}") from error
    if len(data) != nbytes:
        raise SourceError(f"{path}: ends before byte {offset + nbytes}; was it changed while being read?")
    return data


def sha256_of(path: Path) -> str:
    """Hex digest of a regular file, read in pieces of 1 MiB; SourceError where it is none."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def digest_file(path: Path) -> str:
    """Digest of a file's size and of 256 pieces of it: enough to tell one model from another, whatever its size."""
    piece = 1 << 16
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for i in range(256):
            file.seek(max(size - piece, 0) * i // 255)
            digest.update(file.read(piece))
    return digest.hexdigest()


def checkpoint_states(folder: Path) -> tuple[FileState, ...]:
    """What the files of a checkpoint's folder are now, but for the model card, which decides nothing."""
    files = (path for pattern in ("*.safetensors", *_BESIDE_WEIGHTS) for path in folder.glob(pattern))
    return tuple(state_of(path) for path in files if path.name != "README.md" and path.is_file())


def states_of(*sources: Path | str | None) -> tuple[FileState, ...]:
    """What files are now, with the shards that they belong to, and the files of checkpoints' folders."""
    files = [path for source in sources if source is not None for path in files_of(Path(source))]
    return tuple(state_of(path) for path in files if path.is_file())


def files_of(given: Path) -> list[Path]:
    """The file that is meant, with the shards it belongs to, or the files of a checkpoint folder that are read."""
    try:
        shard = _SHARD.fullmatch(given.name)
        if shard:
            return [path for path in given.parent.iterdir() if path.name.startswith(shard[1])]
        if given.is_dir():
            return [path for pattern in ("*.safetensors", *_BESIDE_WEIGHTS) for path in given.glob(pattern)]
        beside = _BESIDE_WEIGHTS if given.suffix == ".safetensors" else ()
        return [given, *(path for pattern in beside for path in given.parent.glob(pattern))]
    except (OSError, ValueError):
        return []

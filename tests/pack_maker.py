"""Reference packs: a small one, and those whose header says something else."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pocketquant.eval.packs.pack import MAGIC, Floor, PackHeader, PackWriter, TextIdentity
from pocketquant.gguf_file.identity import FileIdentity


def write_pack(path: Path) -> Path:
    """A pack of the top tokens of two windows of eight tokens."""
    header = PackHeader(
        kind="top",
        model=FileIdentity("model.gguf", 1000, "ab" * 32),
        sizes={"n_layer": 2, "n_embd": 8},
        vocabulary="cd" * 32,
        n_vocab=9,
        bos=None,
        context=8,
        first_scored=4,
        texts=(TextIdentity("a.txt", 10, "ef" * 32, 2, 40),),
        row_bytes=16,
        coding="",
        head=None,
        top=2,
        floor=Floor(1e-13, 2e-12, 3e-9, 1.0, 6),
        versions={"llama_cpp": "1"},
    )
    with PackWriter(path) as writer:
        writer.add("tokens", np.arange(16, dtype=np.int32).view(np.uint8) % 9)
        writer.add("rows", np.zeros((header.positions, header.row_bytes), np.uint8))
        writer.finish(header)
    return path


def reseal(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The pack with another header, whose digest is right again: what a malicious author would write."""
    fields = json.loads(header_of(data))
    change(fields)
    return with_header(data, json.dumps(fields).encode())


def header_of(data: bytes) -> bytes:
    """A pack's header."""
    offset, nbytes = struct.unpack_from("<QQ", data, 8)
    return data[offset : offset + nbytes]


def with_header(data: bytes, header: bytes) -> bytes:
    """The pack with these bytes as its header, and their digest."""
    (offset,) = struct.unpack_from("<Q", data, 8)
    front = struct.pack("<8sQQ32s", MAGIC, offset, len(header), hashlib.sha256(header).digest())
    return front + data[len(front) : offset] + header

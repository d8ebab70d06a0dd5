"""Writes GGUF files of any content, right or wrong, as other tools would have left them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from pocketquant.formats import FORMATS
from pocketquant.gguf_file.header import encode_header
from pocketquant.gguf_file.reading import read_header
from pocketquant.model import Value, padded


@dataclass
class Parts:
    """A GGUF taken apart: metadata, and for each tensor its numbers and the name of its type."""

    metadata: dict[str, Value]
    tensors: dict[str, tuple[np.ndarray, str]]


def take_apart(path: Path) -> Parts:
    """Reads a whole (small) file; tensors come decoded to f32."""
    header, data = read_header(path), path.read_bytes()
    tensors = {}
    for item in header.tensors:
        raw = np.frombuffer(data[item.offset : item.offset + item.nbytes], np.uint8)
        rows = item.format.decode(raw.reshape(-1, item.format.row_bytes(item.shape[-1])), item.shape[-1])
        tensors[item.name] = (rows.reshape(item.shape).copy(), item.format.name)
    return Parts(dict(header.metadata), tensors)


def put_together(path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, tuple[np.ndarray, str]]) -> Path:
    """Writes a file; numbers beyond a type's range become infinite, as a careless tool leaves them."""
    planned, pieces, offset = [], [], 0
    for name, (values, kind) in tensors.items():
        rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
        with np.errstate(over="ignore"):
            raw = rows.astype("<f2").tobytes() if kind == "F16" else FORMATS[kind].encode(rows).tobytes()
        tensor = SimpleNamespace(name=name, shape=values.shape)
        planned.append(SimpleNamespace(tensor=tensor, format=FORMATS[kind], offset=offset, nbytes=len(raw)))
        pieces.append(raw.ljust(padded(len(raw)), b"\0"))
        offset += padded(len(raw))
    path.write_bytes(encode_header(metadata, planned) + b"".join(pieces))  # type: ignore[arg-type]
    return path


def changed(good: Path, target: Path, change: Callable[[Parts], object]) -> Path:
    """A copy of a file with something done to its parts."""
    parts = take_apart(good)
    change(parts)
    return put_together(target, parts.metadata, parts.tensors)

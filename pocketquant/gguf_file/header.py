"""A plan's metadata and tensors as the header of a GGUF, and the file's name.

The bytes are those of gguf-py's `GGUFWriter`, which takes most of a second for the 250,000 tokens and as many merges of
a real model. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little endian.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence

from pocketquant.gguf_file.tensors import GgufTensor
from pocketquant.gguf_file.values import encode_text, encode_value, refuse_unwritable
from pocketquant.model import PlannedTensor, Value, padded


def encode_header(metadata: Mapping[str, Value], tensors: Sequence[PlannedTensor]) -> bytes:
    """Metadata and tensor table as the bytes before the data section, padded to the alignment.

    Raises:
        SourceError: metadata that GGUF cannot hold (all of it).
    """
    entries = [GgufTensor(item.tensor.name, item.tensor.shape, item.format, 0, item.nbytes) for item in tensors]
    header = encode_table(metadata, entries)
    return header.ljust(padded(len(header)), b"\0")


def encode_table(metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> bytes:
    """The same from entries of a tensor table, whose offsets are counted anew, and without the padding."""
    refuse_unwritable(metadata)
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [encode_text(key), *encode_value(value)]
    offset = 0
    for tensor in tensors:
        shape = tensor.shape[::-1]
        place = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.format.ggml_id, offset)
        parts += [encode_text(tensor.name), place]
        offset += padded(tensor.nbytes)
    return b"".join(parts)


def file_name(metadata: Mapping[str, Value], recipe: str) -> str:
    """A file name by GGUF's naming convention: `Qwen3.5-4B-Q4_K_M.gguf`."""
    import gguf

    def known(key: str) -> str | None:
        value = metadata.get(f"general.{key}")
        return str(value.value) if value else None

    name = gguf.naming_convention(
        known("name"), known("basename"), known("finetune"), known("version"), known("size_label"), recipe
    )
    return re.sub(r"[^A-Za-z0-9._-]", "_", name) + ".gguf"

"""Reference packs whose header says something else."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

from pocketquant.eval.pack import MAGIC


def reseal(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The pack with another header, whose digest is right again: what a malicious author would write."""
    offset, nbytes = struct.unpack_from("<QQ", data, 8)
    fields = json.loads(data[offset : offset + nbytes])
    change(fields)
    header = json.dumps(fields).encode()
    front = struct.pack("<8sQQ32s", MAGIC, offset, len(header), hashlib.sha256(header).digest())
    return front + data[len(front) : offset] + header

"""Damaged files: every reader reads them or refuses them by name, and nothing else. `make fuzz` goes on for hours."""

from __future__ import annotations

import random
import time
import zlib
from pathlib import Path

import pytest
from damage import damaged
from hostile_readers import READERS, Reader

from pocketquant.errors import PocketquantError

SECONDS = 0.5
MOST_INPUTS = 100


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_nothing_but_a_refusal_comes_of_a_damaged_file(reader: Reader, tmp_path: Path) -> None:
    path = reader.make(tmp_path)
    good = path.read_bytes()
    outcomes = [read(reader, path, good)]
    began = time.process_time()
    for seed in range(MOST_INPUTS if reader.share > 0.1 else 5):
        if seed >= 5 and time.process_time() - began > SECONDS:
            break
        rng = random.Random(zlib.crc32(reader.name.encode()) << 40 | seed)
        outcomes.append(read(reader, path, damaged(reader.kind, good, rng)))
    assert outcomes[0] == ("read" if reader.name != "importance matrix, old" else "refused")
    assert reader.kind == "text" or "refused" in outcomes or reader.share < 1, "damage that nobody sees is none"


def read(reader: Reader, path: Path, data: bytes) -> str:
    """ "read" or "refused"; whatever else comes out fails the test."""
    path.write_bytes(data)
    began = time.process_time()
    try:
        reader.read(path)
        outcome = "read"
        message = ""
    except PocketquantError as error:
        outcome, message = "refused", str(error)
    assert all(line.isprintable() and len(line) < 1100 for line in message.split("\n"))
    assert time.process_time() - began < 5
    return outcome

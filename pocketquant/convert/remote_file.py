"""A file on a hub, read like a local one: by few large requests, some ahead of the reader, in bounded memory.

Workers ask for a chunk of rows, often as many small runs (a permuted tensor is read head by head). What goes over the
net are whole blocks of one tensor, each once: whoever asks first fetches, others wait for the same block, and the
blocks after it are fetched meanwhile. Blocks never reach beyond the tensor, so a tensor left out costs nothing.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace

import numpy as np

from pocketquant.convert.http_ranges import HttpFile, fetch_range
from pocketquant.errors import SourceError
from pocketquant.formats import U8Array

BLOCK_BYTES = 4 << 20
BLOCKS_AHEAD = 8
CACHE_BYTES = 128 << 20
"""Holds the permuted tensors of all but the largest models whole; a larger one is fetched again in part."""
REQUESTS_AHEAD = 8
"""Requests at once beside those that a worker is waiting for."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on a hub; a `RangeFile`. Holds an address, no connection and no token, and can be pickled.

    Attributes:
        file: its address, size and ETag.
        extent: bytes [start, stop) that are read through this handle; None reads exactly what is asked for.
    """

    file: HttpFile
    extent: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        """Bytes in the whole file, as its hub listed them."""
        if self.file.size is None:
            raise SourceError(f"{self.file}: the hub does not say how large it is")
        return self.file.size

    def read(self, offset: int, nbytes: int) -> U8Array:
        """Bytes [offset, offset + nbytes); SourceError if they cannot be had."""
        stop = offset + nbytes
        if not 0 <= offset <= stop <= self.size:
            raise SourceError(f"{self}: ends before byte {stop}")
        start, end = self.extent or (offset, stop)
        if not start <= offset <= stop <= end:
            start, end = offset, stop
        data = np.empty(nbytes, np.uint8)
        at = offset
        while at < stop:
            index = (at - start) // BLOCK_BYTES
            first = start + index * BLOCK_BYTES
            block = _block(self.file, first, min(first + BLOCK_BYTES, end))
            _fetch_ahead(self.file, first + BLOCK_BYTES, end)
            until = min(stop, first + len(block))
            data[at - offset : until - offset] = block[at - first : until - first]
            at = until
        return data

    def within(self, start: int, stop: int) -> RemoteFile:
        """The same file, fetched in blocks of [start, stop)."""
        return replace(self, extent=(start, stop))

    def __str__(self) -> str:
        return str(self.file)


@dataclass
class _Block:
    """A block on its way or here."""

    nbytes: int
    done: threading.Event = field(default_factory=threading.Event)
    data: U8Array | None = None
    error: Exception | None = None


_Key = tuple[HttpFile, int, int]
_blocks: OrderedDict[_Key, _Block] = OrderedDict()  # least recently used first
_lock = threading.Lock()
_ahead = threading.BoundedSemaphore(REQUESTS_AHEAD)


def _block(file: HttpFile, start: int, stop: int) -> U8Array:
    """A block, from memory or by fetching it or by waiting for whoever does."""
    key = (file, start, stop)
    with _lock:
        block = _blocks.get(key)
        if is_ours := block is None:
            block = _reserve(key)
        else:
            _blocks.move_to_end(key)
    assert block is not None
    if is_ours:
        _fetch(key, block)
    block.done.wait()
    if block.error is not None:
        raise block.error
    assert block.data is not None
    return block.data


def _fetch_ahead(file: HttpFile, start: int, end: int) -> None:
    """Starts fetching the blocks that follow, as many as may be under way at once."""
    for first in range(start, min(end, start + BLOCKS_AHEAD * BLOCK_BYTES), BLOCK_BYTES):
        key = (file, first, min(first + BLOCK_BYTES, end))
        with _lock:
            if key in _blocks:
                continue
            if not _ahead.acquire(blocking=False):
                return
            block = _reserve(key)
        threading.Thread(target=_fetch, args=(key, block, _ahead), name="fetch-ahead", daemon=True).start()


def _reserve(key: _Key) -> _Block:
    """A new block, made room for; called under the lock. Blocks on their way stay."""
    block = _Block(key[2] - key[1])
    excess = sum(other.nbytes for other in _blocks.values()) + block.nbytes - CACHE_BYTES
    for other_key, other in list(_blocks.items()):
        if excess <= 0:
            break
        if other.done.is_set():
            excess -= other.nbytes
            del _blocks[other_key]
    _blocks[key] = block
    return block


def _fetch(key: _Key, block: _Block, slot: threading.BoundedSemaphore | None = None) -> None:
    try:
        block.data = fetch_range(*key)
    except BaseException as error:
        block.error = error if isinstance(error, Exception) else SourceError(f"{key[0]}: interrupted")
        with _lock:
            _blocks.pop(key, None)  # so that asking again tries again
        if not isinstance(error, Exception):
            raise
    finally:
        block.done.set()
        if slot is not None:
            slot.release()


def _forget_after_fork() -> None:
    """A child process has none of its parent's fetching threads."""
    global _lock, _ahead
    _lock, _ahead = threading.Lock(), threading.BoundedSemaphore(REQUESTS_AHEAD)
    _blocks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)

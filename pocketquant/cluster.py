"""Plan -> file with the workers of a Dask cluster: they read and encode rows, this machine writes what they return.

A task is a batch of the calls that a local run makes, so the bytes are those of a local run. To a worker go a tensor's
name, place, order of heads, format, importance and who rounds it, pickled once for a tensor: never weights, never a
token. Every local path among them, of statistics too, goes with the file's size and a digest of samples, and a worker
that finds another file there refuses. Results are written where they belong as they come, one in memory at a time, and
no more batches are under way than keep every worker busy.

What the tasks of a tensor share is itself the result of a task, not data scattered to a worker: Dask computes it again
where it was lost, while scattered data would be gone with its worker. Source: distributed 2026.8,
`Scheduler.remove_worker` and `Client.gather` (by default through the scheduler; here from the workers themselves where
they can be reached).
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import os
import pickle
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from queue import Empty, SimpleQueue
from typing import Any
from uuid import uuid4

import numpy as np

from pocketquant import __version__
from pocketquant.errors import ClusterError, PocketquantError, SourceError, listing
from pocketquant.extras import install_command
from pocketquant.files.reading import read_at
from pocketquant.formats import FORMATS, U8Array
from pocketquant.gguf_file import writing as pipeline
from pocketquant.model import Plan, PlannedTensor

BATCH_WEIGHTS = 16 << 20
"""Weights in a task: 32 MiB of BF16, about a quarter of a second; the scheduler takes a millisecond for one."""
CONNECT_SECONDS = 5.0
EMPTY_SECONDS = 30.0
"""How long a run waits for workers once there are none."""
_TASKS_PER_THREAD = 2
_COUNT_SECONDS = 2.0
_SAMPLES, _SAMPLE_BYTES, _HEAD_BYTES = 16, 4096, 1 << 16
_ADDRESS = re.compile(r"dask://((?:[\w.-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5})/?")

_Place = tuple[str, int, str]
"""A file as it is sent: absolute path, bytes, digest of samples."""


@contextmanager
def open_cluster(address: str) -> Iterator[pipeline.Run]:
    """Connects to a running cluster; gives what `pipeline.write` takes as `run`.

    Args:
        address: of the scheduler, `dask://HOST:PORT`. Where Dask's configuration requires encryption, TLS is used.

    Raises:
        ClusterError: no Dask here, no cluster there, no workers, or workers with another pocketquant (all listed).
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ClusterError(f"{address}: no address of a cluster; give dask://HOST:PORT, of a running `dask scheduler`")
    try:
        import dask
        from distributed import Client
    except ImportError as error:
        raise ClusterError(
            f"{address}: a cluster needs Dask, which cannot be imported here ({error}); "
            f"{install_command('cluster')}, here and on the workers"
        ) from error
    protocol = "tls" if dask.config.get("distributed.comm.require-encryption") else "tcp"
    try:
        with _quiet("distributed"):
            client = Client(f"{protocol}://{match[1]}", timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, asyncio.TimeoutError, TypeError, ValueError) as error:
        raise ClusterError(
            f"{address}: no Dask scheduler answers there within {CONNECT_SECONDS:g} s; start one with `dask scheduler` "
            "and workers with `dask worker HOST:PORT`, and look whether a firewall is between"
        ) from error
    try:
        _check_workers(client, address)
        direct = _can_reach_workers(client)
        yield lambda plan, path, on_bytes: _run(client, address, direct, plan, path, on_bytes)
    finally:
        with _quiet("distributed"):
            client.close(timeout=CONNECT_SECONDS)


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Dask logs what we say in one line of our own."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


@lru_cache(maxsize=1)
def describe_package() -> str:
    """This pocketquant: version and digest of its sources, since equal bytes need equal code."""
    digest, root = hashlib.sha256(), Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return f"pocketquant {__version__} (sources {digest.hexdigest()[:12]})"


def _check_workers(client: Any, address: str) -> None:
    def identify() -> str:  # nested, so that it travels whole: a worker may know no pocketquant to import it from
        try:
            import pocketquant
        except ImportError:
            return "no pocketquant"
        try:
            from pocketquant.cluster import describe_package
        except ImportError:
            return f"pocketquant {pocketquant.__version__}"
        return describe_package()

    deadline = time.monotonic() + CONNECT_SECONDS
    while not client.nthreads():
        if time.monotonic() > deadline:
            raise ClusterError(f"{address}: the cluster has no workers; start some: `dask worker {address[7:]}`")
        time.sleep(0.1)
    found = client.run(identify, on_error="return")
    own = describe_package()
    others = [f"{worker}: {what}" for worker, what in sorted(found.items()) if what != own]
    if others:
        raise ClusterError(
            f"{address}: {len(others)} of {len(found)} workers do not run what runs here, {own}, and could give other "
            f"bytes:\n{listing(others)}\nInstall the same pocketquant in every worker's environment and restart them."
        )


def _can_reach_workers(client: Any) -> bool:
    """Whether results can come straight from the workers; else they come through the scheduler, sent twice."""
    host, _, port = min(client.nthreads()).partition("://")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


# --- on this machine --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Rows [start, stop) of one tensor."""

    planned: PlannedTensor
    start: int
    stop: int


def _batches(plan: Plan) -> Iterator[list[_Piece]]:
    """All rows in file order, at most `BATCH_WEIGHTS` at once, but for a matrix that is rounded whole; small tensors
    share a batch.
    """
    batch: list[_Piece] = []
    n_weights = 0
    for planned in plan.tensors:
        n_cols, n_rows = planned.tensor.n_cols, planned.tensor.n_rows
        step = max(1, BATCH_WEIGHTS // n_cols)
        encoder = plan.rounding.get(planned.tensor.name)
        if encoder is not None and encoder.whole:
            step = planned.tensor.shape[-2]
        for start in range(0, n_rows, step):
            stop = min(start + step, n_rows)
            if batch and n_weights + (stop - start) * n_cols > BATCH_WEIGHTS:
                yield batch
                batch, n_weights = [], 0
            batch.append(_Piece(planned, start, stop))
            n_weights += (stop - start) * n_cols
    if batch:
        yield batch


@dataclass
class _Submitter:
    """Sends batches; a tensor that several of them share goes out once, as the result of a task of its own."""

    client: Any
    plan: Plan
    run_id: str
    count: int = 0
    last: tuple[PlannedTensor, Any] | None = None

    def submit(self, batch: list[_Piece]) -> Any:
        packed = [self._packed(piece) for piece in batch]
        rows = [(piece.start, piece.stop) for piece in batch]
        return self._task(_encode_batch, describe_package(), packed, rows)

    def _packed(self, piece: _Piece) -> Any:
        if self.last is None or self.last[0] is not piece.planned:
            packed: Any = pack(piece.planned, self.plan)
            if piece.stop - piece.start < piece.planned.tensor.n_rows:
                packed = self._task(_keep, packed)
            self.last = piece.planned, packed
        return self.last[1]

    def _task(self, function: Any, *arguments: Any) -> Any:
        self.count += 1
        key = f"{function.__name__.strip('_')}-{self.run_id}-{self.count}"
        return self.client.submit(function, *arguments, key=key, pure=False)


def _run(client: Any, address: str, direct: bool, plan: Plan, path: Path, on_bytes: pipeline.OnBytes) -> None:
    submitter, batches = _Submitter(client, plan, uuid4().hex), _batches(plan)
    pending: dict[str, tuple[Any, list[_Piece]]] = {}
    done: SimpleQueue[str] = SimpleQueue()
    more, limit, counted, last_seen = True, 0, -_COUNT_SECONDS, time.monotonic()
    with open(path, "r+b", buffering=0) as file, _quiet("distributed"):
        try:
            while more or pending:
                now = time.monotonic()
                if now - counted >= _COUNT_SECONDS:  # workers come and go
                    n_threads, counted = _count_threads(client, address), now
                    limit = _TASKS_PER_THREAD * n_threads + 1
                    last_seen = now if n_threads else last_seen
                    if now - last_seen > EMPTY_SECONDS:
                        raise ClusterError(
                            f"{address}: no workers for {EMPTY_SECONDS:g} s; look at their logs (memory?)"
                        )
                while more and len(pending) < limit:
                    batch = next(batches, None)
                    if batch is None:
                        more = False
                        break
                    future = submitter.submit(batch)
                    pending[future.key] = future, batch
                    future.add_done_callback(lambda finished: done.put(finished.key))
                try:
                    future, batch = pending.pop(done.get(timeout=_COUNT_SECONDS))
                except Empty:
                    continue
                for piece, data in zip(batch, _result(client, future, address, direct), strict=True):
                    _write_piece(plan, piece, data, file)
                    on_bytes(data.nbytes)
        finally:
            client.cancel([future for future, _ in pending.values()])


def _count_threads(client: Any, address: str) -> int:
    try:
        return sum(client.nthreads().values())
    except (OSError, asyncio.TimeoutError, RuntimeError) as error:
        raise ClusterError(_lost(address)) from error


def _lost(address: str) -> str:
    return f"{address}: the scheduler is gone; nothing was replaced, start it and the workers again"


def _result(client: Any, future: Any, address: str, direct: bool) -> list[U8Array]:
    from distributed import CancelledError, KilledWorker

    try:
        return client.gather(future, direct=direct)
    except PocketquantError:
        raise
    except KilledWorker as error:
        raise ClusterError(
            f"{address}: {error.allowed_failures + 1} workers died one after the other with the same rows; look at "
            "their logs: a worker needs about 300 MB for each of its threads"
        ) from error
    except (CancelledError, asyncio.CancelledError, OSError, asyncio.TimeoutError) as error:
        raise ClusterError(_lost(address)) from error
    except Exception as error:  # whatever a worker's environment raises before our code runs there
        raise ClusterError(f"{address}: a worker failed: {type(error).__name__}: {error}") from error


def _write_piece(plan: Plan, piece: _Piece, data: U8Array, file: io.RawIOBase) -> None:
    planned = piece.planned
    row_bytes = planned.format.row_bytes(planned.tensor.n_cols)
    if data.shape != (piece.stop - piece.start, row_bytes):
        raise ClusterError(f"{planned.tensor.name}: a worker returned {list(data.shape)} bytes")
    file.seek(len(plan.header) + planned.offset + piece.start * row_bytes)
    view, done = memoryview(np.ascontiguousarray(data).reshape(-1).data), 0
    while done < len(view):
        done += file.write(view[done:]) or 0


class _Packer(pickle.Pickler):
    """Sends a path as the file it names, so that a worker can tell another file at the same path."""

    def persistent_id(self, value: Any) -> _Place | None:
        if not isinstance(value, PurePath):
            return None
        path = Path(os.path.abspath(value))
        try:
            stat = path.stat()
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
        return str(path), stat.st_size, _digest_samples(path, stat.st_size, stat.st_mtime_ns)


def pack(planned: PlannedTensor, plan: Plan) -> bytes:
    """A tensor as it goes to workers: where its rows lie, how they are permuted, its format's name, its importance, and
    who rounds it (statistics by their path).

    Raises:
        ClusterError: it is rounded in a way that cannot be sent.
    """
    buffer, tensor = io.BytesIO(), planned.tensor
    encoder = plan.rounding.get(tensor.name)
    try:
        _Packer(buffer, protocol=5).dump((tensor, planned.format.name, plan.importance.get(tensor.name), encoder))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ClusterError(f"{tensor.name}: cannot be sent to workers: {error}; write it without a cluster") from error
    return buffer.getvalue()


@lru_cache(maxsize=256)
def _digest_samples(path: Path, size: int, changed_ns: int) -> str:
    """Of the beginning, where the header is, and of places all over the file: a fine-tune has the same header.

    `changed_ns` only makes a changed file be read again; it may differ between copies.
    """
    digest = hashlib.sha256()
    starts = {(size - _SAMPLE_BYTES) * i // _SAMPLES for i in range(1, _SAMPLES + 1)} if size > _HEAD_BYTES else set()
    for start, nbytes in [(0, min(size, _HEAD_BYTES)), *((start, _SAMPLE_BYTES) for start in sorted(starts))]:
        digest.update(read_at(path, start, nbytes).data)
    return digest.hexdigest()


# --- on a worker ------------------------------------------------------------------------------------------------------


def _keep(packed: bytes) -> bytes:
    return packed


def _encode_batch(package: str, packed: list[bytes], rows: list[tuple[int, int]]) -> list[U8Array]:
    """u8[n, row_bytes] of every piece. `package` is who asks: workers that join later are checked here."""
    from distributed import get_worker

    try:
        if describe_package() != package:
            raise ClusterError(f"runs {describe_package()}, asked by {package}; install the same on every worker")
        return [_encode_piece(bytes(one), start, stop) for one, (start, stop) in zip(packed, rows, strict=True)]
    except PocketquantError as error:
        raise type(error)(f"worker {get_worker().address}: {error}") from None
    except Exception as error:
        raise ClusterError(f"worker {get_worker().address}: {type(error).__name__}: {error}") from None


def _encode_piece(packed: bytes, start: int, stop: int) -> U8Array:
    tensor, name, importance, encoder = _unpack(packed)
    if encoder is not None and encoder.whole:
        return encoder.encode(tensor, start, stop, FORMATS[name])  # type: ignore[no-any-return]
    step = max(1, pipeline.CHUNK_WEIGHTS // tensor.n_cols)
    data = np.empty((stop - start, FORMATS[name].row_bytes(tensor.n_cols)), np.uint8)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        if encoder is not None:
            rows = encoder.encode(tensor, first, last, FORMATS[name])
        else:
            rows = pipeline.encode_rows(tensor, first, last, FORMATS[name], importance)
        data[first - start : last - start] = rows
    return data


class _Unpacker(pickle.Unpickler):
    def persistent_load(self, place: _Place) -> Path:
        path, size, digest = Path(place[0]), place[1], place[2]
        try:
            stat = path.stat()
        except OSError as error:
            raise SourceError(
                f"{path}: cannot be read here: {error.strerror}; keep the source on storage that every worker mounts "
                "at the same path, or name a repository on a hub"
            ) from error
        if stat.st_size != size or _digest_samples(path, size, stat.st_mtime_ns) != digest:
            raise SourceError(f"{path}: another file than the one planned from has this path here; make them the same")
        return path


@lru_cache(maxsize=4)  # the batches of a tensor follow one another; quantized sources keep their scales in there
def _unpack(packed: bytes) -> Any:
    return _Unpacker(io.BytesIO(packed)).load()

"""Plan -> file: row chunks stream from the source through the encoder to their place in the output.

A unit of work (`encode_rows`) is a pure function of a tensor, a row range, a format and an importance vector. Every
chunk's place in the file is known before the first one is read, so threads write where they belong, in any order, and
the bytes do not depend on the number of threads. Memory is one chunk per thread.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

import numpy as np

from pocketquant.errors import OutputError, RecipeError
from pocketquant.files.replacing import flushed_meanwhile, replacing_together
from pocketquant.files.unchanged import check_unchanged
from pocketquant.formats import F32Array, QuantFormat, U8Array
from pocketquant.machine import usable_threads
from pocketquant.model import Plan, PlannedTensor, Tensor

CHUNK_WEIGHTS = 1 << 20
"""Weights in a chunk: 4 MiB as f32, small enough to stay in cache between read, encode and write."""

_PATIENCE_SECONDS = 0.5
"""How long an interrupt waits for chunks in flight."""

OnBytes = Callable[[int], None]
Run = Callable[[Plan, Path, OnBytes], None]
"""Fills a file of the plan's size, header written, with the plan's tensors."""


def encode_rows(
    tensor: Tensor, start: int, stop: int, quant_format: QuantFormat, importance: F32Array | None = None
) -> U8Array:
    """Rows [start, stop) of a tensor in a format, u8[n, row_bytes].

    Args:
        tensor: where the rows come from; experts' matrices count one below the other.
        start: first row.
        stop: last row + 1.
        quant_format: what they become.
        importance: the tensor's entry of an importance matrix, which weighs the columns' squared errors: f32[n_cols],
            or f32[n_expert, n_cols], where each expert's rows use its own.

    Raises:
        SourceError: unreadable or non-finite data.
        RecipeError: a weight does not fit the format.
    """
    if tensor.dtype == quant_format.name:
        stored = tensor.source.stored(start, stop)
        if stored is not None:
            return stored
    with naming_overflow(tensor):
        if importance is None or importance.ndim == 1:
            return quant_format.encode(tensor.rows(start, stop), importance)
        pieces = []
        while start < stop:
            expert, row = divmod(start, tensor.shape[-2])
            end = min(stop, start + tensor.shape[-2] - row)
            pieces.append(quant_format.encode(tensor.rows(start, end), importance[expert]))
            start = end
        return np.concatenate(pieces)


@contextmanager
def naming_overflow(tensor: Tensor) -> Iterator[None]:
    """Turns a format's complaint about a weight beyond its range into a RecipeError that names the tensor."""
    try:
        yield
    except OverflowError as error:
        raise RecipeError(f"{tensor.name}: {error}") from error


def write(
    plan: Plan,
    target: Path | str,
    *,
    threads: int | None = None,
    on_bytes: OnBytes | None = None,
    run: Run | None = None,
    is_result: bool = True,
) -> None:
    """Writes a planned file; `target` is replaced only by the finished, checked one.

    Args:
        plan: from `pocketquant.quant.plan`.
        target: path of the output.
        threads: workers; None for one per processor this process may use.
        on_bytes: called from any worker with the number of output bytes just written.
        run: what encodes in place of threads of this process: `pocketquant.cluster.open_cluster` gives one.
        is_result: False for a file that is only needed meanwhile; see `put_in_place`.

    Raises:
        OutputError: no space, no permission, no such folder.
        SourceError: the source cannot be read, holds a non-finite weight, or was changed meanwhile.
    """
    write_together([(plan, Path(target))], threads=threads, on_bytes=on_bytes, run=run, is_result=is_result)


def write_together(
    files: Sequence[tuple[Plan, Path]],
    *,
    threads: int | None = None,
    on_bytes: OnBytes | None = None,
    run: Run | None = None,
    is_result: bool = True,
) -> None:
    """Writes several planned files into one folder; no target is replaced before all of them are finished and checked.

    The first file is renamed last, so that where it is, the others are too.

    Args:
        files: plans and the paths of the outputs.
        threads: as `write`.
        on_bytes: as `write`.
        run: as `write`.
        is_result: as `write`.

    Raises:
        OutputError, SourceError: as `write`.
    """
    with replacing_together([target for _, target in files], is_result=is_result) as temporaries:
        _check_space(sum(plan.file_bytes for plan, _ in files), files[0][1])
        for (plan, _), temporary in zip(files, temporaries, strict=True):
            with open(temporary, "r+b", buffering=0) as file:
                file.truncate(plan.file_bytes)
                file.write(plan.header)
            advance = on_bytes or (lambda nbytes: None)
            with flushed_meanwhile(temporary):
                if run is not None:
                    run(plan, temporary, advance)
                else:
                    _run(plan, temporary, threads or usable_threads(), advance)
            _check_written(plan, temporary)
        check_unchanged(state for plan, _ in files for state in plan.files)


def _check_space(file_bytes: int, target: Path) -> None:
    try:
        free = shutil.disk_usage(target.resolve().parent).free
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from error
    if free < file_bytes:
        raise OutputError(
            f"{target}: the output takes {file_bytes:,} bytes and the disk has {free:,} left; free some space or "
            "write elsewhere"
        )


def _check_written(plan: Plan, path: Path) -> None:
    with open(path, "rb") as file:
        header = file.read(len(plan.header))
    if path.stat().st_size != plan.file_bytes or header != plan.header:
        raise OutputError(f"{path}: the written file is not the planned one; nothing was replaced")


@dataclass(frozen=True)
class _Unit:
    planned: PlannedTensor
    start: int
    stop: int


def _units(plan: Plan) -> Iterator[_Unit]:
    for planned in plan.tensors:
        step = max(1, CHUNK_WEIGHTS // planned.tensor.n_cols)
        encoder = plan.rounding.get(planned.tensor.name)
        if encoder is not None and encoder.whole:
            step = planned.tensor.shape[-2]
        for start in range(0, planned.tensor.n_rows, step):
            yield _Unit(planned, start, min(start + step, planned.tensor.n_rows))


def _run(plan: Plan, path: Path, n_threads: int, on_bytes: OnBytes) -> None:
    units, lock, failures = _units(plan), threading.Lock(), list[BaseException]()
    stopping = threading.Event()

    def work() -> None:
        try:
            with open(path, "r+b", buffering=0) as file:
                while not stopping.is_set():
                    with lock:
                        unit = next(units, None)
                    if unit is None:
                        return
                    on_bytes(_write_unit(plan, unit, file))
        except BaseException as error:
            failures.append(error)
            stopping.set()

    workers = [threading.Thread(target=work, name=f"encode-{i}", daemon=True) for i in range(n_threads)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except BaseException:  # an interrupt
        stopping.set()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for worker in workers:  # not for ever: a matrix that is rounded whole can take minutes; its file is deleted
            if worker.ident is not None:
                worker.join(max(0.0, deadline - time.monotonic()))
        raise
    if failures:
        raise failures[0]


def _write_unit(plan: Plan, unit: _Unit, file: RawIOBase) -> int:
    planned, tensor = unit.planned, unit.planned.tensor
    encoder = plan.rounding.get(tensor.name)
    if encoder is not None:
        data = encoder.encode(tensor, unit.start, unit.stop, planned.format)
    else:
        data = encode_rows(tensor, unit.start, unit.stop, planned.format, plan.importance.get(tensor.name))
    file.seek(len(plan.header) + planned.offset + unit.start * planned.format.row_bytes(tensor.n_cols))
    view, done = memoryview(data.reshape(-1).data), 0
    while done < len(view):
        done += file.write(view[done:]) or 0
    return data.nbytes

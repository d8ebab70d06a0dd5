"""An unfinished reference pack on disk: its whole windows outlive an interrupt, and the finished file is the same."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pocketquant.errors import EvalError, OutputError, PocketquantWarning
from pocketquant.eval.packs.pack import PackWriter
from pocketquant.files.interrupts import put_in_place, resumable
from pocketquant.files.leftovers import holding
from pocketquant.files.replacing import check_target, hidden_beside, replacing
from pocketquant.files.resuming import check_same_run
from pocketquant.files.small import read_object


class UnfinishedPack:
    """Unfinished work beside a pack: `.NAME.unfinished` is the file as far as it is, `.NAME.state` says how far.

    Attributes:
        path: of the file.
        windows: whole windows that it holds.
        kept: what `reached` was given with the last of them; empty at the beginning.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], save_seconds: float) -> None:
        """`run` is what a run must state to go on from here; the state is written every `save_seconds` at most."""
        self._place = check_target(out)
        self.path, self._state = hidden_beside(out, "unfinished"), hidden_beside(out, "state")
        self._run: dict[str, Any] = json.loads(json.dumps(run))
        self._save_seconds, self._saved = save_seconds, time.monotonic()
        self.windows = self._saved_windows = 0
        self.kept: Mapping[str, Any] = {}
        self._rows: tuple[int, str] = (0, "")
        self._writer: PackWriter | None = None

    @contextmanager
    def begun(self, *, resume: bool) -> Iterator[None]:
        """Keeps other runs away. An interrupt of the block saves the windows that are whole.

        Raises:
            EvalError: what is to be taken up is of another run.
        """
        how = f"finished windows are kept in {self.path}; the same command with --resume goes on from there"
        with holding(self.path), resumable(self._state, how):
            try:
                if not (resume and self._state.exists() and self.path.exists()):
                    self._state.unlink(missing_ok=True)
                    self.path.unlink(missing_ok=True)
                else:
                    self._read()
                yield
            except BaseException as error:
                if not isinstance(error, Exception) and self.windows > self._saved_windows:
                    self._save_interrupted()
                if not self._state.exists():
                    self.path.unlink(missing_ok=True)
                raise

    def take_up(self, writer: PackWriter) -> None:
        """Has the writer go on behind the rows that are there; its other sections are written again.

        Raises:
            EvalError: they are not those that were saved.
        """
        nbytes, digest = self._rows
        if self.windows and writer.take_up("rows", nbytes) != digest:
            raise EvalError(f"{self.path}: holds other rows than were saved; delete it, or leave --resume out")
        self._writer = writer

    def reached(self, windows: int, kept: Mapping[str, Any], *, is_last: bool) -> None:
        """So many windows are whole; saves that if it was last done long enough ago."""
        assert self._writer is not None
        self.windows, self.kept, self._rows = windows, kept, self._writer.written("rows")
        if not is_last and time.monotonic() - self._saved >= self._save_seconds:
            self._save()
            self._saved = time.monotonic()

    def finish(self, *, is_result: bool) -> None:
        """Moves the finished pack to its place; `is_result` as in `put_in_place`."""
        self._sync()
        put_in_place([(self.path, self._place)], is_result=is_result)
        self._state.unlink(missing_ok=True)

    def _save_interrupted(self) -> None:
        try:
            self._save()
        except OutputError as error:  # the interrupt is what is said in the end
            warnings.warn(f"the work done so far cannot be kept: {error}", PocketquantWarning, stacklevel=2)

    def _save(self) -> None:
        self._sync()
        stated = {"run": self._run, "windows": self.windows, "rows": self._rows, "kept": self.kept}
        with replacing(self._state, is_result=False) as temporary:
            temporary.write_text(json.dumps(stated), encoding="utf-8")
        self._saved_windows = self.windows

    def _sync(self) -> None:
        try:
            if self._writer is not None:
                self._writer.flush()
            with open(self.path, "rb+") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _read(self) -> None:
        stated = read_object(self._state, EvalError) or {}
        run: Any = stated.get("run")
        rows: Any = stated.get("rows")
        is_right = isinstance(run, dict) and isinstance(rows, list) and isinstance(stated.get("kept"), dict)
        if not is_right or type(stated.get("windows")) is not int or [type(part) for part in rows] != [int, str]:
            raise EvalError(f"{self._state}: not the state of an unfinished reference pack; delete it")
        check_same_run(self._state, run, self._run)
        self.windows = self._saved_windows = stated["windows"]
        self.kept, self._rows = stated["kept"], (rows[0], rows[1])

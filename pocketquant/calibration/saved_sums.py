"""Unfinished statistics on disk: the file with its finished passes, and the sums of the pass that is running."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt

from pocketquant.calibration.hessian import HessianSums
from pocketquant.calibration.statistics_writing import StatisticsLayout
from pocketquant.errors import OutputError, PocketquantWarning
from pocketquant.files.interrupts import put_in_place, resumable
from pocketquant.files.leftovers import holding
from pocketquant.files.replacing import check_target, hidden_beside
from pocketquant.files.resuming import check_same_run, open_state, write_state

_MAX_STATE_BYTES = 1 << 40
_SAVED_SHARE = 20
"""Saving takes at most about a twentieth of the time."""

_NOTICED_BYTES = 1 << 28
"""An interrupt announces that it saves sums of this size or more, because that takes long."""


class SavedSums:
    """Unfinished work beside an output: `.NAME.unfinished` is the file, `.NAME.state` the sums of its current pass.

    Attributes:
        unfinished: path of the file.
        first_pass: number of the pass to begin with.
        first_window: of that pass, the window to begin with; some sums may hold a part of it.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], save_seconds: float) -> None:
        """`run` is everything that the sums depend on; they are saved at most once in `save_seconds`."""
        self._place = check_target(out)
        self.unfinished, self._state = hidden_beside(out, "unfinished"), hidden_beside(out, "state")
        self._run, self._save_seconds = run, save_seconds
        self.first_pass = self.first_window = 0
        self._has_sums = False
        self._saved, self._cost = time.monotonic(), 0.0
        self._sums: HessianSums | None = None
        self._number = self._window = 0
        self._saved_tokens: dict[str, int] = {}

    @contextmanager
    def begun(self, layout: StatisticsLayout, resume: bool) -> Iterator[None]:
        """Keeps other runs away. An interrupt of the block saves the sums; work that cannot be resumed is deleted.

        Raises:
            EvalError: the work to resume is of another run.
        """
        how = f"what was done is kept in {self._state}; the same command with --resume goes on from there"
        with holding(self.unfinished), resumable(self._state, how):
            try:
                self._begin(layout, resume)
                yield
            except BaseException as error:
                if not isinstance(error, Exception):
                    self._save_interrupted()
                if not self._state.exists():
                    self.unfinished.unlink(missing_ok=True)
                raise

    def _begin(self, layout: StatisticsLayout, resume: bool) -> None:
        """Finds out where to begin, and makes a new file unless one is resumed."""
        if resume and self._state.exists() and self.unfinished.exists():
            with open_state(self._state, "unfinished statistics", _MAX_STATE_BYTES) as (stated, arrays):
                self.first_pass, self.first_window = int(stated.pop("pass")), int(stated.pop("window"))
                self._has_sums = len(arrays) > 1
            check_same_run(self._state, stated, self._run)
            return
        self._state.unlink(missing_ok=True)  # first: with a new file it would stand for sums that are not there
        layout.create(self.unfinished)

    def begin_pass(self, sums: HessianSums, number: int, window: int) -> None:
        """From now on `sums` are saved; those of the first pass are first filled with the saved sums."""
        if self._has_sums and number == self.first_pass:
            with open_state(self._state, "unfinished statistics", _MAX_STATE_BYTES) as (_, arrays):
                for name, array in _arrays(sums).items():
                    array[...] = arrays[name]
        self._sums, self._number, self._window = sums, number, window
        self._saved_tokens = sums.count_tokens()

    def reached(self, window: int, *, is_last: bool) -> None:
        """So many windows of the pass are in the sums; saves them if the last saving is long enough ago."""
        self._window = window
        now = time.monotonic()
        if is_last or now - self._saved < max(self._save_seconds, _SAVED_SHARE * self._cost):
            return
        self._save()
        self._saved = time.monotonic()
        self._cost = self._saved - now if self._save_seconds else 0.0

    def close_pass(self) -> None:
        """The pass is in the file; a resumed run begins with the next one."""
        with open(self.unfinished, "rb+") as file:
            os.fsync(file.fileno())
        self._write(self._number + 1, 0, {})
        self._sums = None

    def finish(self) -> None:
        with open(self.unfinished, "rb+") as file:
            os.fsync(file.fileno())
        put_in_place([(self.unfinished, self._place)])
        self._state.unlink(missing_ok=True)

    def _save_interrupted(self) -> None:
        sums = self._sums
        if sums is None or not sums.is_between or sums.count_tokens() == self._saved_tokens:
            return
        nbytes = sum(array.nbytes for array in _arrays(sums).values())
        if nbytes > _NOTICED_BYTES:
            message = f"interrupted; {nbytes / 1e9:.1f} GB of sums are being saved; a second interrupt does without"
            warnings.warn(message, PocketquantWarning, stacklevel=2)
        try:
            self._save()
        except OutputError as error:  # the interrupt itself is reported in the end
            warnings.warn(f"the work done so far cannot be kept: {error}", PocketquantWarning, stacklevel=2)

    def _save(self) -> None:
        assert self._sums is not None
        self._write(self._number, self._window, _arrays(self._sums))
        self._saved_tokens = self._sums.count_tokens()

    def _write(self, number: int, window: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        write_state(self._state, {**self._run, "pass": number, "window": window}, arrays)


def _arrays(sums: HessianSums) -> dict[str, npt.NDArray[Any]]:
    """All arrays that a pass sums, by name."""
    arrays: dict[str, npt.NDArray[Any]] = {f"sums {key}": array for key, array in sums.sums.items()}
    arrays |= {f"counts {key}": array for key, array in sums.counts.items()}
    arrays |= {f"rounding {key}": array for key, array in sums.rounding.items()}
    arrays |= {f"seen {key}": array for key, array in sums.tokens.items()}
    if sums.head is not None:
        arrays |= {"head": sums.head.sums, "variance": sums.head.variance, "tokens": sums.head.tokens}
        arrays["head rounding"] = sums.head.rounding
    return arrays

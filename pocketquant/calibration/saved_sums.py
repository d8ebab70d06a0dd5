"""What a calibration has done so far, on disk: the file as far as it is, and the sums of the pass that is being run."""

from __future__ import annotations

import json
import os
import time
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.calibration.hessian import MomentSums
from pocketquant.calibration.statistics_writing import Layout
from pocketquant.errors import EvalError, OutputError, PocketquantWarning
from pocketquant.files.interrupts import put_in_place, resumable
from pocketquant.files.leftovers import holding
from pocketquant.files.replacing import check_target, hidden_beside, replacing
from pocketquant.files.small import open_regular

_MAX_STATE_BYTES = 1 << 40
_SAVED_SHARE = 20
"""Saving takes at most about a twentieth of the time."""

_NOTICED_BYTES = 1 << 28
"""What takes longer to save than an interrupt should is announced."""


class SavedSums:
    """Unfinished work beside an output: `.NAME.unfinished` is the file, `.NAME.state` the sums of its current pass.

    Attributes:
        unfinished: path of the file.
        first_pass: number of the pass to begin with.
        first_window: of that pass, the window to begin with; some sums may hold a part of it.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], save_seconds: float) -> None:
        """`run` is what a run must state to go on from here; sums are saved every `save_seconds` at most."""
        self._place = check_target(out)
        self.unfinished, self._state = hidden_beside(out, "unfinished"), hidden_beside(out, "state")
        self._run, self._save_seconds = run, save_seconds
        self.first_pass = self.first_window = 0
        self._has_sums = False
        self._saved, self._cost = time.monotonic(), 0.0
        self._sums: MomentSums | None = None
        self._number = self._window = 0
        self._saved_tokens: dict[str, int] = {}

    @contextmanager
    def begun(self, layout: Layout, resume: bool) -> Iterator[None]:
        """Keeps other runs away. An interrupt of the block saves what is there; what cannot be taken up goes.

        Raises:
            EvalError: what is to be taken up is of another run.
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

    def _begin(self, layout: Layout, resume: bool) -> None:
        """Finds out where to begin; a new file unless an unfinished one is to be taken up."""
        if resume and self._state.exists() and self.unfinished.exists():
            stated, self._has_sums = self._read()
            self.first_pass, self.first_window = int(stated.pop("pass")), int(stated.pop("window"))
            if stated != self._run:
                differs = ", ".join(key for key in self._run if stated.get(key) != self._run[key])
                raise EvalError(
                    f"{self._state}: was begun with other settings ({differs}); delete it, or repeat the same command"
                )
            return
        self._state.unlink(missing_ok=True)  # first: with a new file it would stand for sums that are not there
        layout.create(self.unfinished)

    def begin_pass(self, sums: MomentSums, number: int, window: int) -> None:
        """From now on `sums` are those to save; of the first pass, they are filled with what was saved."""
        if self._has_sums and number == self.first_pass:
            with np.load(self._state, allow_pickle=False) as arrays:
                for name, array in _arrays(sums).items():
                    array[...] = arrays[name]
        self._sums, self._number, self._window = sums, number, window
        self._saved_tokens = sums.count_tokens()

    def reached(self, window: int, *, is_last: bool) -> None:
        """So many windows of the pass are in the sums; saves them if that was last done long enough ago."""
        self._window = window
        now = time.monotonic()
        if is_last or now - self._saved < max(self._save_seconds, _SAVED_SHARE * self._cost):
            return
        self._save()
        self._saved = time.monotonic()
        self._cost = self._saved - now if self._save_seconds else 0.0

    def close_pass(self) -> None:
        """The pass is in the file; from now on begin with the next one."""
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
        except OutputError as error:  # the interrupt is what is said in the end
            warnings.warn(f"what was done cannot be kept: {error}", PocketquantWarning, stacklevel=2)

    def _save(self) -> None:
        assert self._sums is not None
        self._write(self._number, self._window, _arrays(self._sums))
        self._saved_tokens = self._sums.count_tokens()

    def _write(self, number: int, window: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        run = json.dumps({**self._run, "pass": number, "window": window})
        with replacing(self._state, is_result=False) as temporary, open(temporary, "wb") as file:
            np.savez(file, run=np.array(run), **arrays)  # type: ignore[arg-type]

    def _read(self) -> tuple[dict[str, Any], bool]:
        """What the state says of its run, and whether it holds sums."""
        try:
            if self._state.stat().st_size > _MAX_STATE_BYTES:
                raise ValueError("too large")
            with open_regular(self._state, EvalError) as file, np.load(file, allow_pickle=False) as arrays:
                stated, has_sums = json.loads(str(arrays["run"])), len(arrays.files) > 1
            if not isinstance(stated, dict) or not {"pass", "window"} <= stated.keys():
                raise ValueError("says nothing of a run")
            return stated, has_sums
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise EvalError(
                f"{self._state}: not the state of unfinished statistics ({type(error).__name__}); delete it"
            ) from error


def _arrays(sums: MomentSums) -> dict[str, npt.NDArray[Any]]:
    """Everything that a pass has summed, by name."""
    arrays: dict[str, npt.NDArray[Any]] = {f"sums {key}": array for key, array in sums.sums.items()}
    arrays |= {f"counts {key}": array for key, array in sums.counts.items()}
    arrays |= {f"rounding {key}": array for key, array in sums.rounding.items()}
    arrays |= {f"seen {key}": array for key, array in sums.tokens.items()}
    if sums.head is not None:
        arrays |= {"head": sums.head.sums, "variance": sums.head.variance, "tokens": sums.head.tokens}
        arrays["head rounding"] = sums.head.rounding
    return arrays

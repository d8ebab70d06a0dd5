"""The hidden states and gradients between a model's layers, on disk while it is processed layer by layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.calibration.statistics_writing import StatisticsLayout
from pocketquant.errors import EvalError
from pocketquant.files.interrupts import put_in_place, resumable
from pocketquant.files.leftovers import holding
from pocketquant.files.replacing import check_target, replacing
from pocketquant.files.resuming import check_same_run
from pocketquant.files.small import read_object
from pocketquant.formats import F32Array

_ABOUT = "run.json"


class LayerStates:
    """Hidden states and gradients between the layers, each a file of f32[n_window, context, n_embd].

    A file exists only when it is whole, so the files show how far an interrupted run came.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self._folder, self._shape = folder, shape
        self.unfinished = folder / "unfinished"

    @contextmanager
    def begun(self, layout: StatisticsLayout, run: dict[str, Any], resume: bool) -> Iterator[None]:
        """Makes a new folder unless a run is resumed, and keeps other runs away from it."""
        how = f"finished layers are kept in {self._folder}; the same command with --resume goes on from there"
        with holding(self._folder), resumable(self._folder / _ABOUT, how):
            self._begin(layout, run, resume)
            yield

    def _begin(self, layout: StatisticsLayout, run: dict[str, Any], resume: bool) -> None:
        about = self._folder / _ABOUT
        if resume and about.exists():
            check_same_run(self._folder, read_object(about, EvalError), run)
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        layout.create(self.unfinished)
        about.write_text(json.dumps(run))

    def has(self, kind: str, number: int) -> bool:
        """Whether all states of a layer's input exist."""
        return self._path(kind, number).exists()

    def gradients(self) -> int | None:
        """The lowest layer whose input gradients are known; None if none are."""
        return min((int(path.suffix[1:]) for path in self._folder.glob("gradient.*")), default=None)

    def write(self, kind: str, number: int, parts: Iterator[tuple[slice, F32Array]]) -> None:
        """Writes the states of all windows, part by part."""
        with replacing(self._path(kind, number), is_result=False) as temporary:
            array = np.memmap(temporary, np.float32, "w+", shape=self._shape)
            for part, values in parts:
                array[part] = values
            array.flush()

    @contextmanager
    def reading(self, kind: str, number: int) -> Iterator[npt.NDArray[np.float32]]:
        """A file of states, mapped for as long as the block runs."""
        yield np.memmap(self._path(kind, number), np.float32, "r", shape=self._shape)

    def drop(self, kind: str, number: int) -> None:
        """Deletes states that are no longer needed."""
        self._path(kind, number).unlink(missing_ok=True)

    def finish(self, out: Path) -> None:
        """Moves the finished statistics to `out` and deletes the folder."""
        put_in_place([(self.unfinished, check_target(out))])
        shutil.rmtree(self._folder)

    def _path(self, kind: str, number: int) -> Path:
        return self._folder / f"{kind}.{number}"

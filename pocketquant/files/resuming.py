"""The file that keeps the state of unfinished work: the run that it belongs to, and arrays of numbers."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.errors import EvalError
from pocketquant.files.replacing import replacing
from pocketquant.files.small import open_regular


def check_same_run(path: Path, stated: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Refuses unfinished work of another run.

    Raises:
        EvalError: what `path` states differs from `run`; names the settings that differ.
    """
    differing = [key for key in dict.fromkeys([*run, *stated]) if stated.get(key) != run.get(key)]
    if differing:
        raise EvalError(
            f"{path}: was begun with other settings ({', '.join(differing)}); delete it, or repeat the same command"
        )


def write_state(path: Path, run: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Replaces the state with that of a run; OutputError if it cannot be written."""
    with replacing(path, is_result=False) as temporary, open(temporary, "wb") as file:
        np.savez(file, run=np.array(json.dumps(run)), **arrays)  # type: ignore[arg-type]


@contextmanager
def open_state(path: Path, what: str, max_bytes: int) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
    """Opens a state: what it says of its run, and its arrays, "run" among them; each is read when it is asked for.

    Raises:
        EvalError: it is not the state of `what`, or is damaged, or larger than `max_bytes`; also where a value that
            the block expects is missing or of another kind.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise ValueError("too large")
        with open_regular(path, EvalError) as file, np.load(file, allow_pickle=False) as arrays:
            run = json.loads(str(arrays["run"]))
            if not isinstance(run, dict):
                raise ValueError("says nothing of a run")
            yield run, arrays
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise EvalError(f"{path}: not the state of {what} ({type(error).__name__}); delete it") from error

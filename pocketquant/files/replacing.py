"""Outputs: a file appears under its name when it is whole, and replaces no input."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pocketquant.errors import OutputError, listing
from pocketquant.files.interrupts import put_in_place
from pocketquant.files.leftovers import FOLDER_LOCK, hidden_name, hidden_prefix, make_held_file, remove_leftovers
from pocketquant.files.reading import files_of

_FLUSH_SECONDS = 0.2
_PARTIAL = ".partial"
"""Ending of a file that is being written."""
_umask_lock = threading.Lock()


def check_target(target: Path) -> Path:
    """Where an output goes: the path itself, or what a link there leads to.

    Raises:
        OutputError: a folder stands there, a device, a pipe: anything that a file cannot take the place of.
    """
    try:
        place = target.resolve()
        is_there = place.exists()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise OutputError(f"{target}: cannot be written: {error}") from error
    if place.is_dir():
        raise OutputError(f"{target}: is a folder; give a file name")
    if is_there and not place.is_file():
        raise OutputError(f"{target}: is a device or a pipe, which a file cannot replace; give a file name")
    return place


def _refuse_one_place(outputs: Sequence[Path]) -> list[Path]:
    """Where outputs go, each to a place of its own."""
    places: dict[Path, Path] = {}
    twice = []
    for output in outputs:
        first = places.setdefault(check_target(output), output)
        if first is not output:
            twice.append(f"{output}" if first == output else f"{first} and {output}")
    if twice:
        raise OutputError(f"two outputs would take one place; give each a name of its own:\n{listing(twice)}")
    return list(places)


def hidden_beside(target: Path, what: str) -> Path:
    """`.NAME.what` beside where an output goes: what lies on disk meanwhile, on the disk that the output will be on."""
    place = check_target(target)
    return place.with_name(hidden_name(place.name, f".{what}"))


def refuse_overwriting(
    outputs: Iterable[Path], inputs: Iterable[Path | str | None], *, makes_folder: bool = False
) -> None:
    """Refuses outputs that would take the place of what they are made from, through links or not.

    Args:
        outputs: files that will be written.
        inputs: files and checkpoint folders that are read, and what may be one; names that are none do not matter.
        makes_folder: the outputs' folder is made where it is missing.

    Raises:
        OutputError: an output is an input, two outputs are one file (all listed), one is no file (see `check_target`),
            or the folder is missing.
    """
    outputs = list(outputs)
    places = _refuse_one_place(outputs)
    for output, place in zip(outputs, places, strict=True):
        _check_folder(output, place.parent, is_made=makes_folder)
    read = {_identity(file): file for given in inputs if given is not None for file in files_of(Path(given))}
    read.pop(None, None)
    problems = []
    for output in outputs:
        file = read.get(_identity(check_target(output)))
        if file is not None:
            problems.append(f"{output}" if file == output else f"{output} is {file}")
    if problems:
        raise OutputError(f"an output would replace what it is made from; give it another name:\n{listing(problems)}")


def _check_folder(output: Path, folder: Path, *, is_made: bool) -> None:
    """Before anything is planned: the folder of an output has to be there, or possible to make."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise OutputError(f"{output}: cannot be written: {there} is no folder; give another place")
    if not is_made and there != folder:
        raise OutputError(f"{output}: cannot be written: there is no folder {folder}; make it first")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{output}: cannot be written: no permission to write in {there}; give another place")


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and number of a file, the same under every name of it; None if there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    return found.st_dev, found.st_ino


@contextmanager
def replacing(target: Path, *, is_result: bool = True) -> Iterator[Path]:
    """Gives a temporary path beside `target`; moves it there only if the block ends well.

    A link at `target` stays, and what it leads to is replaced. Temporary files that a killed process left of the same
    target are removed first. `is_result` as in `put_in_place`.

    Raises:
        OutputError: the folder is missing or cannot be written, the disk is full, or `target` is no regular file. What
            stood at `target` stays.
    """
    with replacing_together([target], is_result=is_result) as (temporary,):
        yield temporary


@contextmanager
def replacing_together(targets: Sequence[Path], *, is_result: bool = True) -> Iterator[list[Path]]:
    """The same for several targets: none is replaced before all are finished, and an interrupt replaces all or none.

    The first one appears last, so that where it is, the others are too.

    Raises:
        OutputError: as `replacing`.
    """
    places = _refuse_one_place(targets)
    with ExitStack() as stack:
        temporaries = []
        for target, place in zip(targets, places, strict=True):
            try:
                temporaries.append(stack.enter_context(_temporary(place)))
            except OSError as error:
                raise OutputError(f"{target}: cannot be written: {error.strerror}") from error
        try:
            yield temporaries
            with _umask_lock:  # it can only be read by setting it, and is the whole process's
                umask = os.umask(0)
                os.umask(umask)
            for temporary in temporaries:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                temporary.chmod(0o666 & ~umask)
        except OSError as error:
            raise OutputError(f"{targets[0]}: cannot be written: {error.strerror}") from error
        put_in_place(reversed(list(zip(temporaries, places, strict=True))), is_result=is_result)


@contextmanager
def _temporary(place: Path) -> Iterator[Path]:
    """A file beside `place`, held while the block runs and gone afterwards."""
    prefix = hidden_prefix(place.name, _PARTIAL)
    remove_leftovers(place.parent, prefix, _PARTIAL)
    remove_leftovers(place.parent, hidden_prefix(place.name, FOLDER_LOCK), FOLDER_LOCK)  # of `work_folder`
    path, descriptor = make_held_file(place.parent, prefix, _PARTIAL)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def flushed_meanwhile(path: Path) -> Iterator[None]:
    """Has what the block writes to a file sent to its disk while the block goes on, so that little is left to wait for.

    Raises:
        OSError: the disk failed. The system says so once, so it must not be lost here.
    """
    is_over, failures = threading.Event(), list[OSError]()

    def flush() -> None:
        try:
            with open(path, "r+b", buffering=0) as file:
                while not is_over.wait(_FLUSH_SECONDS):
                    os.fsync(file.fileno())
        except OSError as error:
            failures.append(error)

    flusher = threading.Thread(target=flush, name="flush", daemon=True)
    flusher.start()
    try:
        yield
    finally:
        is_over.set()
        flusher.join()
    if failures:
        raise failures[0]

"""The finished files of a job that is not finished yet. A file's key stands for all that the file depends on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pocketquant.errors import OutputError, SourceError
from pocketquant.files.interrupts import resumable
from pocketquant.files.leftovers import holding, work_folder
from pocketquant.files.reading import sha256_of
from pocketquant.files.replacing import replacing
from pocketquant.files.small import read_json

_UNFINISHED = ".unfinished"
"""Ending of an importance matrix's state; see `collect_importance`."""


@contextmanager
def unfinished_work(out: Path, name: str) -> Iterator[tuple[Path, Path]]:
    """Makes two hidden folders inside `out`, which no other run touches meanwhile. Folders that stay empty are removed.

    Args:
        out: made if missing.
        name: of the first folder, which a later run takes up; it begins with a dot.

    Returns:
        That folder, and one for what no later run needs, which is gone afterwards.

    Raises:
        OutputError: they cannot be made or written, or another run has them.
    """
    made_out, folder = not out.exists(), out / name
    how = f"what is finished is kept in {folder}; the same command goes on from there, and removes what is unfinished"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with holding(folder), resumable(folder, how):
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise OutputError(
                    f"{folder}: is not a folder, but unfinished work is kept in a folder of that name; remove it"
                )
            folder.mkdir(mode=0o700, exist_ok=True)
            try:
                with work_folder(out / name.removeprefix(".")) as passing:
                    yield folder, passing
            finally:
                with suppress(OSError):  # not empty
                    folder.rmdir()
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}") from error
    finally:
        if made_out:
            with suppress(OSError):
                out.rmdir()


class Finished:
    """A folder of finished files. Beside each stands `KEY.json` with its name, its digest and its entry in reports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, dict[str, Any]] = {}

    def has(self, key: str) -> bool:
        """Whether the file of that key is there."""
        return key in self._known

    def entry(self, key: str) -> Any:
        """What `keep` was given, read back."""
        return self._known[key]["entry"]

    def nbytes(self, key: str, name: str) -> int:
        """Bytes of a file, 0 if it is not there."""
        return (self.folder / name).stat().st_size if key in self._known else 0

    def keep(self, key: str, name: str, entry: Any) -> None:
        """Notes that a file of the folder is finished; the next run takes it up."""
        stated = {"key": key, "file": name, "sha256": sha256_of(self.folder / name), "entry": entry}
        with replacing(self.folder / f"{key}.json", is_result=False) as temporary:
            temporary.write_text(json.dumps(stated, ensure_ascii=False), encoding="utf-8")
        self._known[key] = json.loads(json.dumps(stated))

    def forget_all_but(self, wanted: Iterable[tuple[str, str]], state: Path) -> None:
        """Takes up those files (key, name) that are there and whole, and removes everything else but `state`."""
        for key, name in wanted:
            stated, path = self._read(key), self.folder / name
            if stated is not None and stated["file"] == name and path.is_file() and sha256_of(path) == stated["sha256"]:
                self._known[key] = stated
        self._remove_all_but({f"{key}.json" for key in self._known} | {state.name})

    def tidy(self) -> None:
        """Removes what is not finished."""
        keys = [path.stem for path in self.folder.glob("*.json")]
        found = {key: stated for key in keys if (stated := self._read(key)) is not None}
        self._known = {key: stated for key, stated in found.items() if (self.folder / stated["file"]).is_file()}
        states = {path.name for path in self.folder.glob(f"*{_UNFINISHED}")}
        self._remove_all_but({f"{key}.json" for key in self._known} | states)

    def _remove_all_but(self, kept: set[str]) -> None:
        kept = kept | {str(stated["file"]) for stated in self._known.values()}
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def _read(self, key: str) -> dict[str, Any] | None:
        try:
            stated = read_json(self.folder / f"{key}.json")
        except SourceError:
            return None
        is_right = isinstance(stated, dict) and stated.keys() == {"key", "file", "sha256", "entry"}
        return stated if is_right and stated["key"] == key and isinstance(stated["file"], str) else None

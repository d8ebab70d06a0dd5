"""What the files of a repository are taken for, whichever hub it is on."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pocketquant.convert.folder import ADAPTER_CONFIG
from pocketquant.convert.http_ranges import HttpFile
from pocketquant.convert.safetensors import RangeFile
from pocketquant.convert.snapshot import Snapshot
from pocketquant.errors import OutputError, SourceError, listing
from pocketquant.files.reading import sha256_of
from pocketquant.files.small import MAX_JSON_BYTES

MAX_SMALL_FILES = 200
_SMALL = re.compile(r"[\w.+-]+\.json|[\w.+-]+\.jinja|additional_chat_templates/[\w.+-]+\.jinja|README\.md")
_NOT_READ = {"vocab.json"}  # tokenizer.json holds it too
_WEIGHTS = re.compile(r"[\w.+-]+\.safetensors")


def small_files(label: str, sizes: Mapping[str, int | None]) -> list[str]:
    """The configs, tokenizer, templates and model card: what is fetched whole.

    Args:
        label: the repository, for errors.
        sizes: every file's size in bytes; None where the hub did not say.

    Raises:
        SourceError: no config.json, or files of a size that none of these has (all listed).
    """
    names = [name for name in sizes if _SMALL.fullmatch(name) and not name.startswith(".") and name not in _NOT_READ]
    if "config.json" not in names and ADAPTER_CONFIG in names:
        raise SourceError(
            f"{label}: an adapter and no checkpoint; give its base model as the source, and a local folder with this "
            "adapter with --adapter"
        )
    if "config.json" not in names:
        found = ", ".join(sorted(sizes)[:10]) or "nothing"
        raise SourceError(f"{label}: no config.json, so no checkpoint to convert; it holds {found}")
    too_large = [f"{name}: {sizes[name]} bytes" for name in names if (sizes[name] or 0) > MAX_JSON_BYTES]
    if too_large or len(names) > MAX_SMALL_FILES:
        raise SourceError(f"{label}: more or larger files than a checkpoint has:\n{listing(too_large or names)}")
    return names


def weight_files(label: str, sizes: Mapping[str, int | None]) -> list[str]:
    """The safetensors files; SourceError if there is none, or the hub does not say how large they are."""
    names = sorted(name for name in sizes if _WEIGHTS.fullmatch(name) and not name.startswith("."))
    if not names:
        raise SourceError(f"{label}: no *.safetensors file; only checkpoints in safetensors can be converted")
    unknown = [name for name in names if sizes[name] is None]
    if unknown:
        raise SourceError(f"{label}: the hub does not say how large these files are:\n{listing(unknown)}")
    return names


@contextmanager
def named_snapshot(
    folder: Path, name: str, label: str, weights: Mapping[str, RangeFile], entries: tuple[str, ...] = ()
) -> Iterator[Snapshot]:
    """A snapshot whose folder has the model's name; errors raised meanwhile name the repository, not the folder.

    Metadata and file names are made from the folder's name, and a cache's folder is named by commit.
    """
    with tempfile.TemporaryDirectory(prefix="pocketquant-") as temporary:
        link = Path(temporary) / name
        link.symlink_to(folder.resolve(), target_is_directory=True)
        try:
            yield Snapshot(link, weights, entries, origin=tuple(repr(weights[name]) for name in sorted(weights)))
        except Exception as error:
            if error.args and isinstance(error.args[0], str) and str(link) in error.args[0]:
                error.args = (error.args[0].replace(str(link), label), *error.args[1:])
            raise


def check_room(folder: Path, nbytes: int) -> None:
    """Makes a folder and checks that its disk has room for that many bytes more; OutputError otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error
    if free < nbytes:
        raise OutputError(f"{folder}: the checkpoint takes {nbytes:,} bytes more and the disk has {free:,} left")


def missing_bytes(folder: Path, files: Mapping[str, HttpFile]) -> int:
    """Bytes of the files that are not in a folder yet."""
    return sum(file.size or 0 for name, file in files.items() if not (folder / name).is_file())


def check_digests(folder: Path, digests: Mapping[str, str | None]) -> None:
    """Compares whole files with the sha256 that their hub lists; SourceError lists those that differ."""
    wrong = [
        f"{folder / name}: expected {digest}, is {found}"
        for name, digest in digests.items()
        if digest and (found := sha256_of(folder / name)) != digest
    ]
    if wrong:
        raise SourceError(f"files differ from their hub's sha256; delete them and run again:\n{listing(wrong)}")

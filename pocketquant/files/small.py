"""The one door for every small file: configs, tokenizers, cards, recipes, limits, reports, texts, and headers.

Small files come from anywhere, as weights do. Only regular files are read: a pipe would block for ever, a device has
no end. Each is read whole up to a size, has to be UTF-8 where it is text, and holds no nesting, number or text that
would break what works with it later: nesting up to 100, integers that f64 holds, no half of a surrogate pair.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from pocketquant.errors import PocketquantError, SourceError, listing
from pocketquant.escaping import is_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_JSON_BYTES = 64 << 20
"""Four times the largest tokenizer of the family, with room for the index of a model of 100,000 tensors."""
MAX_TEXT_BYTES = 256 << 20
MAX_DEPTH = 100
MAX_DIGITS = 308
"""Of an integer; f64 ends at 1.8e308."""
MAX_CONTAINERS = 4_000_000
"""Lists and objects in one file: of two characters each, they take thirty times as much memory as the file."""

_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_LONG_KEY = re.compile(
    r"""(?<![\w"'-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){%d}""" % MAX_DEPTH  # noqa: UP031 braces
)
"""A key of TOML of so many parts takes a parser time that grows with their square."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

Error = type[PocketquantError]


def is_present(path: Path | str, error: Error = SourceError) -> bool:
    """Whether anything has this name, be it a link to nothing.

    Raises:
        error: that cannot be known: a folder without permission, a name that is too long.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as problem:
        _refuse(path, problem, error)
    return True


def kind_of(path: Path | str, error: Error = SourceError) -> str:
    """ "file", "folder", "other" (see `refuse_other`), or "" where nothing is; errors as `is_present`."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as problem:
        _refuse(path, problem, error)
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def refuse_other(path: Path | str, error: Error = SourceError) -> None:
    """Refuses what is there and neither file nor folder, before it would be called missing; errors as `is_present`.

    Raises:
        error: a pipe, a device or a socket.
    """
    if kind_of(path, error) == "other":
        raise _of_another_kind(path, os.stat(path).st_mode, error)


def open_regular(path: Path | str, error: Error = SourceError) -> BinaryIO:
    """Opens a regular file to read bytes from.

    Raises:
        error: it cannot be opened, or is a folder, a pipe, a device or a socket; or its name is no UTF-8, as everything
            is that could name it: metadata, reports, packs.
    """
    if not is_text(os.path.basename(path)):
        raise error(f"{path}: cannot be read: its name is no UTF-8; rename it")
    refuse_other(path, error)  # a socket could not be opened
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for a writer
    except (OSError, ValueError) as problem:
        _refuse(path, problem, error)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _of_another_kind(path, mode, error)
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path | str, most: int, error: Error = SourceError) -> bytes:
    """All bytes of a regular file.

    Raises:
        error: it cannot be read, is no regular file, or holds more than `most` bytes.
    """
    with open_regular(path, error) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = file.read(most + 1) if size <= most else b""
        except OSError as problem:
            _refuse(path, problem, error)
    if max(size, len(data)) > most:
        raise error(f"{path}: {max(size, len(data))} bytes, larger than the {most} that such a file may have")
    return data


def read_text(path: Path | str, most: int = MAX_TEXT_BYTES, error: Error = SourceError) -> str:
    """A file's text, line ends as they are; errors as `read_bytes`, and for what is no UTF-8."""
    return as_text(read_bytes(path, most, error), path, error)


def as_text(data: bytes, where: Path | str, error: Error = SourceError) -> str:
    """UTF-8 as text; the error names the first byte that is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{where}: byte {problem.start} is not UTF-8; save it as UTF-8") from problem


def read_json(path: Path | str, most: int = MAX_JSON_BYTES, error: Error = SourceError) -> Any:
    """A JSON file's value; errors as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, most, error), path, error)


def read_object(path: Path | str, error: Error = SourceError) -> dict[str, Any]:
    """The same of a file that has to hold an object."""
    value = read_json(path, error=error)
    if not isinstance(value, dict):
        raise error(f"{path}: no JSON object")
    return value


def read_optional_object(path: Path | str, error: Error = SourceError) -> dict[str, Any]:
    """The same, {} where there is no such file; a link to nothing, a pipe or a folder in its place are refused."""
    return read_object(path, error) if is_present(path, error) else {}


def parse_json(data: bytes | str, where: Path | str, error: Error = SourceError, *, unique: bool = False) -> Any:
    """JSON as every reader has it that knows f64 only: a number beyond f64, of whatever length, is infinite.

    NaN and Infinity, which Python writes and JSON does not have, are for the caller to refuse, who knows what they are
    given for.

    Args:
        data: UTF-8.
        where: for errors.
        error: the kind of error to raise.
        unique: whether no object may have a key twice; where it may, the last one counts.

    Raises:
        error: it is broken, nested deeper than `MAX_DEPTH`, of more lists and objects than `MAX_CONTAINERS`, or holds
            half of a surrogate pair; or keys come twice that may not (all listed).
    """
    text = as_text(data, where, error) if isinstance(data, bytes) else data
    n_containers = text.count("[") + text.count("{")
    if n_containers > MAX_CONTAINERS:
        raise error(f"{where}: broken JSON: {n_containers} lists and objects are more than any such file has")
    repeated: list[str] = []
    options: dict[str, Any] = {"object_pairs_hook": lambda pairs: _once(pairs, repeated)} if unique else {}
    try:
        value = json.loads(text, parse_int=_whole, **options)
        if n_containers > MAX_DEPTH:
            deque(_levels(value), maxlen=0)
        if _HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as problem:
        raise error(f"{where}: broken JSON: a text with half of a surrogate pair, which is no character") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: broken JSON: {problem}") from problem
    if repeated:
        raise error(
            f"{where}: keys twice, so nobody knows which of the two is meant; save or download the file again:\n"
            f"{listing(repeated)}"
        )
    return value


def read_toml(path: Path | str, most: int, error: Error) -> dict[str, Any]:
    """A TOML file's table; errors as `read_bytes` and `parse_toml`."""
    return parse_toml(read_text(path, most, error), path, error)


def parse_toml(text: str, where: Path | str, error: Error) -> dict[str, Any]:
    """TOML.

    Raises:
        error: it is broken, nested deeper than `MAX_DEPTH`, or holds an integer that f64 does not.
    """
    text = text.removeprefix("\ufeff")  # which some editors write, and TOML 1.1 ignores
    if _LONG_KEY.search(text):
        raise error(f"{where}: not valid TOML: a key of more than {MAX_DEPTH} parts")
    try:
        table = tomllib.loads(text)
        for level in _levels(table):
            if any(type(item) is int and abs(item) >= 10**MAX_DIGITS for item in level):
                raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: not valid TOML: {problem}") from problem
    return table


def _refuse(path: Path | str, problem: OSError | ValueError, error: Error) -> NoReturn:
    reason = problem.strerror if isinstance(problem, OSError) else problem  # ValueError: a name with a NUL
    raise error(f"{path}: cannot be read: {reason or problem}") from problem


def _of_another_kind(path: Path | str, mode: int, error: Error) -> PocketquantError:
    kind = _KINDS.get(stat.S_IFMT(mode), "no file")
    return error(f"{path}: cannot be read: it is {kind}; only regular files are read")


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def _once(pairs: list[tuple[str, Any]], repeated: list[str]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return entries


def _levels(value: Any) -> Iterator[list[Any]]:
    """All values below one, level by level; ValueError below `MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [item for item in level if type(item) in (dict, list)]
        level = [item for each in containers for item in (each.values() if type(each) is dict else each)]
        if not level:
            return
        yield level
    raise ValueError(f"nested deeper than {MAX_DEPTH}")

"""What the values of a parsed JSON file have to be, as a table; and what is wrong with those that are something else.

A value that is read as something else than it is decides something that nobody wrote: `"false"` is true, a list of
nothing is no template. Every key may be missing or null, which says nothing; keys that a table lacks are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from pocketquant.errors import PocketquantError, listing

_MOST_PROBLEMS = 100


@dataclass(frozen=True)
class Leaf:
    """A value without parts: what it is called in messages, and what tells it."""

    words: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Fields:
    """An object with known keys; what else it holds does not matter."""

    kinds: Mapping[str, Kind]
    words = "an object"


@dataclass(frozen=True)
class Values:
    """An object of any keys, whose values are all of one kind."""

    kind: Kind
    words = "an object"


@dataclass(frozen=True)
class Each:
    """A list whose items are all of one kind."""

    kind: Kind
    words = "a list"


@dataclass(frozen=True)
class Either:
    """One of several kinds, told apart by what a value is outside: a text, a list, an object."""

    kinds: tuple[Kind, ...]

    @property
    def words(self) -> str:
        return " or ".join(dict.fromkeys(kind.words for kind in self.kinds))


Kind: TypeAlias = "Leaf | Fields | Values | Each | Either"

TEXT = Leaf("a text", lambda value: isinstance(value, str))
FLAG = Leaf("true or false", lambda value: isinstance(value, bool))
WHOLE = Leaf("a whole number", lambda value: type(value) is int)
COUNT = Leaf("a whole number from 0 on", lambda value: type(value) is int and 0 <= value < 1 << 63)
NUMBER = Leaf("a number", lambda value: type(value) in (int, float))


def refuse_other_kinds(value: Any, kind: Kind, path: Path | str, error: type[PocketquantError]) -> None:
    """Refuses a file whose values are of other kinds than those that read them take.

    Raises:
        error: some are (all listed, each with its key).
    """
    problems = find_other_kinds(value, kind)
    if problems:
        raise error(f"{path}: values of another kind than what reads them takes; correct these:\n{listing(problems)}")


def find_other_kinds(value: Any, kind: Kind, where: str = "") -> list[str]:
    """Each value of another kind: its key, what it is, what was expected; the first hundred."""
    return list(islice(_problems(value, kind, where), _MOST_PROBLEMS))


def _problems(value: Any, kind: Kind, where: str) -> Iterator[str]:
    if value is None:
        return
    chosen = next((each for each in kind.kinds if _is_outside(value, each)), kind) if isinstance(kind, Either) else kind
    if isinstance(chosen, Either) or not _is_outside(value, chosen):
        yield f"{where or 'the file'}: {value!r:.80}, expected {chosen.words}"
    elif isinstance(chosen, Fields):
        for key, inner in chosen.kinds.items():
            yield from _problems(value.get(key), inner, f"{where}.{key}" if where else key)
    elif isinstance(chosen, Values):
        for key, item in value.items():
            yield from _problems(item, chosen.kind, f"{where}.{key:.80}" if where else f"{key:.80}")
    elif isinstance(chosen, Each):
        for i, item in enumerate(value):
            if item is None:
                yield f"{where}[{i}]: null, expected {chosen.kind.words}"
            yield from _problems(item, chosen.kind, f"{where}[{i}]")


def _is_outside(value: Any, kind: Kind) -> bool:
    """Whether a value is of a kind, its parts left aside."""
    if isinstance(kind, Leaf):
        return kind.fits(value)
    return isinstance(value, list if isinstance(kind, Each) else dict)

"""Takes values out of JSON that anybody may have written: each is checked as it is taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pocketquant.errors import EvalError

MAX_ROWS = 256
MAX_CHARACTERS = 300


def mapping(found: Any) -> Mapping[str, Any]:
    """An object; an empty one for anything else."""
    return found if isinstance(found, Mapping) else {}


def listed(found: Any, most: int, where: str, what: str) -> list[Mapping[str, Any]]:
    """The objects of a list; nothing for anything else.

    Raises:
        EvalError: more than `most`.
    """
    items = found if isinstance(found, list) else []
    if len(items) > most:
        raise EvalError(f"{where}: {len(items)} {what} are more than the {most} that a page shows")
    return [item for item in items if isinstance(item, Mapping)]


def items(found: Any) -> Iterable[Any]:
    """The first of a list; nothing for anything else."""
    return found[:MAX_ROWS] if isinstance(found, list) else ()


def number(found: Any) -> float | None:
    """A number that a chart has an axis for: 0 for less than 1e-30; None above 1e30 and for anything else."""
    if not isinstance(found, int | float) or isinstance(found, bool) or not abs(found) <= 1e30:  # NaN is not, either
        return None
    return 0.0 if abs(found) < 1e-30 else float(found)


def whole(found: Any) -> int | None:
    """An integer that is not negative; None for anything else."""
    is_whole = isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 1 << 63
    return found if is_whole else None


def words(found: Any) -> str:
    """A line of text of bounded length; "" for anything that is none."""
    if not isinstance(found, str):
        return ""
    line = "".join(letter if letter.isprintable() else " " for letter in found[: MAX_CHARACTERS + 1]).strip()
    return line if len(line) <= MAX_CHARACTERS else line[: MAX_CHARACTERS - 1] + "…"

"""Which values GGUF's metadata can hold, and how they are packed. Every value is checked here before it is packed.

Values come from config.json, tokenizers, model cards and other GGUF files. Three kinds are refused: a text with a NUL,
where llama.cpp's C strings end; a number outside the range of its type; and a number that is not finite.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from pocketquant.errors import SourceError, listing
from pocketquant.escaping import one_line
from pocketquant.model import Value

KINDS = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "[]", "u64", "i64", "f64")
"""The kinds of values. GGUF's number for a kind is its position here."""
PACKED = {"u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f"} | {
    "bool": "?",
    "u64": "Q",
    "i64": "q",
    "f64": "d",
}
_LARGEST = {"f32": 3.4028235677973366e38, "f64": 1.7976931348623157e308}
"""Numbers must be smaller than these. Larger ones would be packed as infinite, or could not be packed; the bound of f32
is half a step above its largest number."""


def find_problem(value: Value) -> str:
    """Why GGUF cannot hold a value, in words; "" where it can."""
    if not value.kind.endswith("[]"):
        return _problem_of(value.kind, [value.value])
    if not isinstance(value.value, (list, tuple)):
        return f"{shown(value.value)} is no list"
    return _problem_of(value.kind.removesuffix("[]"), value.value)


def refuse_unwritable(metadata: Mapping[str, Value]) -> None:
    """Raises SourceError where GGUF cannot hold keys or values; all of them are named."""
    problems = [f"{key}: {problem}" for key, value in metadata.items() if (problem := find_problem(value))]
    problems += [f"{one_line(key)}: {problem}" for key in metadata if (problem := _problem_of("str", [key]))]
    if problems:
        raise SourceError(f"metadata that no GGUF can hold; correct the source's files:\n{listing(problems)}")


def encode_value(value: Value) -> list[bytes]:
    """Packs a value that has no problem (`find_problem`): GGUF's number for its type, then its bytes."""
    if not value.kind.endswith("[]"):
        kind, items = value.kind, [value.value]
        parts = [struct.pack("<I", KINDS.index(kind))]
    else:
        kind, items = value.kind[:-2], value.value
        parts = [struct.pack("<IIQ", KINDS.index("[]"), KINDS.index(kind), len(items))]
    if kind == "str":
        return parts + [encode_text(item) for item in items]
    return [*parts, struct.pack(f"<{len(items)}{PACKED[kind]}", *items)]


def encode_text(text: str) -> bytes:
    """A text as GGUF packs it: the number of its bytes, then its UTF-8."""
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw


def shown(value: Any) -> str:
    """A value for a message: its beginning, on one line."""
    return f"{value!r:.80}"


def _problem_of(kind: str, items: list[Any] | tuple[Any, ...]) -> str:
    if kind == "str":
        return _text_problem(items)
    wanted = {bool} if kind == "bool" else {int} if kind[0] in "ui" else {int, float}
    strange = set(map(type, items)) - wanted
    if strange:
        return f"{shown(next(item for item in items if type(item) in strange))} is no {kind}"
    if kind in _LARGEST:
        worst = next((item for item in items if not abs(item) < _LARGEST[kind]), None)  # NaN is not, either
        return "" if worst is None else f"{shown(worst)} is no finite {kind}"
    if kind == "bool" or not items:
        return ""
    bits = int(kind[1:])
    low, high = (0, 1 << bits) if kind[0] == "u" else (-(1 << bits - 1), 1 << bits - 1)
    worst = next((item for item in (min(items), max(items)) if not low <= item < high), None)
    return "" if worst is None else f"{shown(worst)} is no {kind}"


def _text_problem(items: list[Any] | tuple[Any, ...]) -> str:
    if set(map(type, items)) - {str}:
        return f"{shown(next(item for item in items if type(item) is not str))} is no text"
    joined = "\n".join(items)
    try:
        joined.encode()
    except UnicodeEncodeError as error:
        return f"holds {joined[error.start]!r}, half of a surrogate pair, which is no character"
    ended = next((item for item in items if "\0" in item), None) if "\0" in joined else None
    return "" if ended is None else f"{shown(ended)} holds a NUL, where C ends a text"

"""Damages files: at random, by words, or as trees of JSON, in the ways that broke readers before."""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pack_maker import header_of, with_header

from pocketquant.formats import FORMATS
from pocketquant.gguf_file.header import encode_table
from pocketquant.gguf_file.reading import read_header
from pocketquant.model import Value, padded

_RAW = (
    *("7", "-1", "0", "1.5", "true", "null", '""', '"x"', "[]", "{}", "[[]]", "[null]", '[{"a": 1}]', '{"": []}'),
    *("1e308", "-1e308", "1e999", "NaN", "Infinity", "-Infinity", "1e-320", "9" * 400, "-" + "9" * 5000, "0.1"),
    *("200000", "2147483648", "4294967296", "9223372036854775808", "18446744073709551616", "1000000000000"),
    *(
        '"\\ud800"',
        '"\\u0000"',
        '"\\u001b[31m"',
        '"\\u202egnp.exe"',
        '"x\\n\\n# @all ![t](u) <b>|"',
        '"\\ufffe"',
        '" "',
    ),
    *(
        '"' + "9" * 5000 + '"',
        '"' + "long " * 3000 + '"',
        "[" * 300,
        "[" * 90 + "]" * 90,
        '{"a":' * 120 + "1" + "}" * 120,
    ),
    *(
        '"../../etc/passwd"',
        '"/dev/zero"',
        '"' + "n" * 300 + '"',
        "[1, 2, 3]",
        '["a", 5, null]',
        "[" + "1," * 5000 + "1]",
    ),
)
"""Texts of JSON values, right or wrong, that something once fell over."""
_WORDS = (
    *_RAW,
    "nan",
    "inf",
    "0x" + "f" * 400,
    "1979-05-27",
    "'''",
    '"""',
    "[[a]]",
    "[a]",
    "a.b = 1",
    "= =",
    "*a",
    "&a [*a]",
)
_WORDS += (
    "---",
    "...",
    "- -",
    "? [a]: b",
    "!!python/object:os.system x",
    "!!binary x",
    "{{ 1/0 }}",
    "{% for %}",
    "<<: *a",
)
_WORDS += (
    "\x00",
    "\x1b[2J",
    "\ufeff",
    "\u2028",
    "\udcff",
    "\r",
    "\t",
    "{{ cycler.__init__ }}",
    "{{ 'a' * 99999999 }}",
    "no",
)
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|[A-Za-z_]+|[^\sA-Za-z_\d"]|\n')
_HOLE = '"hole %d"'

_Walk = list[tuple[Any, Any]]


def damaged(kind: str, data: bytes, rng: random.Random) -> bytes:
    """One damaged copy; equal states of `rng` give equal bytes."""
    if rng.random() < 0.15:
        return _anyhow(data, rng)
    if kind == "json":
        return _as_tree(data, rng)
    if kind == "json header":
        length = int.from_bytes(data[:8], "little")
        header = (_as_tree if rng.random() < 0.8 else _by_words)(data[8 : 8 + length], rng)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    if kind == "pack":
        return with_header(data, _as_tree(header_of(data), rng))
    if kind == "gguf":
        return _as_gguf(data, rng)
    return (_by_words if kind == "text" else _anyhow)(data, rng)


def _anyhow(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(out) + 1)
        if rng.random() < 0.5:
            at = min(at, rng.randrange(1, 400))  # most of what can break stands in front
        match rng.randrange(6):
            case 0:
                del out[at:]
            case 1:
                out[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                out[at : at + rng.choice((1, 2, 4, 8))] = rng.choice(
                    (b"\xff" * 8, bytes(8), b"\0\0\0\x80", b"\1\0\0\0\0\0\0\0")
                )
            case 3:
                out[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(9)))
            case 4:
                start = rng.randrange(len(out) + 1)
                out[at:at] = out[start : start + rng.randrange(64)]
            case 5:
                del out[at : at + rng.randrange(32)]
    return bytes(out)


def _by_words(data: bytes, rng: random.Random) -> bytes:
    text = data.decode(errors="surrogateescape")
    tokens = list(_TOKEN.finditer(text))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        found = rng.choice(tokens) if tokens else None
        start, end = found.span() if found else (0, 0)
        start, end = min(start, len(text)), min(end, len(text))
        word = rng.choice(_WORDS)
        new = rng.choice((word, word, "", text[start:end] * 2, f"{text[start:end]} {word}", text[: rng.randrange(200)]))
        text = text[:start] + new + text[end:]
    return text.encode(errors="surrogatepass")


def _as_tree(data: bytes, rng: random.Random) -> bytes:
    value, raw = json.loads(data), list[str]()

    def hole() -> str:
        raw.append(rng.choice(_RAW))
        return f"hole {len(raw) - 1}"

    if rng.random() < 0.03:
        return rng.choice(_RAW).encode()
    _change(value, rng, hole)
    text = json.dumps(value)
    for i, new in enumerate(raw):
        text = text.replace(_HOLE % i, new)
    return text.encode()


_VALUES = [Value("u32", n) for n in (0, 1, 7, 513, 1 << 31, (1 << 32) - 1)] + [Value("i32", -1), Value("u64", 1 << 63)]
_VALUES += [Value("str", text) for text in ("", "x", "imatrix", "qwen35moe", "clip", "\x1b[2J\n# @all ![t](u)")]
_VALUES += [Value("str[]", []), Value("str[]", ["a", "b"]), Value("i32[]", [-1, 5]), Value("bool[]", [True] * 9)]
_VALUES += [Value("f32", 1e30), Value("f32", 0.0), Value("f64", -1e300), Value("f32[]", [0.5]), Value("bool", True)]
_VALUES += [Value("u8[]", list(range(256))), Value("i64", -(1 << 63)), Value("u16", 65535)]


def _as_gguf(data: bytes, rng: random.Random) -> bytes:
    """Other metadata and other entries in the table of tensors, each of which GGUF can hold."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "good.gguf"
        path.write_bytes(data)
        header = read_header(path)
    metadata, tensors = dict(header.metadata), list(header.tensors)
    for _ in range(rng.choice((1, 1, 2, 3))):
        key, i = rng.choice(list(metadata)), rng.randrange(len(tensors))
        match rng.randrange(7):
            case 0:
                metadata.pop(key)
            case 1:
                tensors[i] = replace(
                    tensors[i], name=rng.choice((f"{tensors[i].name}x", "blk.9999999999.a", "\x1b[2J"))
                )
            case 2:
                shape = rng.choice(
                    ((0,), (1 << 62, 2), (1, 1, 1, 1), (7,), tensors[i].shape[::-1], (3, *tensors[i].shape))
                )
                tensors[i] = replace(tensors[i], shape=shape)
            case 3:
                tensors[i] = replace(tensors[i], format=FORMATS[rng.choice(list(FORMATS))])
            case _:
                metadata[key] = rng.choice(_VALUES)
    table = encode_table(metadata, tensors)
    return table.ljust(padded(len(table)), b"\0") + data[header.data_offset :]


def _change(value: Any, rng: random.Random, make: Callable[[], Any]) -> None:
    """Changes a tree in place: replaces, drops, renames or swaps some of its nodes, those near the root more often."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = value
        while True:
            keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.75:
                place = place[key]
                continue
            match rng.randrange(8):
                case 0:
                    del place[key]
                case 1 if isinstance(place, dict):
                    place[rng.choice(("7", "x\n# @all", "9" * 5000, "\x1b[2J", "-1"))] = place.pop(key)
                case 2:
                    place[key] = place[rng.choice(keys)]
                case 3:
                    place[key] = [place[key]]
                case _:
                    place[key] = make()
            break

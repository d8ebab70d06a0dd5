"""Values of another kind than what reads them takes, at every key of every small file that is read."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_maker import make_checkpoint

from pocketquant.convert.kinds import KINDS, read_small
from pocketquant.convert.sources import open_model
from pocketquant.errors import EvalError, PocketquantError
from pocketquant.files.json_kinds import (
    COUNT,
    FLAG,
    NUMBER,
    TEXT,
    WHOLE,
    Each,
    Either,
    Fields,
    Kind,
    Leaf,
    Values,
    find_other_kinds,
    refuse_other_kinds,
)

VALUES: list[Any] = ["x", 7, -1, 1.5, True, [7], ["x"], {"a": 1}, [{"name": 1}]]

_Way = tuple[str | int, ...]


def places(kind: Kind, way: _Way = ()) -> Iterator[tuple[_Way, Kind]]:
    """Every place of a table with the kind of what stands there; 0 for an item of a list."""
    if way:
        yield way, kind
    if isinstance(kind, Either):
        for each in kind.kinds:
            yield from (found for found in places(each, way) if found[0] != way)
    elif isinstance(kind, Fields):
        for key, inner in kind.kinds.items():
            yield from places(inner, (*way, key))
    elif isinstance(kind, Values):
        yield from places(kind.kind, (*way, "any"))
    elif isinstance(kind, Each):
        yield from places(kind.kind, (*way, 0))


def fits(value: Any, kind: Kind) -> bool:
    """The same question in other words: whether JSON is of a kind."""
    if isinstance(kind, Either):
        return any(fits(value, each) for each in kind.kinds)
    if value is None:
        return True
    if isinstance(kind, Leaf):
        types = {TEXT: str, FLAG: bool, WHOLE: int, COUNT: int, NUMBER: (int, float)}[kind]
        is_number = kind in (WHOLE, COUNT, NUMBER)
        return (
            isinstance(value, types) and not (is_number and isinstance(value, bool)) and (kind != COUNT or value >= 0)
        )
    if isinstance(kind, Each):
        return isinstance(value, list) and all(item is not None and fits(item, kind.kind) for item in value)
    if isinstance(kind, Values):
        return isinstance(value, dict) and all(fits(item, kind.kind) for item in value.values())
    return isinstance(value, dict) and all(fits(value.get(key), inner) for key, inner in kind.kinds.items())


def put(owner: Any, way: _Way, value: Any) -> Any:
    """JSON with a value at a place, whatever stood on the way there."""
    if not way:
        return value
    first, *rest = way
    if first == 0:
        return [put(None, tuple(rest), value)]
    owner = dict(owner) if isinstance(owner, dict) else {}
    return {**owner, str(first): put(owner.get(str(first)), tuple(rest), value)}


ALL = [(name, way, kind) for name, (table, _) in KINDS.items() for way, kind in places(table)]


def test_the_table_is_walked_whole() -> None:
    assert len(ALL) > 150
    assert {name for name, _, _ in ALL} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_every_key_is_of_its_kind_or_refused_by_file_key_and_value(name: str, tmp_path: Path) -> None:
    n_refused = 0
    for way, kind in [(way, kind) for each, way, kind in ALL if each == name]:
        for value in VALUES:
            (tmp_path / name).write_text(json.dumps(put({}, way, value)))
            if fits(value, kind):
                read_small(tmp_path, name)
                continue
            with pytest.raises(KINDS[name][1]) as caught:
                read_small(tmp_path, name)
            said = str(caught.value)
            last = next(key for key in reversed(way) if isinstance(key, str))
            assert said.startswith(f"{tmp_path / name}: values of another kind")
            assert f"{last}" in said.split("\n")[1], (way, value)
            assert ", expected a" in said or ", expected true" in said
            n_refused += 1
    assert n_refused > 5


@pytest.mark.parametrize(
    ("name", "change", "key"),
    [
        ("tokenizer_config.json", {"add_bos_token": "x"}, "add_bos_token: 'x', expected true or false"),
        ("tokenizer_config.json", {"add_bos_token": 0}, "add_bos_token: 0, expected"),
        ("tokenizer_config.json", {"chat_template": [{"name": 1}]}, r"chat_template[0].name: 1, expected a text"),
        ("tokenizer_config.json", {"chat_template": [{"name": "a"}]}, "chat_template[0]: {'name': 'a'}"),
        ("tokenizer_config.json", {"chat_template": []}, "chat_template: []"),
        ("chat_template.json", {"chat_template": [{"template": "a"}]}, "chat_template[0]: {'template': 'a'}"),
        ("tokenizer_config.json", {"fast_tokenizer_files": "tokenizer.4.0.json"}, "fast_tokenizer_files: 'tok"),
        ("config.json", {"tie_word_embeddings": "x"}, "tie_word_embeddings: 'x', expected true or false"),
        ("config.json", {"tie_word_embeddings": 1}, "tie_word_embeddings: 1, expected"),
        ("config.json", {"bos_token_id": "x"}, "bos_token_id: 'x', expected a whole number"),
        ("config.json", {"pad_token_id": [7]}, "pad_token_id: [7], expected a whole number"),
        ("config.json", {"configuration_files": "config.4.0.json"}, "configuration_files: 'config"),
        ("config.json", {"quantization_config": []}, "quantization_config: [], expected an object"),
        ("generation_config.json", {"eos_token_id": ["x"]}, "eos_token_id[0]: 'x', expected a whole number"),
    ],
)
def test_a_model_with_a_value_of_another_kind_is_refused(
    name: str, change: dict[str, Any], key: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "m")
    there = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**there, **change}))
    with pytest.raises(PocketquantError) as caught:
        open_model(folder)
    assert f"{folder / name}: " in str(caught.value)
    assert key in str(caught.value)


def test_a_name_that_is_no_text_only_describes(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": [7]}))
    assert "config.json: _name_or_path left out: [7] is no text" in open_model(folder).notes


def test_null_says_nothing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    before = open_model(folder)
    for name, keys in {
        "config.json": ["tie_word_embeddings", "bos_token_id"],
        "tokenizer_config.json": ["bos_token"],
    }.items():
        there = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**there, **dict.fromkeys(keys)}))
    assert open_model(folder).metadata == before.metadata


def test_a_hundred_problems_are_enough() -> None:
    table = Each(Fields({"a": WHOLE}))
    assert len(find_other_kinds([{"a": "x"}] * 100_000, table)) == 100
    document = copy.deepcopy([{"a": 1}, None, {"a": True}])
    with pytest.raises(EvalError, match=r"f: values(.|\n)*\[1\]: null, expected an object\n  \[2\]\.a: True, expected"):
        refuse_other_kinds(document, table, "f", EvalError)
    with pytest.raises(EvalError, match="the file: 3, expected a list"):
        refuse_other_kinds(3, table, "f", EvalError)

"""Tokens that stand beside tokenizer.json, twice or with flags: the ids that transformers 5.24 gives, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from folder_oracle import kept
from token_cases import (
    ADDED,
    CONFIG,
    ENDS,
    FIRST_FREE,
    MAP,
    PLAIN,
    REFUSED,
    TAKEN,
    TOKEN,
    in_decoder,
    in_file,
    without,
    write_case,
)

from pocketquant.architectures.hybrid import PRE_TOKENIZERS
from pocketquant.convert.tokenizer import read_tokenizer
from pocketquant.errors import TokenizerError

UNUSED, CONTROL = 5, 3


def read(folder: Path, n_vocab: int = 320) -> tuple[dict[str, Any], str]:
    notes: list[str] = []
    config = json.loads((folder / "config.json").read_text())
    values = read_tokenizer(folder, n_vocab, config, PRE_TOKENIZERS, notes)
    return {key.removeprefix("tokenizer.ggml."): value.value for key, value in values.items()}, "\n".join(notes)


@pytest.mark.parametrize("case", TAKEN)
def test_token_at_load_has_the_id_that_transformers_gives_it(case: str, tmp_path: Path) -> None:
    values, _ = read(write_case(tmp_path, TAKEN[case]))
    expected = kept()["tokens"][case]
    tokens, types = values["tokens"], values["token_type"]
    assert len(tokens) == len(set(tokens)) == 320
    assert sum(kind != UNUSED for kind in types) == expected["length"]
    for number, (text, is_special) in expected["added"].items():
        assert tokens[int(number)] == text
        assert types[int(number)] == CONTROL or not is_special, text
    assert values["eos_token_id"] == expected["eos"]


def test_the_kept_answers_cover_every_case() -> None:
    assert {*TAKEN, *REFUSED} == kept()["tokens"].keys()
    texts = {case: [text for text, _ in answer["added"].values()] for case, answer in kept()["tokens"].items()}
    none = ["as it is", "additional beside extra", "map: end token", "decoder", "decoder and the older files"]
    none += [case for case in TAKEN if "lacks" in case]
    assert {case for case in TAKEN if TOKEN not in texts[case] and "padding" not in case} == set(none)


@pytest.mark.parametrize("case", REFUSED)
def test_twice_or_elsewhere_is_refused(case: str, tmp_path: Path) -> None:
    files, message = REFUSED[case]
    with pytest.raises(TokenizerError, match=message):
        read(write_case(tmp_path, files))


def test_padding_takes_no_name_that_a_token_has(tmp_path: Path) -> None:
    values, _ = read(write_case(tmp_path, TAKEN["named like padding, without an id"]))
    assert values["tokens"][299:302] == ["[PAD299]", "[[[PAD300]]]", "[PAD301]"]


def test_tokens_that_get_an_id_are_noted(tmp_path: Path) -> None:
    _, notes = read(write_case(tmp_path, TAKEN["all at once"]))
    assert "get the next ids, as in transformers: 263 '<s>', 264 '<c>', 265 '<i>', 266 '<e>'" in notes


def test_a_token_without_a_row_of_the_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"beyond the embedding's 262 rows(.|\n)*262: '<\|tool_boundary\|>'"):
        read(write_case(tmp_path, TAKEN["extra list"]), n_vocab=262)


def test_older_files_that_transformers_does_not_read_are_noted(tmp_path: Path) -> None:
    _, notes = read(write_case(tmp_path, TAKEN["decoder and the older files"]))
    assert "does not read them): added_tokens.json, special_tokens_map.json; tokens that only they name" in notes
    assert TOKEN in notes
    _, notes = read(write_case(tmp_path / "same", {CONFIG: in_decoder(), MAP: {"eos_token": "<|im_end|>"}}))
    assert notes.endswith("does not read them): special_tokens_map.json")


def test_additional_tokens_given_with_flags_as_transformers_4_saved_them(tmp_path: Path) -> None:
    files = {MAP: {"additional_special_tokens": [{"content": TOKEN, **PLAIN}]}}  # transformers 5 has a TypeError
    values, _ = read(write_case(tmp_path, files))
    assert values["tokens"][FIRST_FREE] == TOKEN


def test_tokens_that_a_decoder_lacks_are_left_out_as_in_transformers_and_noted(tmp_path: Path) -> None:
    values, notes = read(write_case(tmp_path, TAKEN["decoder that lacks the last"]))
    assert values["tokens"][261] == "[PAD261]"
    assert "lacks are left out and split into pieces, as in transformers 5: 261 '</think>'; to keep them" in notes
    assert "get the next ids" not in notes
    values, notes = read(write_case(tmp_path / "named", TAKEN["decoder that lacks the last two, one of them named"]))
    assert values["tokens"][260:262] == ["<think>", "[PAD261]"]
    assert "5: 261 '</think>';" in notes
    assert "get the next ids" not in notes


def test_a_special_token_that_a_decoder_lacks_must_come_back_where_it_was(tmp_path: Path) -> None:
    files = {CONFIG: {**without("259", "260", "261"), "sep_token": "</think>"}}
    message = r"tokenizer_config\.json: added_tokens_decoder lacks special tokens(.|\n)*'</think>': 261, and .* it 260"
    with pytest.raises(TokenizerError, match=message):
        read(write_case(tmp_path, files))


def test_the_file_that_lists_a_broken_token_is_named(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({ADDED: {TOKEN: -1}}, r"added_tokens\.json: values of.*\n  <\|tool_boundary\|>: -1, expected a whole"),
        ({ADDED: {TOKEN: "x"}}, r"added_tokens\.json: values of.*\n  <\|tool_boundary\|>: 'x', expected a whole"),
        ({ADDED: {TOKEN: 260}}, r"\n  added_tokens\.json: added token 260 is .*, and '<think>' in tokenizer\.json"),
        (
            {CONFIG: in_decoder(**{"260": TOKEN})},
            r"\n  tokenizer_config\.json: added token 260 is .* in tokenizer\.json",
        ),
    ]
    for number, (files, message) in enumerate(cases):
        with pytest.raises(TokenizerError, match=message):
            read(write_case(tmp_path / str(number), files))


def test_ids_that_depend_on_the_tokenizers_class_are_refused(tmp_path: Path) -> None:
    listed = [{"id": 257, "content": "<|im_end|>", "special": True, **PLAIN}]
    files = {"tokenizer.json": {"added_tokens": listed}, CONFIG: {"pad_token": "<|im_end|>", "sep_token": TOKEN}}
    with pytest.raises(TokenizerError, match=r"adds '<\|endoftext\|>' before them; name unk_token in"):
        read(write_case(tmp_path, files))


@pytest.mark.parametrize(
    "files",
    [
        {CONFIG: {"added_tokens_decoder": ["x"]}},
        {CONFIG: {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}},
        {CONFIG: {"added_tokens_decoder": {"262": "x"}}},
        {ADDED: {"<x>": [262]}},
        {ADDED: {"<x>": True}},
        {"tokenizer.json": {"added_tokens": ["x"]}},
        {"tokenizer.json": {"added_tokens": [{"id": [1], "content": "x"}]}},
    ],
)
def test_entries_that_are_none_are_refused(files: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"added token|added_tokens|values of another kind(.|\n)*<x>"):
        read(write_case(tmp_path, files))


# ---------------------------------------------------------------- end tokens and flags


@pytest.mark.parametrize("case", ENDS)
def test_no_eos_is_written_from_wherever_it_stands(case: str, tmp_path: Path) -> None:
    files, expected, note = ENDS[case]
    values, notes = read(write_case(tmp_path, files))
    assert values["eos_token_id"] == expected
    assert ("end-of-generation token" in notes) == bool(note)
    assert note in notes


def test_no_eos_anywhere_is_refused(tmp_path: Path) -> None:
    files = {CONFIG: {"eos_token": None}, "config.json": {"eos_token_id": None}, "generation_config.json": None}
    with pytest.raises(TokenizerError, match="generation would end at a comma"):
        read(write_case(tmp_path, files))


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
@pytest.mark.parametrize("where", ["tokenizer.json", CONFIG, MAP])
def test_flags_that_the_runtimes_ignore_are_noted(flag: str, where: str, tmp_path: Path) -> None:
    token = {"content": "<mark>", **PLAIN, flag: True}
    files: dict[str, Any] = {
        "tokenizer.json": in_file({**token, "special": False}),
        CONFIG: {"extra_special_tokens": [{"__type": "AddedToken", **token}]},
        MAP: {"sep_token": token},
    }
    values, notes = read(write_case(tmp_path, {where: files[where]}))
    assert values["tokens"][FIRST_FREE] == "<mark>"
    assert f"'<mark>' ({flag})" in notes


def test_plain_tokens_are_not_noted(tmp_path: Path) -> None:
    assert read(write_case(tmp_path, {}))[1] == ""

"""Tokenizer files as people have them: where a token is named only beside tokenizer.json, twice, or with flags.

Each case says which files differ from the small checkpoint's: keys to replace, or None for a file that is missing.
`tests/golden/folders.json` holds what transformers makes of each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoint_maker import text_config, tokenizer_json, write_json_files

TOKEN = "<|tool_boundary|>"
FIRST_FREE = 262
PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
LISTED: list[dict[str, Any]] = tokenizer_json()["added_tokens"]
DECODER = {str(item["id"]): {key: value for key, value in item.items() if key != "id"} for item in LISTED}
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


def in_file(*tokens: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json with more added tokens."""
    return {"added_tokens": [*LISTED, *({"id": FIRST_FREE, "special": True, **PLAIN, **token} for token in tokens)]}


def in_decoder(**tokens: str) -> dict[str, Any]:
    """tokenizer_config.json with the same tokens as tokenizer.json and more, given as id=text."""
    more = {number: {"content": text, "special": True, **PLAIN} for number, text in tokens.items()}
    return {"added_tokens_decoder": {**DECODER, **more}}


def without(*numbers: str) -> dict[str, Any]:
    """tokenizer_config.json with a decoder that lacks tokens of tokenizer.json."""
    return {"added_tokens_decoder": {number: item for number, item in DECODER.items() if number not in numbers}}


Files = dict[str, dict[str, Any] | None]

TAKEN: dict[str, Files] = {
    "as it is": {},
    "extra list": {CONFIG: {"extra_special_tokens": [TOKEN]}},
    "extra by name": {CONFIG: {"extra_special_tokens": {"tool_token": TOKEN}}},
    "extra with flags": {CONFIG: {"extra_special_tokens": [{"__type": "AddedToken", "content": TOKEN, **PLAIN}]}},
    "extra twice": {CONFIG: {"extra_special_tokens": [TOKEN, "<think>", TOKEN]}},
    "extra in the vocabulary": {CONFIG: {"extra_special_tokens": ["he", TOKEN]}},
    "extra empty": {CONFIG: {"extra_special_tokens": ["", TOKEN]}},
    "additional": {CONFIG: {"additional_special_tokens": [TOKEN]}},
    "additional and no extra": {CONFIG: {"additional_special_tokens": [TOKEN], "extra_special_tokens": []}},
    "additional beside extra": {CONFIG: {"additional_special_tokens": [TOKEN], "extra_special_tokens": ["<x>"]}},
    "of the model's own": {CONFIG: {"tool_token": TOKEN}},
    "named in the config": {CONFIG: {"sep_token": TOKEN}},
    "named with flags": {CONFIG: {"sep_token": {"__type": "AddedToken", "content": TOKEN, **PLAIN}}},
    "map: additional": {MAP: {"additional_special_tokens": [TOKEN]}},
    "map: extra": {MAP: {"extra_special_tokens": [TOKEN]}, CONFIG: {"extra_special_tokens": ["<x>"]}},
    "map: extra by name": {MAP: {"extra_special_tokens": {"tool_token": TOKEN}}},
    "map: of the model's own": {MAP: {"tool_token": {"content": TOKEN, **PLAIN}}},
    "map: end token": {MAP: {"eos_token": {"content": "<|endoftext|>", **PLAIN}}},
    "map: new end token": {MAP: {"eos_token": TOKEN}},
    "added_tokens.json": {ADDED: {TOKEN: FIRST_FREE}},
    "added_tokens.json out of order": {ADDED: {"<z>": FIRST_FREE + 1, TOKEN: FIRST_FREE, "<think>": 260}},
    "all at once": {
        CONFIG: {"extra_special_tokens": ["<e>"], "image_token": "<i>", "sep_token": "<s>", "cls_token": "<c>"},
        ADDED: {TOKEN: FIRST_FREE},
    },
    "decoder": {CONFIG: in_decoder()},
    "decoder with one more": {CONFIG: in_decoder(**{"262": TOKEN})},
    "decoder that lacks the last": {CONFIG: without("261")},
    "decoder that lacks the last two, one of them named": {CONFIG: {**without("260", "261"), "sep_token": "<think>"}},
    "decoder and extra": {CONFIG: {**in_decoder(), "extra_special_tokens": [TOKEN]}},
    "decoder and the older files": {CONFIG: in_decoder(), MAP: {"sep_token": TOKEN}, ADDED: {TOKEN: FIRST_FREE}},
    "plain in the file, special beside it": {
        "tokenizer.json": in_file({"content": TOKEN, "special": False}),
        CONFIG: {"extra_special_tokens": [TOKEN]},
    },
    "named like padding": {"tokenizer.json": in_file({"content": "[PAD300]"})},
    "named like padding, without an id": {CONFIG: {"extra_special_tokens": ["[PAD300]", "[[PAD300]]"]}},
}
"""Taken, with the ids that transformers gives."""

REFUSED: dict[str, tuple[Files, str]] = {
    "one text under two ids": (
        {"tokenizer.json": in_file({"content": TOKEN}, {"content": TOKEN, "id": 263})},
        "one text under several ids",
    ),
    "a text of the vocabulary": ({"tokenizer.json": in_file({"content": "he"})}, "one text under several ids"),
    "a duplicate in the decoder": ({CONFIG: in_decoder(**{"262": "<think>"})}, "one text under several ids"),
    "a duplicate in added_tokens.json": ({ADDED: {"<think>": 262}}, "one text under several ids"),
    "two texts under one id": (
        {"tokenizer.json": in_file({"content": TOKEN}, {"content": "<x>"})},
        "contradict each other",
    ),
    "an id that is not the next": ({ADDED: {TOKEN: 270}}, "270, and transformers gives it 262"),
    "a decoder that lacks one in between": (
        {CONFIG: without("258")},
        r"'<\|im_end\|>': 259, and transformers gives it 258",
    ),
    "a decoder that lacks the end token": (
        {CONFIG: without("258", "259", "260", "261")},
        r"'<\|im_end\|>': 259, and transformers gives it 258",
    ),
    "a decoder of nothing": (
        {CONFIG: {"added_tokens_decoder": {}}},
        r"'<\|im_end\|>': 259, and transformers gives it 257",
    ),
    "a decoder with a gap": ({CONFIG: in_decoder(**{"300": TOKEN})}, "300, and transformers gives it 262"),
}
"""Refused: no runtime loads them, or transformers gives other ids than the files do."""

ENDS: dict[str, tuple[Files, int, str]] = {
    "config.json": ({CONFIG: {"eos_token": None}}, 259, ""),
    "generation_config.json alone": (
        {CONFIG: {"eos_token": None}, "config.json": {"eos_token_id": None}},
        259,
        "only generation_config.json names one",
    ),
    "special_tokens_map.json": ({CONFIG: {"eos_token": None}, MAP: {"eos_token": "<|im_end|>"}}, 259, ""),
    "special_tokens_map.json alone": (
        {
            CONFIG: {"eos_token": None},
            MAP: {"eos_token": {"content": "<|im_end|>", **PLAIN}},
            "config.json": {"eos_token_id": None},
            "generation_config.json": None,
        },
        259,
        "",
    ),
    "special_tokens_map.json, passed over by transformers": (
        {
            CONFIG: {"eos_token": None, **in_decoder()},
            MAP: {"eos_token": "<|im_end|>"},
            "config.json": {"eos_token_id": None},
            "generation_config.json": None,
        },
        259,
        "only special_tokens_map.json names one",
    ),
    "no tokenizer_config.json": ({CONFIG: None}, 259, ""),
    "nothing but the tokenizer's class": (
        {CONFIG: None, "config.json": {"eos_token_id": None}, "generation_config.json": None},
        257,
        "nothing names one, so it is that of transformers",
    ),
    "text_config alone": (
        {CONFIG: {"eos_token": None}, "config.json": {"eos_token_id": None, "text_config": {"eos_token_id": 258}}},
        258,
        "",
    ),
    "an empty list, then a number of zero": (
        {CONFIG: {"eos_token": None}, "config.json": {"eos_token_id": [], "text_config": {"eos_token_id": 0}}},
        0,
        "",
    ),
}
"""Where the end token stands, which one has to be written, and what is said of it."""


def write_case(folder: Path, files: Files) -> Path:
    """A checkpoint's small files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_files(folder, text_config())
    for name, changes in files.items():
        path = folder / name
        if changes is None:
            path.unlink()
        else:
            content = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**content, **changes}))
    return folder

"""Added and special tokens, from all the files that may name them, with the ids that transformers gives them.

tokenizer.json lists added tokens with ids, tokenizer_config.json may list them again (`added_tokens_decoder`) and name
special ones without ids; special_tokens_map.json and added_tokens.json are older versions' way, read only where there
is no `added_tokens_decoder`. A special token that nothing gives an id gets the next one, in transformers' order.

Source: transformers 5.24 `tokenization_utils_base.py` (`_from_pretrained`, `__init__`), `models/qwen2`,
`tokenization_utils_tokenizers.py` (`TokenizersBackend.__init__`); tokenizers 0.23 `added_vocabulary.rs` (`add_tokens`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pocketquant.errors import TokenizerError, listing

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that every tokenizer may have, in the order in which transformers adds them."""
DEFAULT = "<|endoftext|>"
"""What transformers' Qwen tokenizers take for the first three of `_DEFAULTS` where nothing names them."""

_DEFAULTS = ("eos_token", "unk_token", "pad_token")
_DECODER, _EXTRA, _ADDITIONAL = "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"
_CONFIG, _ADDED = "tokenizer_config.json", "added_tokens.json"
_FLAGS = ("lstrip", "rstrip", "single_word")
_SHOWN = 8


@dataclass(frozen=True)
class AddedTokens:
    """What a checkpoint adds to the vocabulary of its tokenizer's model.

    Attributes:
        by_id: id -> text, and whether it is special.
        named: "eos_token" -> its text, of those that are named.
        late: the same where only a file says so that transformers passes over.
        has_default_eos: nothing speaks of an end token, so that transformers' tokenizer takes its class's own.
        notes: what people should know about them.
    """

    by_id: Mapping[int, tuple[str, bool]]
    named: Mapping[str, str]
    late: Mapping[str, str]
    has_default_eos: bool
    notes: tuple[str, ...]


def read_added_tokens(
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    special_map: Mapping[str, Any],
    added_file: Mapping[str, Any],
    path: Path,
) -> AddedTokens:
    """Resolves them.

    Args:
        tokenizer: tokenizer.json, whose model has a vocabulary.
        settings: tokenizer_config.json.
        special_map: special_tokens_map.json; empty where there is none, like the next.
        added_file: added_tokens.json.
        path: of tokenizer.json.

    Raises:
        TokenizerError: entries that are none, that contradict each other, or whose ids transformers would not give them
            (all listed).
    """
    for name, found in (("tokenizer_config.json", settings), ("special_tokens_map.json", special_map)):
        _refuse_types(found, path.parent / name)
    vocab = tokenizer["model"]["vocab"]
    is_legacy = _DECODER not in settings
    used = _special_settings(settings, special_map if is_legacy else {})
    special = _in_order(used)
    listed = _items(tokenizer.get("added_tokens"))
    in_file = [(path.name, item.get("id"), item) for item in listed]
    if is_legacy:
        more = [(_ADDED, n, {"content": text, "special": text in special}) for text, n in added_file.items()]
    else:
        more = [(_CONFIG, _number(key), item) for key, item in (settings[_DECODER] or {}).items()]
    entries = [*in_file, *more]
    by_id = _by_id(entries, path.parent)
    lacking = {} if is_legacy else _drop_lacking(by_id, {_text_of(item) for _, _, item in more})
    _check_numbers(by_id, {number for _, number, _ in in_file} if is_legacy else set(), vocab, path)
    notes = _note_flags([item for _, _, item in entries if _text_of(item) not in lacking] + _dictionaries(used))
    known = {*vocab, *(text for text, _ in by_id.values())}
    if not is_legacy:
        notes += _note_passed_over(special_map, added_file, known)
    notes += _append(by_id, special, vocab, used, path, lacking)
    notes += _note_dropped(lacking, by_id, path.parent)
    return AddedTokens(
        by_id,
        {name: text for name in NAMES if (text := _text_of(used.get(name)))},
        {} if is_legacy else {name: text for name in NAMES if (text := _text_of(special_map.get(name)))},
        "eos_token" not in used,
        tuple(notes),
    )


def _refuse_types(found: Mapping[str, Any], path: Path) -> None:
    """Refuses special tokens that transformers cannot take: neither a text nor a token with its flags (all listed)."""
    problems = [f"{name}: {found[name]!r:.80}" for name in NAMES if name in found and not _is_token(found[name])]
    for name in (_EXTRA, _ADDITIONAL):
        tokens = found.get(name)
        if isinstance(tokens, dict) and name == _EXTRA:
            tokens = list(tokens.values())
        if tokens is not None and not (isinstance(tokens, list) and all(map(_is_token, tokens))):
            problems.append(f"{name}: {found[name]!r:.80}")
    if problems:
        raise TokenizerError(f"{path}: no tokens, which are texts or objects with a content:\n{listing(problems)}")


def _is_token(value: Any) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))
    )


def _special_settings(settings: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with special_tokens_map.json over it, as transformers merges them.

    Model-specific tokens (`image_token`, or a dictionary of extra ones) end under `model_specific_special_tokens`; a
    text that is listed twice counts where it stands first.
    """
    used = dict(settings)
    if _ADDITIONAL in used and not used.get(_EXTRA):
        used[_EXTRA] = used.pop(_ADDITIONAL)
    specific = {
        key: used.pop(key)
        for key in list(used)
        if key.endswith("_token") and key not in NAMES and isinstance(used[key], str)
    }
    specific |= used.pop(_EXTRA) if isinstance(used.get(_EXTRA), dict) else {}
    for key, value in special_map.items():
        if key == _EXTRA and isinstance(value, list):
            used[key] = [*_items(used.get(_EXTRA)), *value]
        else:
            used[key] = {**value, "__type": "AddedToken"} if isinstance(value, dict) and key != _EXTRA else value
    specific |= used.pop(_EXTRA) if isinstance(used.get(_EXTRA), dict) else {}
    if _ADDITIONAL in used and _EXTRA not in used:
        used[_EXTRA] = used.pop(_ADDITIONAL)
    stated = used.get("model_specific_special_tokens")
    used["model_specific_special_tokens"] = specific or (stated if isinstance(stated, dict) else {})
    return used


def _in_order(used: Mapping[str, Any]) -> dict[str, None]:
    """The texts of all special tokens, in the order in which transformers adds them."""
    own = {
        key: value
        for key, value in used.items()
        if key.endswith("_token") and key not in NAMES and (isinstance(value, str) or _is_typed(value))
    }
    values = [used.get(name) for name in NAMES]
    values += {**own, **used["model_specific_special_tokens"]}.values()
    values += _items(used.get(_EXTRA))
    return dict.fromkeys(text for value in values if (text := _text_of(value)))


def _is_typed(value: Any) -> bool:
    return isinstance(value, dict) and value.get("__type") == "AddedToken"


def _text_of(value: Any) -> str:
    """A token's text, given as one or with its flags; "" where there is none."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(key: str) -> Any:
    return int(key) if key.isdecimal() and len(key) < 12 else key


def _dictionaries(used: Mapping[str, Any]) -> list[Any]:
    """Special tokens that are given with their flags."""
    named = [value for key, value in used.items() if key.endswith("_token")]
    return [value for value in (*named, *_items(used.get(_EXTRA))) if isinstance(value, dict)]


def _by_id(entries: Iterable[tuple[str, Any, Any]], folder: Path) -> dict[int, tuple[str, bool]]:
    """Id -> text and whether it is special, from (file, id, token)."""
    by_id: dict[int, tuple[str, bool]] = {}
    files: dict[int, str] = {}
    problems = []
    for file, number, item in entries:
        text = item.get("content")
        if type(number) is not int or number < 0 or not isinstance(text, str):
            problems.append(f"{file}: added token {number!r:.80}: {item!r:.80}")
        elif number in by_id and by_id[number][0] != text:
            first = "" if files[number] == file else f" in {files[number]}"
            problems.append(f"{file}: added token {number} is {text!r}, and {by_id[number][0]!r}{first}")
        else:
            by_id[number] = (text, bool(item.get("special")) or by_id.get(number, ("", False))[1])
            files[number] = file
    if problems:
        raise TokenizerError(
            f"{folder}: added tokens that are none, or contradict each other; save the tokenizer anew:\n"
            f"{listing(problems)}"
        )
    return by_id


def _drop_lacking(by_id: dict[int, tuple[str, bool]], listed: set[str]) -> dict[str, int]:
    """Takes out the tokens that an `added_tokens_decoder` does not list: text -> the id in tokenizer.json."""
    lacking = {text: number for number, (text, _) in by_id.items() if text not in listed}
    for number in lacking.values():
        del by_id[number]
    return lacking


def _note_dropped(lacking: Mapping[str, int], by_id: Mapping[int, tuple[str, bool]], folder: Path) -> list[str]:
    """What became of them: those that are special tokens by name came back, under the id that came next.

    Raises:
        TokenizerError: another id than in tokenizer.json.
    """
    back = {text: number for number, (text, _) in by_id.items() if text in lacking}
    moved = [
        f"{text!r}: {lacking[text]}, and transformers gives it {n}" for text, n in back.items() if lacking[text] != n
    ]
    if moved:
        raise TokenizerError(
            f"{folder / _CONFIG}: {_DECODER} lacks special tokens of tokenizer.json, which so get other ids than "
            f"there; save the tokenizer anew:\n{listing(moved)}"
        )
    dropped = [f"{number} {text!r}" for text, number in lacking.items() if text not in back]
    if not dropped:
        return []
    return [
        f"added tokens of tokenizer.json that tokenizer_config.json's {_DECODER} lacks are left out and split into "
        f"pieces, as in transformers 5: {_some(dropped)}; to keep them, take {_DECODER} out"
    ]


def _check_numbers(
    by_id: Mapping[int, tuple[str, bool]], of_file: set[int], vocab: Mapping[str, int], path: Path
) -> None:
    """Tokens beside tokenizer.json, and all of a decoder, must have the ids that they get: stated ones are ignored."""
    following = max([len(vocab), *(number + 1 for number in by_id if number in of_file)])
    problems, of_file_too = [], {by_id[number][0] for number in of_file}
    for number in sorted(set(by_id) - of_file):
        text = by_id[number][0]
        given = vocab.get(text, following)
        if given != number and text not in of_file_too:  # one text under two ids is refused elsewhere
            problems.append(f"{text!r}: {number}, and transformers gives it {given}")
        following += given == following
    if problems:
        raise TokenizerError(
            f"{path.parent}: added tokens that get other ids than these files give them; save the tokenizer anew:\n"
            f"{listing(problems)}"
        )


def _append(
    by_id: dict[int, tuple[str, bool]],
    special: Iterable[str],
    vocab: Mapping[str, int],
    used: Mapping[str, Any],
    path: Path,
    lacking: Mapping[str, int],
) -> list[str]:
    """Gives special tokens without an id the next ones, and marks those that have one as special; what to note."""
    known = {**vocab, **{text: number for number, (text, _) in by_id.items()}}
    following = max([len(vocab), *(number + 1 for number in by_id)])
    n_known, new = len(known), list[str]()
    for text in special:
        if text not in known:
            new += [] if text in lacking else [f"{following} {text!r}"]
            known[text] = following
            following += 1
        by_id[known[text]] = (text, True)
    if len(known) == n_known:
        return []
    added = list(known)[n_known:]
    missing = [name for name in _DEFAULTS if name not in used]
    if missing and DEFAULT not in known:
        raise TokenizerError(
            f"{path.parent}: special tokens without ids ({_some([repr(text) for text in added])}), which depend on "
            f"whether the tokenizer's class adds {DEFAULT!r} before them; name {', '.join(missing)} in {_CONFIG}"
        )
    if not new:
        return []
    return [f"special tokens that tokenizer.json does not hold get the next ids, as in transformers: {_some(new)}"]


def _note_flags(items: Iterable[Any]) -> list[str]:
    found: dict[str, str] = {}
    for item in items:
        if isinstance(item, dict) and (flags := [flag for flag in _FLAGS if item.get(flag)]):
            found[_text_of(item)] = f"{_text_of(item)!r} ({', '.join(flags)})"
    if not found:
        return []
    return [
        "added tokens that in transformers take the spaces beside them, or stand for whole words only; the runtimes "
        f"ignore that, so texts with them get other tokens: {_some(list(found.values()))}"
    ]


def _note_passed_over(special_map: Mapping[str, Any], added_file: Mapping[str, Any], known: set[str]) -> list[str]:
    files = [
        name
        for name, content in (("added_tokens.json", added_file), ("special_tokens_map.json", special_map))
        if content
    ]
    if not files:
        return []
    only = [repr(text) for text in {**_in_order(_special_settings({}, special_map)), **added_file} if text not in known]
    note = (
        f"passed over (tokenizer_config.json has an {_DECODER}, so transformers does not read them): {', '.join(files)}"
    )
    return [f"{note}; tokens that only they name are split into pieces: {_some(only)}" if only else note]


def _some(texts: list[str]) -> str:
    shown = ", ".join(f"{text:.80}" for text in islice(texts, _SHOWN))
    return shown if len(texts) <= _SHOWN else f"{shown} and {len(texts) - _SHOWN} more"

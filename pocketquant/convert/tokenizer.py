"""tokenizer.json and its companions -> `tokenizer.*` metadata.

The runtimes do not read tokenizer.json: they know some pre-tokenizers by name. We recognise ours by its split regex, so
that a fine-tune with added tokens converts, and refuse every setting the runtimes would silently ignore.
Source for names, token types and what runtimes ignore: llama.cpp `src/llama-vocab.cpp`, gguf-py `constants.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocketquant.architectures.table import PreTokenizer
from pocketquant.convert.added_tokens import DEFAULT, AddedTokens, read_added_tokens
from pocketquant.convert.folder import refuse_versions
from pocketquant.convert.kinds import read_small
from pocketquant.errors import TokenizerError, listing
from pocketquant.files.small import is_present, read_text
from pocketquant.model import Value

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
"""Name in tokenizer_config.json -> name in GGUF (its spelling)."""
_FOUND_BY_TEXT = {"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<EOT>", "</s>"}
"""Texts that llama.cpp ends generation at by itself."""
_MAX_TEMPLATE_BYTES = 1 << 20


def read_tokenizer(
    folder: Path,
    n_vocab: int,
    config: Mapping[str, Any],
    known: Sequence[PreTokenizer],
    notes: list[str] | None = None,
) -> dict[str, Value]:
    """Tokens, merges, special ids, chat template and sampling of a checkpoint.

    Args:
        folder: the checkpoint.
        n_vocab: rows of the embedding; the token list is padded to it.
        config: config.json.
        known: the pre-tokenizers that models of this architecture have.
        notes: what people should know about it is added here.

    Raises:
        TokenizerError: missing, unlike anything the runtimes implement, larger than the embedding, with one text under
            two ids, or without an end token.
    """
    notes = [] if notes is None else notes
    path = folder / "tokenizer.json"
    if not is_present(path):
        raise TokenizerError(
            f"{path}: missing; save the tokenizer in this format (a 'fast' tokenizer's save_pretrained does)"
        )
    tokenizer = read_small(folder, path.name)
    if not isinstance(tokenizer.get("model"), dict):
        raise TokenizerError(f"{path}: no tokenizer")
    settings = read_small(folder, "tokenizer_config.json")
    refuse_versions(folder / "tokenizer_config.json", settings.get("fast_tokenizer_files"), "tokenizer")
    generation = read_small(folder, "generation_config.json")
    pre = _recognise(tokenizer, known, path)
    _check_vocabulary(tokenizer["model"], path)
    special_map, added_file = (read_small(folder, f"{name}.json") for name in ("special_tokens_map", "added_tokens"))
    added = read_added_tokens(tokenizer, settings, special_map, added_file, path)
    notes += added.notes
    tokens, types = _token_list(tokenizer["model"]["vocab"], added.by_id, n_vocab, path)
    merges = _merges(tokenizer["model"], path)
    if not _is_numbered_as_listed(tokenizer):
        _check_against_library(path, tokens)
    metadata = {
        "tokenizer.ggml.model": Value("str", "gpt2"),
        "tokenizer.ggml.pre": Value("str", pre),
        "tokenizer.ggml.tokens": Value("str[]", tokens),
        "tokenizer.ggml.token_type": Value("i32[]", types),
        "tokenizer.ggml.merges": Value("str[]", merges),
    }
    metadata.update(_special_ids(added, generation, config, tokens, path, notes))
    metadata["tokenizer.ggml.add_bos_token"] = Value("bool", settings.get("add_bos_token") is True)
    metadata.update(_chat_templates(folder, settings))
    return metadata


def _recognise(tokenizer: Mapping[str, Any], known: Sequence[PreTokenizer], path: Path) -> str:
    """llama.cpp's name for the pre-tokenizer; TokenizerError for settings that the runtimes would ignore."""
    model, problems, names = tokenizer["model"], [], {item.regex: item.name for item in known}
    if model.get("type", "BPE") != "BPE":
        problems.append(f"model type {model.get('type')!r}, expected BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "byte_fallback", "dropout"):
        if model.get(key):
            problems.append(f"model.{key} is set, which the runtimes ignore for this tokenizer")
    normalizer = tokenizer.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        problems.append(f"normalizer {str(normalizer)[:80]}, expected none or NFC")
    steps = _pre_tokenizer_steps(tokenizer.get("pre_tokenizer"))
    splits = [step for step in steps if step.get("type") == "Split"]
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    pattern = splits[0].get("pattern") if len(splits) == 1 else None
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if len(steps) != 2 or len(levels) != 1 or not isinstance(regex, str):
        problems.append("pre_tokenizer is not one Split by a regex, then ByteLevel")
    elif regex not in names:
        problems.append(f"the split regex {regex!r} is none that we know: {', '.join(names.values())}")
    elif levels[0].get("add_prefix_space") or levels[0].get("use_regex", True):
        problems.append("ByteLevel adds a space in front or splits by a regex of its own")
    elif splits[0].get("behavior") != "Isolated" or splits[0].get("invert"):
        problems.append(f"Split behaves as {splits[0].get('behavior')!r}, expected 'Isolated'")
    if problems:
        raise TokenizerError(
            f"{path}: the runtimes would tokenize differently, so this cannot be converted:\n{listing(problems)}"
        )
    return names[str(regex)]


def _pre_tokenizer_steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    if not isinstance(pre_tokenizer, dict):
        return []
    steps = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _check_vocabulary(model: Mapping[str, Any], path: Path) -> None:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise TokenizerError(f"{path}: model.vocab is missing or no object of token -> id")
    n_ids = len(set(vocab.values()))
    if n_ids != len(vocab):
        raise TokenizerError(f"{path}: model.vocab gives {len(vocab)} tokens only {n_ids} different ids")


def _token_list(
    vocab: Mapping[str, int], added: Mapping[int, tuple[str, bool]], n_vocab: int, path: Path
) -> tuple[list[str], list[int]]:
    by_id = {number: (token, _NORMAL) for token, number in vocab.items()}
    for number, (text, is_special) in added.items():
        looks_special = text.startswith("<|") and text.endswith("|>")
        by_id[number] = (text, _CONTROL if is_special or looks_special else _USER_DEFINED)
    beyond = sorted(number for number in by_id if number >= n_vocab)
    if beyond:
        names = listing(f"{number}: {by_id[number][0]!r}" for number in beyond)
        raise TokenizerError(
            f"{path}: tokens beyond the embedding's {n_vocab} rows; the two do not belong together:\n{names}"
        )
    texts = _refuse_twice(by_id, path)
    listed = [by_id.get(number) or (_padding(number, texts), _UNUSED) for number in range(n_vocab)]
    return [token for token, _ in listed], [kind for _, kind in listed]


def _refuse_twice(by_id: Mapping[int, tuple[str, int]], path: Path) -> set[str]:
    """All texts, which llama.cpp wants to differ: it aborts while loading, where the list is shorter than its map."""
    texts = {text for text, _ in by_id.values()}
    if len(texts) == len(by_id):
        return texts
    numbers: dict[str, list[int]] = {}
    for number, (text, _) in sorted(by_id.items()):
        numbers.setdefault(text, []).append(number)
    twice = [f"{text!r}: {', '.join(map(str, ids))}" for text, ids in numbers.items() if len(ids) > 1]
    raise TokenizerError(
        f"{path}: one text under several ids, which no runtime loads; take the ones out that the model was not trained "
        f"with:\n{listing(twice)}"
    )


def _padding(number: int, texts: set[str]) -> str:
    """The name of a row of the embedding without a token, as llama.cpp's converter gives it unless a token has it."""
    name = f"[PAD{number}]"
    while name in texts:
        name = f"[{name}]"
    return name


def _is_numbered_as_listed(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the `tokenizers` library is known to number the tokens as the file does, without loading it.

    It ignores the ids of added tokens: one that the vocabulary has keeps that id, others are counted on from the
    vocabulary's end. Source: tokenizers 0.23, `added_vocabulary.rs` (`add_tokens`).
    """
    vocab = tokenizer["model"]["vocab"]
    following, added = len(vocab), set()
    for item in tokenizer.get("added_tokens") or []:
        text, number = item["content"], item["id"]
        if not text or text in added or number != vocab.get(text, following):
            return False
        added.add(text)
        following += number == following
    return bool(max(vocab.values(), default=-1) == len(vocab) - 1)


def _check_against_library(path: Path, tokens: Sequence[str]) -> None:
    """Our list must be what the `tokenizers` library, which training and transformers use, makes of the same file.

    Loading a real model's file takes more than a second.
    """
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{path}: the tokenizers library cannot load it: {error}") from error
    wrong = [f"{number}: {token!r}" for token, number in loaded.items() if tokens[number : number + 1] != [token]]
    if wrong:
        raise TokenizerError(
            f"{path}: the tokenizers library gives these tokens other ids than the file does:\n{listing(wrong)}"
        )


def _merges(model: Mapping[str, Any], path: Path) -> list[str]:
    merges = model.get("merges")
    if not isinstance(merges, list) or not merges:
        raise TokenizerError(f"{path}: model.merges is missing")
    try:
        texts = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    except TypeError:
        texts = [""]
    if not all(text.count(" ") == 1 for text in texts):
        raise TokenizerError(f"{path}: model.merges holds something else than pairs of tokens")
    strange = [text for text in texts if text.replace(" ", "") not in model["vocab"]]
    if strange:
        raise TokenizerError(f"{path}: merges into something that model.vocab lacks:\n{listing(strange)}")
    return texts


def _special_ids(
    added: AddedTokens,
    generation: Mapping[str, Any],
    config: Mapping[str, Any],
    tokens: Sequence[str],
    path: Path,
    notes: list[str],
) -> dict[str, Value]:
    """Special ids: by name as transformers finds them, else by number in the configs; more ends as eot and eom."""
    ids, n_vocab = {token: number for number, token in enumerate(tokens)}, len(tokens)
    text_config = config.get("text_config")
    configs = {"config.json": config, "config.json text_config": text_config if isinstance(text_config, dict) else {}}
    found: dict[str, int] = {}
    for name in _SPECIAL:
        text = added.named.get(f"{name}_token")
        if text is not None and text not in ids:
            raise TokenizerError(f"{path.parent}: {name}_token {text!r} is not in the vocabulary")
        stated = [number for c in configs.values() for number in _as_list(c.get(f"{name}_token_id"))]
        if text is not None:
            found[name] = ids[text]
        elif stated:
            found[name] = stated[0]
    if "eos" not in found:
        found["eos"] = _find_end(added, generation, ids, path, notes)
    owners = {"generation_config.json": generation, **configs}
    ends = [end for owner in owners.values() for end in _as_list(owner.get("eos_token_id"))]
    used = {*found.values(), *ends}
    wrong = [
        f"{where} {name}_token_id: {number}"
        for where, owner in owners.items()
        for name in (_SPECIAL if owner is not generation else ("eos",))
        for number in _as_list(owner.get(f"{name}_token_id"))
        if number in used and not 0 <= number < n_vocab
    ]
    if wrong:
        raise TokenizerError(f"{path.parent}: special token ids beyond the vocabulary of {n_vocab}:\n{listing(wrong)}")
    more = [end for end in dict.fromkeys(ends) if end != found.get("eos") and tokens[end] not in _FOUND_BY_TEXT]
    if len(more) > 2:
        raise TokenizerError(
            f"{path.parent}: {len(more)} more end-of-generation tokens than GGUF can name (eos, eot, eom): "
            f"{', '.join(tokens[end] for end in more)}; shorten eos_token_id in generation_config.json"
        )
    values = {f"tokenizer.ggml.{_SPECIAL[name]}_token_id": Value("u32", number) for name, number in found.items()}
    for key, number in zip(("eot", "eom"), more, strict=False):
        values[f"tokenizer.ggml.{key}_token_id"] = Value("u32", number)
    return values


def _find_end(
    added: AddedTokens, generation: Mapping[str, Any], ids: Mapping[str, int], path: Path, notes: list[str]
) -> int:
    """The end token where neither tokenizer nor config.json has one; without any, llama.cpp ends at 11, a comma."""
    ends = _as_list(generation.get("eos_token_id"))
    if ends:
        notes.append(f"end-of-generation token {ends[0]!r:.20}: only generation_config.json names one")
        return ends[0]
    late = added.late.get("eos_token")
    text = late or (DEFAULT if added.has_default_eos else None)
    if text not in ids or text is None:
        raise TokenizerError(
            f"{path.parent}: no end-of-generation token in tokenizer_config.json, special_tokens_map.json, config.json "
            "or generation_config.json, so generation would end at a comma; write eos_token_id into the last of them"
        )
    where = "only special_tokens_map.json names one" if late else "nothing names one, so it is that of transformers"
    notes.append(f"end-of-generation token {text!r}: {where}")
    return ids[text]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, Value]:
    """`chat_template.jinja` before `chat_template.json` before tokenizer_config.json, as transformers loads them."""
    named: dict[str, str] = {}
    template = settings.get("chat_template")
    where = "tokenizer_config.json"
    if is_present(folder / "chat_template.json"):
        stated = read_small(folder, "chat_template.json")
        if "chat_template" in stated:
            template, where = stated["chat_template"], "chat_template.json"
    if is_present(folder / "chat_template.jinja"):
        template = _read_template(folder / "chat_template.jinja")
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            named[path.stem] = _read_template(path)
    if isinstance(template, list):
        partial = [f"chat_template[{i}]: {item!r:.80}" for i, item in enumerate(template) if not _is_named(item)]
        if partial or not template:
            raise TokenizerError(
                f"{folder / where}: a list of chat templates without a name or a text; each needs `name` and "
                f"`template`:\n{listing(partial or ['chat_template: []'])}"
            )
        named = {item["name"]: item["template"] for item in template}
        template = named.pop("default", None)
    values = {} if template is None else {"tokenizer.chat_template": Value("str", template)}
    if named:
        values["tokenizer.chat_templates"] = Value("str[]", list(named))
        values |= {f"tokenizer.chat_template.{name}": Value("str", text) for name, text in named.items()}
    return values


def _is_named(item: Mapping[str, Any]) -> bool:
    return all(isinstance(item.get(key), str) for key in ("name", "template"))


def _read_template(path: Path) -> str:
    return read_text(path, _MAX_TEMPLATE_BYTES, TokenizerError)

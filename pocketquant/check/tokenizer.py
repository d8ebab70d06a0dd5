"""Checks tokens, special ids, pre-tokenizer and chat template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pocketquant.check.contents import Contents
from pocketquant.check.findings import ERROR, WARNING, Finding
from pocketquant.model import Value
from pocketquant.texts.chat_template import find_template_problems

_PRE = "tokenizer.ggml.pre"
_ENDS = ("eos", "eot", "eom")


def check_tokenizer(contents: Contents) -> Iterator[Finding]:
    """The tokenizer of a text model of this family."""
    if not contents.is_text:
        return
    metadata = contents.metadata
    advice = "convert again, with the tokenizer files of this very checkpoint"
    for key, kind in (("model", "str"), ("tokens", "str[]"), ("token_type", "i32[]"), ("merges", "str[]")):
        value = metadata.get(f"tokenizer.ggml.{key}")
        if value is None or value.kind != kind or not value.value:
            yield Finding(ERROR, "tokenizer", f"tokenizer.ggml.{key}", "missing, empty or of another type", advice)
    model = metadata.get("tokenizer.ggml.model", Value("str", "gpt2")).value
    if model != "gpt2":
        yield Finding(ERROR, "tokenizer", "tokenizer.ggml.model", f"{model!r}; this family has gpt2", advice)
    yield from _check_pre(contents)
    tokens = metadata.get("tokenizer.ggml.tokens", Value("str[]", [])).value
    if isinstance(tokens, list) and len(set(tokens)) < len(tokens):
        twice = [token for token, count in Counter(tokens).items() if count > 1]
        message = f"{len(twice)} texts stand twice, such as {twice[0]!r:.80}: llama.cpp ends the process that loads it"
        yield Finding(ERROR, "token-twice", "tokenizer.ggml.tokens", message, advice)
    if isinstance(tokens, list) and tokens:
        yield from _check_counts(contents, len(tokens))
    yield from _check_ends(contents)


def _check_pre(contents: Contents) -> Iterator[Finding]:
    value = contents.metadata.get(_PRE)
    known = [item.name for item in contents.table.pre_tokenizers] if contents.table else []
    if not known:
        return
    usual, others, architecture = known[0], known[1:], contents.architecture
    advice = "convert with a tool that recognises the tokenizer by its split regex; never guess this name"
    if value is None:
        yield Finding(ERROR, "pre-tokenizer", _PRE, "missing: the runtime splits text its default way", advice)
    elif value.value in others:
        message = f"{value.value} splits text unlike {usual}, which {architecture} models have"
        yield Finding(
            WARNING, "pre-tokenizer", _PRE, message, f"right only if tokenizer.json has {value.value}'s regex"
        )
    elif value.value != usual:
        message = f"{value.value!r}; {architecture} models have {usual!r}, so text is split unlike in training"
        yield Finding(ERROR, "pre-tokenizer", _PRE, message, advice)


def _check_counts(contents: Contents, n_tokens: int) -> Iterator[Finding]:
    metadata, key = contents.metadata, "tokenizer.ggml.tokens"
    embedding = contents.entries.get("token_embd.weight")
    if embedding is not None and embedding.n_rows != n_tokens:
        message = f"{n_tokens} tokens for an embedding of {embedding.n_rows} rows"
        yield Finding(ERROR, "token-count", key, message, "pad the token list to the rows of the embedding")
    types = metadata.get("tokenizer.ggml.token_type")
    if types is not None and isinstance(types.value, list) and len(types.value) != n_tokens:
        message = f"{len(types.value)} types for {n_tokens} tokens"
        yield Finding(ERROR, "token-count", "tokenizer.ggml.token_type", message, "convert again")
    for name, value in metadata.items():
        is_id = name.startswith("tokenizer.ggml.") and name.endswith("_token_id")
        if is_id and (type(value.value) is not int or not 0 <= value.value < n_tokens):
            message = f"{value.value!r} is no id of {n_tokens} tokens"
            yield Finding(ERROR, "token-id", name, message, "take the id from tokenizer_config.json")


def _check_ends(contents: Contents) -> Iterator[Finding]:
    metadata = contents.metadata
    if not any(f"tokenizer.ggml.{name}_token_id" in metadata for name in _ENDS):
        message = "no end-of-generation token: the runtime guesses one"
        yield Finding(ERROR, "no-eos", "tokenizer.ggml.eos_token_id", message, "write the checkpoint's eos_token_id")
    add_bos = metadata.get("tokenizer.ggml.add_bos_token")
    if add_bos is None:
        message = "missing: a runtime may put token 11 before every text"
        yield Finding(WARNING, "add-bos", "tokenizer.ggml.add_bos_token", message, "write false")
    elif add_bos.value is not False:
        message = f"{add_bos.value!r}; this family has no begin-of-text token"
        yield Finding(ERROR, "add-bos", "tokenizer.ggml.add_bos_token", message, "write false")


def check_chat_template(contents: Contents, notes: list[str]) -> Iterator[Finding]:
    """Renders the chat templates; what they pass over goes to the notes."""
    if "tokenizer.ggml.model" in contents.metadata and "tokenizer.chat_template" not in contents.metadata:
        notes.append("no chat template, as in a base model: nothing to render")
    for problem in find_template_problems(contents.metadata):
        if problem.level in ("refusal", "silence"):
            notes.append(problem.text)
            continue
        severity = ERROR if problem.level == "error" else WARNING
        advice = "mend the template, or convert with --chat-template FILE"
        yield Finding(severity, "chat-template", "tokenizer.chat_template", problem.text, advice)

"""Conversations in a file, as the text that a model's chat template makes of them.

One conversation a line, as JSON: a list of messages, or an object whose `messages` is one; a message has a `role` and a
`content`. The template is a program that came with the model, so it runs in `chat_template`'s sandbox.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketquant.errors import EvalError, listing
from pocketquant.files.small import kind_of, parse_json
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.gguf_file.reading import is_gguf
from pocketquant.model import Value
from pocketquant.texts.chat_template import RENDERED, render_conversations, special_tokens
from pocketquant.texts.corpus import read_text

TEMPLATE = "tokenizer.chat_template"
MAX_CONVERSATIONS = 10_000


def render_chat(path: Path, model: Path) -> str:
    """The conversations of a file in the chat template of a GGUF, one after the other.

    Raises:
        EvalError: the file holds something else, the model has no chat template, or it does not render all.
    """
    conversations = read_conversations(path)
    metadata = open_gguf(model).metadata
    template = _template(metadata)
    if template is None:
        raise EvalError(f"{model}: has no chat template to render {path} with; convert it with --chat-template FILE")
    renderings = render_conversations(template, special_tokens(metadata), conversations)
    failures = [f"{each.case}: {each.message}" for each in renderings if each.outcome != RENDERED]
    if failures:
        raise EvalError(f"{path}: the chat template of {model} does not render every conversation\n{listing(failures)}")
    return "".join(rendering.text for rendering in renderings)


def template_digest(path: Path) -> str | None:
    """SHA-256 of a GGUF's chat template; None if it has none, or if the file is something else."""
    template = _template(open_gguf(path).metadata) if kind_of(path) == "file" and is_gguf(path) else None
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def read_conversations(path: Path) -> list[list[dict[str, Any]]]:
    """The messages of each line.

    Raises:
        EvalError: a line is no list of messages; all such lines are named.
    """
    conversations: list[list[dict[str, Any]]] = []
    faults = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line, f"line {number}", EvalError)
        except EvalError as error:
            faults.append(str(error))
            continue
        messages = value.get("messages") if isinstance(value, dict) else value
        if isinstance(messages, list) and _is_conversation(messages):
            conversations.append(messages)
        else:
            faults.append(f"line {number}: not a list of messages with a role each")
    if faults:
        raise EvalError(f"{path}: these lines are not conversations\n{listing(faults)}")
    if not 0 < len(conversations) <= MAX_CONVERSATIONS:
        raise EvalError(f"{path}: {len(conversations)} conversations; give between 1 and {MAX_CONVERSATIONS}")
    return conversations


def _is_conversation(value: list[Any]) -> bool:
    return len(value) > 0 and all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in value)


def _template(metadata: Mapping[str, Value]) -> str | None:
    value = metadata.get(TEMPLATE)
    return value.value if value is not None and isinstance(value.value, str) else None

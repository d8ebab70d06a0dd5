"""Brings texts into the form that a model was trained on; llama.cpp's tokenizer leaves that to its caller.

The tokenizers of this family bring a text into Unicode's NFC before they cut it, special tokens apart. A GGUF does not
say so; its pre-tokenizer's name does.
"""

from __future__ import annotations

import ctypes
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from pocketquant.architectures import ARCHITECTURES

_CONTROL, _USER_DEFINED = 8, 16
"""LLAMA_TOKEN_ATTR_CONTROL and LLAMA_TOKEN_ATTR_USER_DEFINED of llama.h."""


def as_trained(library: Any, model: Any, vocab: Any, text: str, *, special: bool) -> str:
    """A text as the model's own tokenizer normalizes it.

    Args:
        library: the binding of llama.cpp.
        model: a loaded model.
        vocab: its vocabulary.
        text: what is to be tokenized.
        special: whether names of control tokens in it mean these tokens.
    """
    if unicodedata.is_normalized("NFC", text):
        return text
    known = (item for architecture in ARCHITECTURES for item in architecture.pre_tokenizers if item.is_nfc)
    if _read_key(library, model, b"tokenizer.ggml.pre") not in {item.name for item in known}:
        return text
    kinds = _USER_DEFINED | (_CONTROL if special else 0)
    tokens = range(library.llama_vocab_n_tokens(vocab))
    named = [token for token in tokens if library.llama_vocab_get_attr(vocab, token) & kinds]
    return normalized_between(text, [library.llama_vocab_get_text(vocab, token).decode() for token in named])


def normalized_between(text: str, names: Sequence[str]) -> str:
    """The text in NFC, with the names in it left alone: what follows one must not become part of it."""
    pieces = [text]
    if names:
        longest_first = sorted(names, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    return "".join(piece if i % 2 else unicodedata.normalize("NFC", piece) for i, piece in enumerate(pieces))


def _read_key(library: Any, model: Any, key: bytes) -> str:
    """A text of the file's metadata; "" where it has no such key."""
    buffer = ctypes.create_string_buffer(64)
    length = library.llama_model_meta_val_str(model, key, buffer, len(buffer))
    return buffer.value.decode(errors="replace") if length >= 0 else ""

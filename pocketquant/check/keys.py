"""Compares a file's metadata with its source's: keys that only one of the two has, and keys with different values.

A difference is an error if the key decides what the model computes or where its answers end. It is a warning if a
runtime shows the key or a user may set it, and is named in a note if the key only describes the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose
from typing import Any

from pocketquant.check.contents import Contents
from pocketquant.check.findings import ERROR, WARNING, Finding
from pocketquant.check.structure import block_kinds

_OF_THE_FILE = (
    *("general.file_type", "general.quantization_version", "general.alignment", "general.architecture"),
    *("pocketquant.", "quantize.imatrix.", "split."),
)
"""Keys that say how a file was made; the source has none of them."""
_BLOCK_KINDS = ("full_attention_interval", "attention.recurrent_layers")
_BY_USERS = ("context_length", "vocab_size")
_OF_MTP = ("block_count", "nextn_predict_layers")
"""Keys that differ where the block is left out; `check_structure` compares them with the tensors."""
_OPTIONAL = (
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier"),
    *("rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"),
)
"""Keys that a file may lack; the model then computes something else."""
_COMPUTES = (
    "rope.",
    "attention.",
    "ssm.",
    "expert",
    "embedding",
    "feed_forward",
    "logit",
    "residual",
    "final",
    "vision.",
)
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id", "eog_token_ids")
_DECIDES = ("model", "pre", "tokens", "merges", "bos_token_id", "add_bos_token", "add_eos_token", *_ENDS)
_NOTE = "note"
_ADVICE = "the file was made from another checkpoint, or by a tool that reads the checkpoint differently"
_NAMED = 8


def compare_metadata(contents: Contents, source: Contents, notes: list[str]) -> Iterator[Finding]:
    """Every key that either of the two has; those that only describe go to the notes."""
    if contents.architecture != source.architecture:
        message = f"{contents.architecture!r}, the source is {source.architecture!r}"
        yield Finding(ERROR, "differs", "general.architecture", message, "give the checkpoint it was made from")
        return
    described = []
    for key in dict.fromkeys([*source.metadata, *contents.metadata]):
        ours, theirs = contents.metadata.get(key), source.metadata.get(key)
        if key.startswith(_OF_THE_FILE) or (ours and theirs and _is_equal(ours.value, theirs.value)):
            continue
        severity = _severity(key, contents, source)
        if severity == _NOTE:
            described.append(key)
        elif severity is not None:
            had = "missing" if ours is None else _short(ours.value, theirs.value if theirs else None)
            message = f"{had}; the source has {'none' if theirs is None else _short(theirs.value, None)}"
            advice = _ADVICE if severity == ERROR else "right only if it was changed on purpose"
            yield Finding(severity, "differs", key, message, advice)
    if described:
        more = f" and {len(described) - _NAMED} more" if len(described) > _NAMED else ""
        notes.append(f"these descriptions differ from the source's: {', '.join(described[:_NAMED])}{more}")


def _severity(key: str, contents: Contents, source: Contents) -> str | None:
    """ERROR or WARNING where the two differ; _NOTE for what only describes, None for what is no difference."""
    if key.startswith(f"{source.architecture}."):
        return _severity_of_size(key.removeprefix(f"{source.architecture}."), key, contents, source)
    if key == "tokenizer.ggml.add_bos_token" and key not in contents.metadata:
        return None
    if key.startswith("tokenizer.ggml."):
        return ERROR if key.removeprefix("tokenizer.ggml.") in _DECIDES else WARNING
    if key.startswith(("tokenizer.chat_template", "general.sampling.")):
        return WARNING
    return _NOTE


def _severity_of_size(short: str, key: str, contents: Contents, source: Contents) -> str | None:
    if short in _OF_MTP:
        return None
    if short in _BLOCK_KINDS:  # two ways of stating the same
        return None if block_kinds(contents) == block_kinds(source) else ERROR
    if short in _BY_USERS:
        return WARNING if key in contents.metadata and key in source.metadata else None
    if contents.is_text and key not in contents.metadata and short not in _OPTIONAL:
        return None  # other checks report the keys that every file must have
    return ERROR if short.startswith(_COMPUTES) else WARNING


def _is_equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_is_equal, ours, theirs))
    if isinstance(ours, float) and isinstance(theirs, float):
        return isclose(ours, theirs, rel_tol=1e-6)
    return bool(ours == theirs)


def _short(value: Any, other: Any) -> str:
    if not isinstance(value, list) or len(value) <= 8:
        return repr(value)[:80]
    if isinstance(other, list):
        first = next((i for i, pair in enumerate(zip(value, other, strict=False)) if pair[0] != pair[1]), None)
        if first is not None:
            return (
                f"a list of {len(value)} that differs first at {first}: {value[first]!r:.40} for {other[first]!r:.40}"
            )
    return f"a list of {len(value)}"

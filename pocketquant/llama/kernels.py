"""Which of llama.cpp's kernels computed a result, and whether two results come from the same ones.

What a run computed by states the `versions` of its runtime (`open_runtime`): a report, a reference pack, an importance
matrix, statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {
    "llama_cpp_features": "what llama.cpp was compiled for",
    "llama_cpp_extra_kernels": "whether its extra kernels are used",
    "llama_cpp_batch": "tokens in a batch",
    "llama_cpp_flash_attention": "flash attention",
}
"""Key of a runtime's versions -> what it says, in words."""

SEVERAL = "several"
"""In place of a version that what was added up differs in."""

_OF_THE_PROCESSOR = {"AMX", "CPU", "CPU_REPACK"}
"""Buffers of weights that differ between types of one machine, too; the keys above say which a machine has."""


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What of the kernels differs, in words, from the `versions` of two runs; what only one states differs."""
    found = [words for key, words in NAMES.items() if ours.get(key) != theirs.get(key)]
    return found + (["the device"] if _devices(ours) != _devices(theirs) else [])


def added_up(parts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The versions of a sum: what all its parts state alike, and `SEVERAL` where they differ or one states nothing."""
    keys = dict.fromkeys(key for part in parts for key in part)
    found = {key: {part.get(key, SEVERAL) for part in parts} for key in keys}
    return {key: values.pop() if len(values) == 1 else SEVERAL for key, values in found.items()}


def note_on_sum(parts: Mapping[str, Mapping[str, str]]) -> str:
    """A sentence on parts of a sum, by name, that were computed by other kernels than the first; "" if none was."""
    (first, ours), *others = parts.items()
    found = {name: differing(ours, theirs) for name, theirs in others}
    said = [f"{name} ({', '.join(words)})" for name, words in found.items() if words]
    if not said:
        return ""
    return (
        f"computed by other kernels of llama.cpp than {first}: {', '.join(said)}; the sum is sound, and no one machine "
        "makes it again to the last bit"
    )


def _devices(versions: Mapping[str, Any]) -> set[str]:
    return set(str(versions.get("llama_cpp_kernels", "")).split()) - _OF_THE_PROCESSOR

"""config.json and the model card -> GGUF metadata, by the architecture's table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketquant.architectures.table import Architecture, Sizes
from pocketquant.errors import ArchitectureError
from pocketquant.gguf_file.values import find_problem
from pocketquant.model import Value


def model_metadata(
    architecture: Architecture, text_config: Mapping[str, Any], sizes: Sizes, described: Mapping[str, Value]
) -> dict[str, Value]:
    """`general.*` from what was found out about the checkpoint, then the architecture's own keys.

    Raises:
        ArchitectureError: a value of config.json that cannot be written as the key's type.
    """
    metadata = {
        "general.architecture": Value("str", architecture.name),
        "general.type": Value("str", "model"),
        **described,
    }
    for rule in architecture.metadata:
        value = rule.from_config(text_config, sizes)
        if value is not None:
            metadata[f"{architecture.name}.{rule.key}"] = Value(rule.kind, _checked(rule.key, rule.kind, value))
    return metadata


def _checked(key: str, kind: str, value: Any) -> Any:
    if kind == "f32" and type(value) is int and abs(value) < 1 << 128:
        value = float(value)
    if problem := find_problem(Value(kind, value)):
        raise ArchitectureError(f"config.json: GGUF key {key}: {problem}")
    return value

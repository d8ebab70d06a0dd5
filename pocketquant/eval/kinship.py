"""Checks by headers, before anything runs, whether two files can be one model and the reference is unquantized."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

from pocketquant.architectures import architecture_of_class
from pocketquant.errors import EvalError, PocketquantError
from pocketquant.files.small import read_json
from pocketquant.gguf_file.reading import is_gguf, read_shards


def check_architecture(model: Path, reference: Path) -> None:
    """Refuses two files of different architectures.

    Raises:
        EvalError: both name their architecture, and the names differ.
    """
    ours, theirs = _architecture(model), _architecture(reference)
    if ours and theirs and ours != theirs:
        raise EvalError(
            f"{model} is a {ours}, {reference} a {theirs}, so they are different models and cannot be compared; "
            "give full precision of the same checkpoint"
        )


def describe_quantized(reference: Path) -> str:
    """The types of a reference's quantized matrices; "" for full precision, or for a file that is not a GGUF."""
    if not reference.is_file() or not is_gguf(reference):
        return ""
    weights: Counter[str] = Counter()
    for _, header in read_shards(reference):
        for tensor in header.tensors:
            if len(tensor.shape) > 1:
                weights[tensor.format.name if tensor.format.block_len > 1 else ""] += prod(tensor.shape)
    rounded = {name: count for name, count in weights.items() if name}
    if not rounded:
        return ""
    shares = [f"{100 * count / weights.total():.0f} % {name}" for name, count in Counter(rounded).most_common(3)]
    return ", ".join(shares)


def quantized_reference(name: str, types: str) -> str:
    """What a reader has to know where the reference is no full precision; `types` from `describe_quantized`."""
    return f"{name} is itself quantized ({types}): what it lost is missing from these numbers, or counted twice."


def _architecture(path: Path) -> str:
    """GGUF's name for what a file or a checkpoint's folder holds; "" where it does not say."""
    if path.is_dir():
        config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        classes = config.get("architectures") if isinstance(config, dict) else None
        try:
            return architecture_of_class(str(classes[0])).name if isinstance(classes, list) and classes else ""
        except PocketquantError:  # opening it will say what is wrong with it
            return ""
    if not path.is_file() or not is_gguf(path):
        return ""
    stated = read_shards(path)[0][1].metadata.get("general.architecture")
    return str(stated.value) if stated is not None else ""

"""Layouts of other tools' GGUF files that neither llama.cpp nor this program reads, recognized by keys and names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from pocketquant.model import Value

_PLAIN_GATES = ("silu", "swish")


def foreign_layout(architecture: str, metadata: Mapping[str, Value], names: Collection[str]) -> str:
    """Describes the layout of a text model's file that llama.cpp does not run; "" for any other file.

    Args:
        architecture: `general.architecture`.
        metadata: the file's.
        names: of its tensors.
    """
    folded = next((key for key in metadata if key.startswith("prism.")), None)
    if folded is not None:
        return (
            f"its weights are folded by a Hadamard rotation ({folded}): PrismML's fork of llama.cpp rotates the "
            "activations too, and every other program computes nonsense; take the unfolded checkpoint"
        )
    signs = []
    heads = metadata.get(f"{architecture}.attention.head_count_kv")
    if heads is not None and isinstance(heads.value, list):
        signs.append("attention.head_count_kv is an array")
    bare = next((name for name in names if re.fullmatch(r"blk\.\d+\.ssm_dt", name)), None)
    if bare is not None:
        signs.append(f"{bare} has no .bias")
    if signs:
        if any(name.startswith("v.") for name in names):
            signs.append("the vision tower is inside")
        return (
            f"a file in Ollama's own layout ({'; '.join(signs)}), which llama.cpp does not load: take the checkpoint, "
            "or the GGUF that its maker published with a separate mmproj"
        )
    gate = metadata.get(f"{architecture}.output_gate_type")
    if gate is not None and gate.value not in _PLAIN_GATES:
        return f"its output gate is {str(gate.value)[:40]!r}, llama.cpp computes silu: no runtime gives its numbers"
    return ""

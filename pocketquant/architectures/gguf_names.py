"""The tensors that a GGUF should hold, by name, according to its own metadata."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from pocketquant.architectures.table import ATTENTION, BLOCK, MODEL, MTP, Architecture, TensorRule
from pocketquant.model import Role, Value

MOST_BLOCKS = 4096
"""More than any model has: a file that announces more is broken, and nobody counts its blocks."""


def block_kinds(architecture: Architecture, metadata: Mapping[str, Value], n_trunk: int) -> tuple[str, ...]:
    """The kind of every block of the trunk (DELTA, ATTENTION), or of a vision tower (BLOCK)."""
    return architecture.kinds_from_gguf(metadata, min(max(n_trunk, 0), MOST_BLOCKS))


def rules_by_name(architecture: Architecture, kinds: Sequence[str], n_mtp: int) -> dict[str, TensorRule]:
    """Name in GGUF -> its rule, for every tensor that the trunk and the MTP blocks should have, the head included."""
    blocks = [(BLOCK, kind) for kind in kinds] + [(BLOCK, ATTENTION, MTP)] * n_mtp
    rules = {rule.target: rule for rule in architecture.tensors if rule.where == MODEL}
    for layer, words in enumerate(blocks):
        for rule in architecture.tensors:
            if rule.where in words:
                rules[f"{architecture.blocks}.{layer}.{rule.target}"] = rule
    return rules


def missing_names(
    rules: Mapping[str, TensorRule], names: Collection[str], n_trunk: int, n_mtp: int
) -> list[tuple[str, TensorRule]]:
    """What a file lacks of `rules_by_name`: not its head, which may be the embedding, nor a norm that may be shared.

    A file with an MTP block and no block 0 is a sidecar, which holds no trunk.
    """
    is_sidecar = n_mtp > 0 and not any(name.startswith("blk.0.") for name in names)
    trunk = tuple(f"blk.{layer}." for layer in range(n_trunk)) if is_sidecar else ()
    return [
        (name, rule)
        for name, rule in rules.items()
        if name not in names
        and rule.role is not Role.HEAD
        and not name.endswith(".nextn.shared_head_norm.weight")
        and not name.startswith(trunk)
    ]

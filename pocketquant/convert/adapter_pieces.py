"""Which rows of which tensor an adapter's change is added to.

A module has one weight, and that is that, but for experts: adapter and checkpoint may each keep them fused
(`mlp.experts.gate_up_proj` [n_expert, 2 n_ff_exp, n_embd], `down_proj`) or one by one (`mlp.experts.3.gate_proj`), and
the two need not agree: transformers 4 had a module for every expert, transformers 5 has parameters that hold them all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pocketquant.convert.adapter import LowRank
from pocketquant.convert.safetensors import CheckpointTensor

PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
"""Where the text model may stand in the trained model and in the checkpoint; the two need not agree."""
_FUSED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
_ONE = re.compile(r"(.+\.experts)\.(\d{1,5})\.(gate_proj|up_proj|down_proj)")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""A fused parameter -> the matrices that it holds for each expert, one below the other."""


@dataclass(frozen=True)
class Piece:
    """Some rows of a change, and the rows of a tensor that they are added to.

    Attributes:
        change: the pair of matrices.
        at: the tensor's first row; experts' matrices count one below the other.
        n_rows: how many.
        first: the change's first row.
        expert: whose factors.
    """

    change: LowRank
    at: int
    n_rows: int
    first: int = 0
    expert: int = 0

    @property
    def stop(self) -> int:
        return self.at + self.n_rows


def without_prefix(module: str) -> str:
    """A module's path inside the text model: "layers.0.mlp.up_proj", "embed_tokens", "lm_head"."""
    return module.removeprefix(next(prefix for prefix in PREFIXES if module.startswith(prefix)))


def name_in(stored: Collection[str], module: str, suffix: str = ".weight") -> str | None:
    """The checkpoint's name of a module's weight: as it stands, or under the checkpoint's own prefix."""
    inside = without_prefix(module)
    names = (f"{module}{suffix}", *(f"{prefix}{inside}{suffix}" for prefix in PREFIXES))
    return next((name for name in names if name in stored), None)


def pieces_of(change: LowRank, stored: Mapping[str, CheckpointTensor]) -> list[tuple[str, Piece]] | str:
    """(name in the checkpoint, piece) of everything that a change changes there, or why it fits nowhere.

    Raises:
        SourceError: experts' factors that nothing tells the layout of.
    """
    name = name_in(stored, change.module)
    if name is not None:
        if change.n_expert > 1 or change.shape != stored[name].shape:
            return f"{_shape(change)}, in the checkpoint {list(stored[name].shape)}"
        return [(name, Piece(change, 0, change.shape[0]))]
    if fused := _FUSED.fullmatch(change.module):
        name = name_in(stored, change.module, "")
        return _fused(change, name, stored[name].shape) if name else _one_by_one(change, fused[1], fused[2], stored)
    if one := _ONE.fullmatch(change.module):
        return _into_fused(change, one[1], int(one[2]), one[3], stored)
    return "the checkpoint has no such weight"


def _shape(change: LowRank) -> str:
    return f"{list(change.shape)}" if change.n_expert == 1 else f"{[change.n_expert, *change.shape]}"


def _fused(change: LowRank, name: str, shape: tuple[int, ...]) -> list[tuple[str, Piece]] | str:
    way = change.fitted(shape[1:]) if len(shape) == 3 and shape[0] == change.n_expert else None
    if way is None:
        return f"{_shape(change)}, in the checkpoint {list(shape)}"
    return [(name, Piece(way, e * shape[1], shape[1], 0, e)) for e in range(way.n_expert)]


def _one_by_one(
    change: LowRank, block: str, parameter: str, stored: Mapping[str, CheckpointTensor]
) -> list[tuple[str, Piece]] | str:
    parts = _PARTS[parameter]
    placed: list[tuple[str, Piece]] = []
    first = name_in(stored, f"{block}.0.{parts[0]}")
    if first is None:
        return "the checkpoint has no such weight"
    if len(stored[first].shape) != 2:
        return f"{_shape(change)}, in the checkpoint {list(stored[first].shape)} for each expert"
    rows, cols = stored[first].shape
    way = change.fitted((len(parts) * rows, cols))
    for e in range(change.n_expert):
        for i, part in enumerate(parts):
            name = name_in(stored, f"{block}.{e}.{part}")
            if way is None or name is None or stored[name].shape != (rows, cols):
                return f"{_shape(change)}, in the checkpoint [{rows}, {cols}] or nothing for expert {e}'s {part}"
            placed.append((name, Piece(way, 0, rows, i * rows, e)))
    if name_in(stored, f"{block}.{change.n_expert}.{parts[0]}") is not None:
        return f"{_shape(change)}, and the checkpoint has more experts"
    return placed


def _into_fused(
    change: LowRank, block: str, expert: int, part: str, stored: Mapping[str, CheckpointTensor]
) -> list[tuple[str, Piece]] | str:
    parameter = next(parameter for parameter, parts in _PARTS.items() if part in parts)
    name = name_in(stored, f"{block}.{parameter}", "")
    if name is None:
        return "the checkpoint has no such weight"
    shape, n_parts = stored[name].shape, len(_PARTS[parameter])
    rows, cols = change.shape
    if shape != (shape[0], n_parts * rows, cols) or expert >= shape[0]:
        return f"{_shape(change)} of expert {expert}, in the checkpoint {list(shape)}"
    at = expert * shape[1] + _PARTS[parameter].index(part) * rows
    return [(name, Piece(change, at, rows))]


def stack_of(name: str) -> str:
    """One name for the same matrix of all experts of a block, where each has its own; else the name itself."""
    return re.sub(r"\.experts\.\d{1,5}\.", ".experts.*.", name)

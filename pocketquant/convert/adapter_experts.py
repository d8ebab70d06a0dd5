"""What an adapter changes in experts, as the pairs of a GGUF adapter: `NAME.lora_a` and `.lora_b`, one for each expert.

llama.cpp multiplies by the chosen experts' A and B (`build_lora_mm_id` in `src/llama-graph.cpp`, b10359), each
[n_expert, rank, cols] and [n_expert, rows, rank], so all experts of a pair have one rank: factors of a lower one, and
those of experts that were not trained, are filled up with zeros.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pocketquant.convert.adapter import LowRank
from pocketquant.convert.adapter_merge import matrices
from pocketquant.convert.adapter_pieces import Piece, without_prefix
from pocketquant.convert.quantized.tensor import Reads
from pocketquant.formats import F32Array
from pocketquant.model import Model, Tensor

_MODULE = re.compile(r"layers\.(\d{1,5})\.mlp\.experts\.(?:(\d{1,5})\.)?(gate_up_proj|gate_proj|up_proj|down_proj)")
_TARGETS = {
    "gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "gate_proj": ("ffn_gate_exps.weight",),
    "up_proj": ("ffn_up_exps.weight",),
    "down_proj": ("ffn_down_exps.weight",),
}


@dataclass(frozen=True)
class ExpertRows:
    """One of the two stacks of matrices; a `RowSource`.

    Attributes:
        pieces: each expert's, None where it was not trained.
        rank: of all of them.
        shape: [n_expert, rows, cols] of this stack.
        is_a: which of the two.
        alpha: of the file; B makes up for what an expert's own scale differs.
        reads: keeps the matrices between chunks.
    """

    pieces: tuple[Piece | None, ...]
    rank: int
    shape: tuple[int, int, int]
    is_a: bool
    alpha: float
    reads: Reads

    def stored(self, start: int, stop: int) -> None:
        """None: rows are always computed."""
        return

    def rows(self, start: int, stop: int) -> F32Array:
        """Rows [start, stop) of the experts' matrices, one below the other, f32[n, n_cols]."""
        result = np.zeros((stop - start, self.shape[2]), np.float32)
        _, n_rows, _ = self.shape
        for expert in range(start // n_rows, -(-stop // n_rows)):
            piece, before = self.pieces[expert], expert * n_rows
            if piece is None:
                continue
            first, last = max(start - before, 0), min(stop - before, n_rows)
            values = self._matrix(piece, first, last)
            result[before + first - start :][: len(values), : values.shape[1]] = values
        return result

    def _matrix(self, piece: Piece, first: int, last: int) -> F32Array:
        """Rows [first, last) of an expert's A or B, as far as it has them."""
        if self.is_a:
            _, right = matrices(piece.change, self.reads, 0, 0, piece.expert)
            return right[first:last]
        left, _ = matrices(piece.change, self.reads, piece.first + first, piece.first + last, piece.expert)
        factor = piece.change.scale * self.rank / self.alpha
        return left if factor == 1.0 else (left.astype(np.float64) * factor).astype(np.float32)


@dataclass(frozen=True)
class ExpertPair:
    """What is added to one tensor of experts of the base model; `pieces` as in `ExpertRows`."""

    target: Tensor
    pieces: tuple[Piece | None, ...]

    @property
    def rank(self) -> int:
        return max(piece.change.rank for piece in self.pieces if piece)

    @property
    def alpha(self) -> float:
        """The alpha of a file that would leave most experts' B as they are."""
        scales = Counter(piece.change.scale for piece in self.pieces if piece)
        return scales.most_common(1)[0][0] * self.rank

    def tensors(self, alpha: float, reads: Reads) -> list[Tensor]:
        """A and B for a file of that alpha."""
        n_expert, n_rows, n_cols = self.target.shape
        target, made = self.target, []
        for is_a, shape in ((True, (n_expert, self.rank, n_cols)), (False, (n_expert, n_rows, self.rank))):
            name = f"{target.name}.lora_{'a' if is_a else 'b'}"
            rows = ExpertRows(self.pieces, self.rank, shape, is_a, alpha, reads)
            made.append(Tensor(name, target.role, target.layer, shape, "F32", rows))
        return made


def is_of_experts(change: LowRank) -> bool:
    """Whether a change is one of experts, fused or of a single one."""
    return _MODULE.fullmatch(without_prefix(change.module)) is not None


def expert_pairs(changes: Sequence[LowRank], base: Model) -> tuple[list[ExpertPair], list[str]]:
    """The pairs, in the order of the base model's tensors, and what does not fit.

    Raises:
        SourceError: experts' factors that nothing tells the layout of.
    """
    targets = {tensor.name: tensor for tensor in base.tensors}
    pieces: dict[str, list[Piece | None]] = {}
    problems = []
    for change in changes:
        match = _MODULE.fullmatch(without_prefix(change.module))
        assert match is not None
        names = [f"blk.{int(match[1])}.{name}" for name in _TARGETS[match[3]]]
        if any(name not in targets for name in names):
            problems.append(f"{change.module}: the base model has no such experts")
            continue
        n_expert, rows, cols = targets[names[0]].shape
        way = change.fitted((rows * len(names), cols))
        one = None if match[2] is None else int(match[2])
        if way is None or (change.n_expert != n_expert if one is None else one >= n_expert):
            found = list(change.shape) if one is not None else [change.n_expert, *change.shape]
            problems.append(f"{change.module}: {found}, in the base model {[n_expert, rows * len(names), cols]}")
            continue
        for i, name in enumerate(names):
            row = pieces.setdefault(name, [None] * n_expert)
            for expert in range(n_expert) if one is None else (one,):
                if row[expert] is not None:
                    problems.append(f"{change.module}: changes what another module changes already")
                    break
                row[expert] = Piece(way, 0, rows, i * rows, expert if one is None else 0)
    pairs = [ExpertPair(tensor, tuple(pieces[name])) for name, tensor in targets.items() if name in pieces]
    return pairs, problems


__all__ = ["ExpertPair", "ExpertRows", "expert_pairs", "is_of_experts"]

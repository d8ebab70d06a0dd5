"""Entries of a GGUF's tensor table, and where the tensors of our tables lie in them.

Other tools keep some tensors otherwise than llama.cpp's converter does by default, and llama.cpp runs them all the
same: queries, keys and values of full attention one below the other (`--fuse-qkv`), gate and up projections of the
experts likewise, and matrices of one row as vectors (its quantizer drops leading dimensions of one). Every type encodes
rows apart, so a part of a fused tensor is a part of its bytes.
Source: `create_tensor_qkv` and `create_tensor_gate_up_exps` of llama.cpp's src/llama-model.cpp, and `--fuse-qkv` and
`--fuse-gate-up-exps` of its converter, as of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from pocketquant.architectures.table import ATTENTION, Architecture, TensorRule, target_shape_of
from pocketquant.formats import QuantFormat

_FUSED = {
    "attn_qkv.weight": (("attn_q.weight", "q_dim"), ("attn_k.weight", "kv_dim"), ("attn_v.weight", "kv_dim")),
    "ffn_gate_up_exps.weight": (("ffn_gate_exps.weight", "n_ff_exp"), ("ffn_up_exps.weight", "n_ff_exp")),
}
"""Name in a block -> the parts, one below the other in each matrix, with the word for their rows."""


@dataclass(frozen=True)
class GgufTensor:
    """One entry of a GGUF's tensor table. `shape` is `[rows, cols]`, `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    format: QuantFormat
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Placed:
    """A tensor by its name and shape in our tables, and the pieces of the file that hold its rows, in their order."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[GgufTensor, ...]

    @property
    def format(self) -> QuantFormat:
        return self.pieces[0].format

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def runs(self, start: int, stop: int) -> Iterator[tuple[GgufTensor, int, int]]:
        """(piece, first row, last row + 1) of every piece that rows [start, stop) touch."""
        n_rows = prod(self.pieces[0].shape[:-1])
        while start < stop:
            number, row = divmod(start, n_rows)
            count = min(stop - start, n_rows - row)
            yield self.pieces[number], row, row + count
            start += count


def fused_parts(name: str) -> tuple[str, ...]:
    """Names of the tensors that a fused one stands for, where its block is of the right kind; () for any other."""
    block, _, inside = name.rpartition(".weight")[0].rpartition(".")
    return tuple(f"{block}.{part}" for part, _ in _FUSED.get(f"{inside}.weight", ()))


def place_tensor(
    entry: GgufTensor, architecture: Architecture, kinds: Sequence[str], sizes: Mapping[str, int]
) -> tuple[Placed, ...]:
    """The tensors that an entry of the file stands for: several where it is fused, else itself.

    Args:
        entry: of the file's tensor table.
        architecture: whose names and shapes are wanted.
        kinds: DELTA or ATTENTION for every block of the file, those of multi-token prediction included.
        sizes: the file's, by dimension word.
    """
    match = re.fullmatch(re.escape(architecture.blocks) + r"\.(\d{1,5})\.(.+)", entry.name)
    layer, inside = (int(match[1]), match[2]) if match else (None, entry.name)
    if layer is not None and inside in _FUSED and layer < len(kinds):
        parts = [(f"{architecture.blocks}.{layer}.{name}", sizes.get(word, 0)) for name, word in _FUSED[inside]]
        is_attention = kinds[layer] == ATTENTION
        n_rows = entry.shape[-2] if len(entry.shape) > 1 else 1
        if (is_attention or inside != "attn_qkv.weight") and sum(rows for _, rows in parts) == n_rows:
            return tuple(_split(entry, parts))
    rule = next((rule for rule in architecture.tensors if rule.target == inside), None)
    shape = entry.shape if rule is None else _with_single_rows(entry.shape, rule, sizes)
    return (Placed(entry.name, shape, (entry,)),)


def _split(entry: GgufTensor, parts: Sequence[tuple[str, int]]) -> Iterator[Placed]:
    row_bytes = entry.format.row_bytes(entry.shape[-1])
    *matrices, n_rows, n_cols = entry.shape
    first = 0
    for name, rows in parts:
        pieces = tuple(
            replace(
                entry,
                shape=(rows, n_cols),
                offset=entry.offset + (matrix * n_rows + first) * row_bytes,
                nbytes=rows * row_bytes,
            )
            for matrix in range(prod(matrices))
        )
        yield Placed(name, (*matrices, rows, n_cols), pieces)
        first += rows


def _with_single_rows(shape: tuple[int, ...], rule: TensorRule, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape with the leading dimensions of one that the table has and llama.cpp's quantizer drops."""
    try:
        expected = target_shape_of(rule, sizes)
    except KeyError:  # of a dimension that the file does not tell
        return shape
    missing = len(expected) - len(shape)
    return (1,) * missing + shape if missing > 0 and set(expected[:missing]) == {1} else shape

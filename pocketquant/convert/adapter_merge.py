"""Merges an adapter into a checkpoint while its rows are read.

A changed tensor stands in for the stored one and gives F32 rows, base + scale * B @ A, before anything is permuted: the
adapter was trained on the checkpoint's order of heads. Sums run in f64 in the order of the rank and are rounded once,
to f32, so that no linear algebra library has a say in the bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod

import numpy as np
import numpy.typing as npt

from pocketquant.convert.adapter import Adapter, LowRank
from pocketquant.convert.adapter_pieces import Piece, name_in, pieces_of, stack_of
from pocketquant.convert.mapping import is_same_data
from pocketquant.convert.quantized.numbers import floats
from pocketquant.convert.quantized.tensor import Reads
from pocketquant.convert.safetensors import CheckpointTensor, RangeFile, StoredTensor
from pocketquant.errors import SourceError, WeightError, listing
from pocketquant.formats import F32Array

HEAD = "lm_head"
_EMBEDDING = "embed_tokens"
_BLOCK_WEIGHTS = 1 << 15  # summed at a time: 256 KiB of f64, which stays in cache over the whole rank


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the checkpoint with an adapter's change added; a `CheckpointTensor`.

    Attributes:
        name: in the checkpoint.
        base: what is stored there.
        pieces: what to add, in the order of the rows; none for the plain numbers as F32.
        reads: keeps A and B between chunks.
    """

    name: str
    base: CheckpointTensor
    pieces: tuple[Piece, ...]
    reads: Reads

    @property
    def file(self) -> RangeFile:
        return self.base.file

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def nbytes(self) -> int:
        return 4 * prod(self.shape)

    def words(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Rows [start, stop) of the merged tensor, `<u4`; SourceError if the adapter's numbers are not finite."""
        rows = np.array(floats(self.base.words(start, stop), self.base.dtype), dtype="<f4")
        for piece in self.pieces[bisect_right(self.pieces, start, key=lambda piece: piece.stop) :]:
            if piece.at >= stop:
                break
            first, last = max(start, piece.at), min(stop, piece.stop)
            moved = piece.first - piece.at
            left, right = matrices(piece.change, self.reads, first + moved, last + moved, piece.expert)
            part = slice(first - start, last - start)
            rows[part] = add_product(rows[part], left, right, piece.change.scale)
        return rows.view("<u4")


def matrices(change: LowRank, reads: Reads, start: int, stop: int, expert: int = 0) -> tuple[F32Array, F32Array]:
    """Two matrices whose product, scaled, is the change of rows [start, stop): f32[n, rank] and f32[rank, cols].

    Raises:
        SourceError: a number is not finite.
    """
    a, b = reads.words(change.a), reads.words(change.b)
    if change.n_expert > 1:
        a = a.reshape(change.n_expert, change.rank, -1)[expert]
        b = b.reshape(len(b), change.rank, change.n_expert)[:, :, expert]
    if change.is_turned:
        left, right = floats(a[:, start:stop], change.a.dtype).T, floats(b, change.b.dtype).T
    else:
        left, right = floats(b[start:stop], change.b.dtype), floats(a, change.a.dtype)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise WeightError(
            f"{change.a.file}: {change.module}: non-finite number in its A or B matrix; the adapter is broken"
        )
    return left, right


def add_product(rows: F32Array, left: F32Array, right: F32Array, scale: float) -> F32Array:
    """rows + scale * left @ right, each entry summed in f64 in the order of the rank and rounded once.

    Args:
        rows: f32[n, k].
        left: f32[n, rank].
        right: f32[rank, k].
    """
    merged = np.empty_like(rows)
    scaled, right = left.astype(np.float64) * scale, right.astype(np.float64)
    step = max(1, _BLOCK_WEIGHTS // rows.shape[1])
    for start in range(0, len(rows), step):
        block = slice(start, min(start + step, len(rows)))
        total = np.zeros((block.stop - start, rows.shape[1]))
        term = np.empty_like(total)
        for column, line in zip(scaled[block].T, right, strict=True):
            np.multiply(column[:, None], line, out=term)
            total += term
        total += rows[block]
        with np.errstate(over="ignore"):  # whoever reads rows looks for what is not finite
            merged[block] = total
    return merged


def merge_adapter(
    stored: Mapping[str, CheckpointTensor], adapter: Adapter, tied: bool, dropped: Mapping[str, str], notes: list[str]
) -> dict[str, CheckpointTensor]:
    """The checkpoint's tensors with the adapter's changes in their place; reads no weights.

    While an adapter is trained, embedding and head are two modules even where they share their weights, so changing one
    of them leaves the other as it was, and loading it does too. The merged model then has a head of its own. (PEFT's
    `merge_and_unload` adds the change to the shared weights, and so to both.) A base weight that comes along for either
    of them is the shared one.

    Args:
        stored: the checkpoint's tensors by name.
        adapter: from `open_adapter`.
        tied: the embedding is the output head.
        dropped: prefixes of names that are left out of the model -> what they are.
        notes: what was merged is added here.

    Raises:
        SourceError: another vocabulary; modules that the checkpoint does not have, or of another shape (all listed).
    """
    embedding = name_in(stored, _EMBEDDING)
    _refuse_resized(adapter, None if embedding is None else stored[embedding].shape)
    _refuse_two_bases(adapter, tied)
    merge = _Merge(dict(stored), adapter, embedding if tied else None, notes)
    merge.replace_weights(adapter.base_weights, "of the base model that it brings along")
    merge.untie()
    merge.replace_weights(adapter.trained_weights, "trained whole")
    merge.add_changes()
    if merge.problems:
        raise SourceError(
            f"adapter {adapter.name}: does not fit the checkpoint; is it of another base model?\n"
            f"{listing(merge.problems)}"
        )
    notes.extend(_describe(adapter, merge.tensors, merge.replaced, dropped))
    return merge.tensors


@dataclass
class _Merge:
    """Tensors while an adapter is merged into them; `tied` is the embedding's name where it is the head, too."""

    tensors: dict[str, CheckpointTensor]
    adapter: Adapter
    tied: str | None
    notes: list[str]
    problems: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    reads: Reads = field(default_factory=Reads)

    def replace_weights(self, weights: Mapping[str, StoredTensor], what: str) -> None:
        """Puts whole weights in the place of the checkpoint's."""
        for module, tensor in weights.items():
            name = name_in(self.tensors, module) or name_in(self.tensors, module, "")
            if name is None and _last(module) == HEAD:
                name = self.tied
            if name is None:
                self.problems.append(f"{module}: the checkpoint has no such weight")
            elif tensor.shape != self.tensors[name].shape:
                found = f"{what}, {list(tensor.shape)}, in the checkpoint {list(self.tensors[name].shape)}"
                self.problems.append(f"{module}: {found}")
            else:
                self.tensors[name] = replace(tensor, name=name)
                self.replaced.append(name)
        if weights:
            self.notes.append(
                f"adapter {self.adapter.name}: {len(weights)} weights {what} in place of the checkpoint's"
            )

    def untie(self) -> None:
        """Gives the model a head of its own where one of two that were tied was trained."""
        adapter = self.adapter
        changed = [*adapter.trained_weights, *(change.module for change in adapter.changes)]
        ends = {_last(module) for module in changed} & {_EMBEDDING, HEAD}
        if self.tied is None or not ends:
            return
        if adapter.keeps_tie and ends == {HEAD}:
            self.problems.append(
                f"{HEAD}: trained as one with the embedding (ensure_weight_tying), which is not saved along"
            )
        if adapter.keeps_tie and ends == {_EMBEDDING}:
            return
        head = name_in(self.tensors, HEAD) or f"{HEAD}.weight"
        self.tensors[head] = MergedTensor(head, self.tensors[self.tied], (), self.reads)
        self.notes.append(
            f"adapter {adapter.name}: trained one of embedding and head, which were tied: now they are two"
        )

    def add_changes(self) -> None:
        """Adds the products of the low-rank matrices."""
        pieces: dict[str, list[Piece]] = {}
        for change in self.adapter.changes:
            placed = pieces_of(change, self.tensors)
            if isinstance(placed, str):
                self.problems.append(f"{change.module}: {placed}")
                continue
            for name, piece in placed:
                pieces.setdefault(name, []).append(piece)
        for parts in pieces.values():
            parts.sort(key=lambda piece: piece.at)
            self.problems += [
                f"{late.change.module}: changes what {early.change.module} changes already"
                for early, late in pairwise(parts)
                if late.at < early.stop
            ]
        stacks = {stack_of(name) for name in pieces}  # experts have to agree on their type: all of them become F32
        for name in [name for name in self.tensors if stack_of(name) in stacks]:
            self.tensors[name] = MergedTensor(name, self.tensors[name], tuple(pieces.get(name, ())), self.reads)


def refuse_whole_on_mlx(adapter: Adapter) -> None:
    """Norms of a checkpoint saved by MLX hold 1 + weight, and those that PEFT saves the weight alone."""
    whole = [*adapter.base_weights, *adapter.trained_weights]
    others = [module for module in whole if _last(module) not in (_EMBEDDING, HEAD)]
    if others:
        raise SourceError(
            f"adapter {adapter.name}: weights trained whole, for a checkpoint saved by MLX, which keeps norms and "
            f"kernels otherwise than in training; give the original checkpoint:\n{listing(others)}"
        )


def _refuse_resized(adapter: Adapter, shape: tuple[int, ...] | None) -> None:
    """Embedding and head of another number of rows are those of another vocabulary, which the base does not have."""
    whole = {**adapter.base_weights, **adapter.trained_weights}
    shapes = {module: tensor.shape for module, tensor in whole.items()}
    shapes |= {change.module: change.shape for change in adapter.changes}
    resized = {
        module: found
        for module, found in shapes.items()
        if shape is not None and _last(module) in (_EMBEDDING, HEAD) and found != shape and found[1:] == shape[1:]
    }
    if resized and shape is not None:
        rows = " or ".join(str(n) for n in sorted({found[0] for found in resized.values()}))
        raise SourceError(
            f"adapter {adapter.name}: was trained with a vocabulary of {rows} rows, and the checkpoint's embedding has "
            f"{shape[0]}. PEFT merges it only into a base resized to as many (resize_token_embeddings): do that with "
            f"the tokenizer it was trained with, save model and tokenizer, and convert the result:\n{listing(resized)}"
        )


def _refuse_two_bases(adapter: Adapter, tied: bool) -> None:
    ends = {_last(module): tensor for module, tensor in adapter.base_weights.items()}
    if tied and _EMBEDDING in ends and HEAD in ends and not is_same_data(ends[_EMBEDDING], ends[HEAD]):
        raise SourceError(
            f"adapter {adapter.name}: brings two different base weights along, of an embedding and a head that the "
            "checkpoint ties; it was trained on a base model whose head is its own: give that one"
        )


def _describe(
    adapter: Adapter, merged: Mapping[str, CheckpointTensor], replaced: list[str], dropped: Mapping[str, str]
) -> list[str]:
    ranks = sorted({change.rank for change in adapter.changes})
    scales = sorted({change.scale for change in adapter.changes})
    text = f"rank {_range(ranks)}, scale {_range(scales)}" if adapter.changes else "no LoRA matrices"
    described = [f"adapter {adapter.name}: merged into {len(adapter.changes)} tensors ({text})"]
    names = [*replaced]
    names += [name for name, tensor in merged.items() if isinstance(tensor, MergedTensor) and tensor.pieces]
    for what in dict.fromkeys(dropped.values()):
        prefixes = tuple(prefix for prefix, reason in dropped.items() if reason == what)
        count = sum(name.startswith(prefixes) for name in names)
        if count:
            described.append(
                f"adapter {adapter.name}: {count} of these belong to the {what}, which this file leaves out"
            )
    return described


def _range(values: list[int] | list[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _last(module: str) -> str:
    return module.rpartition(".")[2]

"""A GGUF as a `Model`: roles from its architecture's table, rows read when they are asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketquant.architectures import architecture_named
from pocketquant.architectures.foreign import foreign_layout
from pocketquant.architectures.gguf_names import MOST_BLOCKS, block_kinds, missing_names, rules_by_name
from pocketquant.architectures.table import ATTENTION, MODEL, TensorRule
from pocketquant.errors import ArchitectureError, WeightError, listing
from pocketquant.files.reading import read_at
from pocketquant.files.unchanged import FileState
from pocketquant.formats import F32Array, U8Array
from pocketquant.formats.plain import is_finite
from pocketquant.gguf_file.reading import OTHER_KINDS, read_shards
from pocketquant.gguf_file.tensors import Placed, place_tensor
from pocketquant.model import Model, Tensor, Value

_WRITTEN_BY_PLAN = ("general.file_type", "general.quantization_version", "pocketquant.", "quantize.imatrix.", "split.")


@dataclass(frozen=True)
class GgufRows:
    """Rows of one tensor of a GGUF file; a `RowSource`. `state` is what the file was; None where nobody compares."""

    path: Path
    tensor: Placed
    state: FileState | None = None

    def stored(self, start: int, stop: int) -> U8Array:
        """Rows as the file holds them, u8[n, bytes]; SourceError if a plain number is not finite."""
        kind = self.tensor.format
        raw = read_rows(self.path, self.tensor, start, stop, self.state)
        if kind.block_len == 1:
            self._check_finite(is_finite(raw, kind.name), start, stop)
        return raw

    def rows(self, start: int, stop: int) -> F32Array:
        """Rows decoded to f32[n, n_cols]; SourceError if a number is not finite."""
        values = self.tensor.format.decode(self.stored(start, stop), self.tensor.shape[-1])
        if self.tensor.format.block_len > 1:
            self._check_finite(is_finite(values, "F32"), start, stop)
        return values

    def _check_finite(self, finite: bool, start: int, stop: int) -> None:
        if not finite:
            raise WeightError(f"{self.path}: {self.tensor.name}: non-finite weight in rows {start} to {stop - 1}")


def read_rows(path: Path, tensor: Placed, start: int, stop: int, state: FileState | None = None) -> U8Array:
    """Rows [start, stop) of a tensor as the file holds them, u8[n, bytes]."""
    row_bytes = tensor.format.row_bytes(tensor.shape[-1])
    runs = [
        read_at(path, piece.offset + first * row_bytes, (last - first) * row_bytes, state)
        for piece, first, last in tensor.runs(start, stop)
    ]
    return (runs[0] if len(runs) == 1 else np.concatenate(runs)).reshape(stop - start, row_bytes)


def open_gguf(path: Path | str) -> Model:
    """Opens a GGUF of a known architecture: roles from the architecture's table, no data read.

    The first shard of a split one opens all of it.

    Raises:
        SourceError: broken file, or shards that are missing or do not belong together.
        ArchitectureError: unknown architecture; tensors unknown to its table or missing (all listed).
    """
    path = Path(path)
    shards = read_shards(path)
    header = shards[0][1]
    entries = [(shard.state, entry) for _, shard in shards for entry in shard.tensors]
    kind = str(header.metadata.get("general.type", Value("str", "")).value)
    if kind in OTHER_KINDS:
        raise ArchitectureError(f"{path}: {OTHER_KINDS[kind]}, and no model; `inspect` shows what it holds")
    architecture = architecture_named(str(header.metadata.get("general.architecture", Value("str", "")).value))
    names = {entry.name for _, entry in entries}
    if layout := foreign_layout(architecture.name, header.metadata, names) if architecture.is_text else "":
        raise ArchitectureError(f"{path}: {layout}")
    sizes = architecture.sizes_from_gguf(header.metadata)
    n_layer, n_mtp = sizes["n_layer"], sizes.get("n_mtp", 0)
    if n_layer + n_mtp > MOST_BLOCKS:
        raise ArchitectureError(f"{path}: announces {n_layer + n_mtp} blocks; the file is broken")
    kinds = block_kinds(architecture, header.metadata, n_layer)
    at_model = {rule.target: rule for rule in architecture.tensors if rule.where == MODEL}
    in_block = {rule.target: rule for rule in architecture.tensors if rule.where != MODEL}
    tensors, unknown, n_fused = [], [], 0
    for file, entry in entries:
        placed = place_tensor(entry, architecture, (*kinds, *[ATTENTION] * n_mtp), sizes)
        n_fused += len(placed) > 1
        for item in placed:
            rule, layer = _rule_for(item.name, architecture.blocks, at_model, in_block, n_layer + n_mtp)
            if rule is None:
                unknown.append(f"{item.name} {list(item.shape)}")
                continue
            source = GgufRows(file.path, item, file)
            tensors.append(
                Tensor(item.name, rule.role, layer, item.shape, item.format.name, source, keep_f32=rule.keep_f32)
            )
    if not entries:
        raise ArchitectureError(f"{path}: holds no tensors; whatever wrote it found none: convert the checkpoint again")
    rules = rules_by_name(architecture, kinds, n_mtp)
    missing = [name for name, _ in missing_names(rules, {tensor.name for tensor in tensors}, n_layer, n_mtp)]
    problems = [f"tensors that no {architecture.name} model has:\n{listing(unknown)}"] if unknown else []
    problems += [f"tensors of {architecture.name} that are missing:\n{listing(missing)}"] if missing else []
    if problems:
        raise ArchitectureError(f"{path}: {chr(10).join(problems)}\nconvert the checkpoint again, or `check` the file")
    metadata = {key: value for key, value in header.metadata.items() if not key.startswith(_WRITTEN_BY_PLAN)}
    notes = (f"{n_fused} tensors that another tool had fused: taken apart",) if n_fused else ()
    files = tuple(shard.state for _, shard in shards)
    return Model(architecture.name, metadata, tuple(tensors), sizes, notes, files)


def open_unfused(path: Path | str) -> Model:
    """`open_gguf` for work on the file's own tensors, or with what llama.cpp calls them while it runs.

    Raises:
        ArchitectureError: also where tensors are fused, with the command that takes them apart.
    """
    model = open_gguf(path)
    sources = [tensor.source for tensor in model.tensors]
    fused = {rows.tensor.pieces[0].name for rows in sources if isinstance(rows, GgufRows)} - {
        tensor.name for tensor in model.tensors
    }
    if fused:
        raise ArchitectureError(
            f"{path}: holds tensors that another tool fused, which must be apart here; make a file of the same types "
            f"with `pocketquant quantize {path} --recipe from:{path} --out FILE`:\n{listing(sorted(fused))}"
        )
    return model


def _rule_for(
    name: str, blocks: str, at_model: Mapping[str, TensorRule], in_block: Mapping[str, TensorRule], n_layer: int
) -> tuple[TensorRule | None, int | None]:
    match = re.fullmatch(re.escape(blocks) + r"\.(\d{1,5})\.(.+)", name)
    if match is None:
        return at_model.get(name), None
    layer = int(match[1])
    return (in_block.get(match[2]), layer) if layer < n_layer else (None, None)

"""A file's weights as a runtime holds them: what is read where it lies, and what is copied into another layout.

llama.cpp maps a file and multiplies with most weights where they lie. For some formats the CPU has kernels that want
rows interleaved; those weights are copied, and their originals in the mapping are not read again. A tied embedding is
both looked up (where it lies) and multiplied with (as a copy), so it can count twice.

Source: src/llama-model-loader.cpp (`select_weight_buft`, `create_tensor`, `get_mapping_range`) and
ggml/src/ggml-cpu/repack.cpp (`ggml_repack_get_optimal_repack_type`) of the llama.cpp in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pocketquant.architectures.table import ATTENTION, DELTA
from pocketquant.errors import ArchitectureError
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.gguf_file.reading import read_shards
from pocketquant.model import Model, Plan, Role

REPACKED_ROWS: Mapping[str, Mapping[str, int]] = {
    "none": {},
    "avx2": {"Q4_0": 8, "Q4_K": 8, "IQ4_NL": 8, "MXFP4": 8},
    "avx512": {"Q4_0": 8, "Q4_K": 8, "IQ4_NL": 8, "MXFP4": 8, "Q2_K": 8},
    "arm": {"Q4_0": 4, "Q4_K": 8, "Q5_K": 8, "Q6_K": 8, "Q8_0": 4, "IQ4_NL": 4, "MXFP4": 4},
}
"""Kind of CPU -> format -> the rows that are interleaved; a matrix with another number of rows is not copied. "arm" has
NEON with dot products or matrix instructions."""

_BLOCK_ROLES = {Role.DELTA_QKV: DELTA, Role.ATTN_Q: ATTENTION}
_LOOKED_UP = Role.EMBED
_NOT_MULTIPLIED = {Role.NORM, Role.DELTA_DECAY, Role.DELTA_DT, Role.DELTA_CONV}
_EXPERTS = {Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN}


@dataclass(frozen=True)
class Weight:
    """A tensor as a file holds it; `layer` is None outside the blocks, offsets of one `file` count from one place."""

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    type: str
    nbytes: int
    file: int
    offset: int


@dataclass(frozen=True)
class Weights:
    """What memory depends on of a file: no data is read.

    Attributes:
        sizes: the dimension words of `pocketquant.model`.
        kinds: DELTA or ATTENTION for every block of the trunk.
        weights: all tensors.
        n_tokens, n_merges: entries of the vocabulary, which the runtime keeps.
        file_bytes: of all files.
    """

    sizes: Mapping[str, int]
    kinds: tuple[str, ...]
    weights: tuple[Weight, ...]
    n_tokens: int
    n_merges: int
    file_bytes: int

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is also the output head."""
        return not any(weight.role is Role.HEAD for weight in self.weights)

    @property
    def trunk(self) -> tuple[Weight, ...]:
        """Without multi-token-prediction blocks, which a runtime loads only when it drafts with them."""
        n_layer = self.sizes.get("n_layer", 0)
        return tuple(weight for weight in self.weights if weight.layer is None or weight.layer < n_layer)

    @property
    def read_a_token(self) -> float:
        """Bytes that are read to compute one token: every matrix once, of experts those in use, no embedding rows."""
        used = self.sizes.get("n_expert_used", 0) / self.sizes.get("n_expert", 1)
        total = 0.0
        for weight in self.trunk:
            if weight.role is _LOOKED_UP and not self.is_tied:
                continue
            total += weight.nbytes * (used if weight.role in _EXPERTS else 1)
        return total


def weights_of(source: Plan | Path, model: Model | None = None) -> Weights:
    """What memory depends on, of a planned file or of a GGUF (the first shard of a split one).

    Args:
        source: the file.
        model: the source of a plan, for its sizes; not looked at for a GGUF.

    Raises:
        SourceError, ArchitectureError: the GGUF is broken or of an unknown architecture, or no text model.
    """
    if isinstance(source, Plan):
        if model is None:
            raise ValueError("a plan says no sizes: give the model it was made for")
        planned = [(item.tensor, item.format.name, item.nbytes, 0, item.offset) for item in source.tensors]
        file_bytes, metadata = source.file_bytes, source.metadata
    else:
        model = open_gguf(source)
        shards = read_shards(source)
        places = {
            item.name: (item.format.name, item.nbytes, number, item.offset)
            for number, (_, header) in enumerate(shards)
            for item in header.tensors
        }
        planned = [(tensor, *_placed(tensor.name, places)) for tensor in model.tensors]
        file_bytes = sum(path.stat().st_size for path, _ in shards)
        metadata = model.metadata
    weights = tuple(
        Weight(tensor.name, tensor.role, tensor.layer, tensor.shape, kind, nbytes, file, offset)
        for tensor, kind, nbytes, file, offset in planned
    )
    vocabulary = [metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges")]
    n_tokens, n_merges = (0 if value is None else len(value.value) for value in vocabulary)
    return Weights(model.sizes, _kinds(weights, model.sizes), weights, n_tokens, n_merges, file_bytes)


def _placed(name: str, places: Mapping[str, tuple[str, int, int, int]]) -> tuple[str, int, int, int]:
    if name not in places:
        raise ArchitectureError(f"{name}: part of a fused tensor; `pocketquant quantize` writes the file without those")
    return places[name]


def _kinds(weights: Iterable[Weight], sizes: Mapping[str, int]) -> tuple[str, ...]:
    by_layer = {weight.layer: _BLOCK_ROLES[weight.role] for weight in weights if weight.role in _BLOCK_ROLES}
    return tuple(by_layer[layer] for layer in range(sizes.get("n_layer", 0)) if layer in by_layer)


@dataclass(frozen=True)
class Held:
    """Bytes of a file's weights in memory.

    Attributes:
        mapped: the stretch of the file that is mapped, which llama.cpp logs as `CPU_Mapped model buffer size`.
        repacked: copies in another layout, `CPU_REPACK model buffer size`.
        needed: what is read while it runs: weights in place, and the copies.
    """

    mapped: int
    repacked: int
    needed: int


def held(weights: Weights, cpu: str = "none") -> Held:
    """What a runtime on a CPU holds of a file's trunk; `cpu` is a key of `REPACKED_ROWS`."""
    rows = REPACKED_ROWS[cpu]
    stretches: dict[int, tuple[int, int]] = {}
    in_place = repacked = 0
    for weight in weights.trunk:
        copies = _is_multiplied(weight, weights.is_tied) and _is_repacked(weight, rows)
        repacked += weight.nbytes * copies
        if copies and weight.role is not _LOOKED_UP:
            continue
        in_place += weight.nbytes
        first, last = stretches.get(weight.file, (weight.offset, 0))
        stretches[weight.file] = min(first, weight.offset), max(last, weight.offset + weight.nbytes)
    return Held(sum(last - first for first, last in stretches.values()), repacked, in_place + repacked)


def _is_multiplied(weight: Weight, is_tied: bool) -> bool:
    return weight.role not in _NOT_MULTIPLIED and (weight.role is not _LOOKED_UP or is_tied)


def _is_repacked(weight: Weight, rows: Mapping[str, int]) -> bool:
    return len(weight.shape) >= 2 and weight.type in rows and weight.shape[-2] % rows[weight.type] == 0

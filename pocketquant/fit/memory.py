"""The memory that a file takes when it runs: weights, KV cache, state and buffers, from its header alone.

Source: src/llama-kv-cache.cpp, src/llama-memory-recurrent.cpp, src/llama-hparams.cpp (`n_embd_r`, `n_embd_s`) and
`output_reserve` of src/llama-context.cpp, of the llama.cpp in llama-cpp-python 0.3.36. What is called an estimate was
measured once, as the comments say, or is a bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pocketquant.architectures.table import ATTENTION, DELTA
from pocketquant.errors import RecipeError
from pocketquant.fit.compute import Batch, compute_buffer_bytes, mtp_buffer_bytes
from pocketquant.fit.vision import RESERVED_SIDE, Tower, vision_buffer_bytes
from pocketquant.fit.weights import REPACKED_ROWS, Held, Weights, held
from pocketquant.formats import FORMATS

CACHE_TYPES = ("f16", "q8_0", "q4_0", "bf16", "f32", "q5_1", "q5_0", "q4_1", "iq4_nl")
CELLS = 256
"""llama.cpp rounds a context up to a multiple of this many cells."""
MOST_UBATCH, MOST_CONTEXT, MOST_SEQUENCES = 1 << 16, 1 << 24, 256

_F32 = 4
# Measured with files of the 0.8B and 4B shapes without weights: private memory that loading the vocabulary and opening
# contexts of 4,096 and 262,144 cells took beyond the buffers that are logged.
_TOKEN_BYTES, _MERGE_BYTES, _CELL_BYTES, _GRAPH_BYTES = 165, 100, 48, 11 << 20


@dataclass(frozen=True)
class Settings:
    """How the file is to be run; the names are llama.cpp's.

    Attributes:
        context: tokens of all sequences together.
        ubatch: the most tokens that are computed together.
        outputs: the most tokens of a batch that get logits: one for each sequence in llama.cpp's own programs, all
            512 of a batch in the default of its library and of llama-cpp-python.
        cache_type_k, cache_type_v: types of the KV cache.
        flash_attention: whether attention is computed without writing its scores down.
        sequences: sequences that are kept apart.
        draft: tokens that a multi-token-prediction block drafts at a time; 0 for none. The state of the DeltaNet blocks
            is then kept once more for each of them.

    Raises:
        RecipeError: a number out of range, a cache of another type, or values cached in blocks without flash attention,
            which llama.cpp refuses.
    """

    context: int = 4096
    ubatch: int = 512
    outputs: int = 1
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash_attention: bool = True
    sequences: int = 1
    draft: int = 0

    def __post_init__(self) -> None:
        limits = {"context": MOST_CONTEXT, "ubatch": MOST_UBATCH, "outputs": MOST_UBATCH, "sequences": MOST_SEQUENCES}
        for name, most in limits.items():
            if not 1 <= getattr(self, name) <= most:
                raise RecipeError(f"{name} {getattr(self, name)}: must be from 1 to {most:,}")
        if not 0 <= self.draft <= MOST_SEQUENCES:
            raise RecipeError(f"draft {self.draft}: must be from 0 to {MOST_SEQUENCES}")
        for kind in (self.cache_type_k, self.cache_type_v):
            if kind not in CACHE_TYPES:
                raise RecipeError(f"cache type {kind}: none of llama.cpp's; there are {', '.join(CACHE_TYPES)}")
        if not self.flash_attention and not FORMATS[self.cache_type_v.upper()].is_plain:
            raise RecipeError(f"cache type {self.cache_type_v} for values needs flash attention; use f16 without it")

    @property
    def cells(self) -> int:
        """Cells of the KV cache."""
        return -(-self.context // CELLS) * CELLS


@dataclass(frozen=True)
class Part:
    """One part of the memory.

    Attributes:
        name: what it is.
        nbytes: its size.
        is_estimate: whether it is not computed as llama.cpp computes it.
        how: the arithmetic, or where the figure comes from.
    """

    name: str
    nbytes: int
    is_estimate: bool
    how: str


def memory_parts(
    weights: Weights,
    settings: Settings,
    cpu: str,
    *,
    tower: Tower | None = None,
    mtp: Weights | None = None,
) -> tuple[Part, ...]:
    """All parts, largest first.

    Args:
        weights: of the model's file.
        settings: how it is run.
        cpu: the kind of CPU, a key of `REPACKED_ROWS`; "none" where nothing is packed anew.
        tower: a vision tower that is loaded beside it.
        mtp: a multi-token-prediction block in a file of its own, where one drafts.
    """
    kept = held(weights, cpu)
    parts = [
        Part("weights", kept.needed, False, _say_held(kept)),
        Part("KV cache", kv_bytes(weights, settings), False, _say_cache(weights, settings)),
        Part("DeltaNet state", state_bytes(weights, settings), False, _say_state(weights, settings)),
        Part("compute buffer", compute_bytes(weights, settings), False, f"a batch of {settings.ubatch} tokens"),
        Part("logits", weights.sizes["n_vocab"] * _F32 * settings.outputs, False, f"{settings.outputs} rows"),
        Part("runtime", runtime_bytes(weights, settings), True, "vocabulary, graph and cells, measured on x86 Linux"),
    ]
    if tower is not None:
        flash = settings.flash_attention
        buffer = vision_buffer_bytes(tower, flash_attention=flash)
        parts.append(Part("vision tower", tower.nbytes, False, "weights of the mmproj file"))
        parts.append(Part("vision buffer", buffer, False, f"set aside for {RESERVED_SIDE} x {RESERVED_SIDE} pixels"))
    if mtp is not None or settings.draft:
        parts += mtp_parts(weights, settings, mtp)
    return tuple(sorted((part for part in parts if part.nbytes), key=lambda part: -part.nbytes))


def kv_bytes(weights: Weights, settings: Settings) -> int:
    """Keys and values of the full-attention blocks of the trunk, the only ones that have a cache."""
    return weights.kinds.count(ATTENTION) * settings.cells * _cell_bytes(weights.sizes, settings)


def _cell_bytes(sizes: Mapping[str, int], settings: Settings) -> int:
    types = (settings.cache_type_k, settings.cache_type_v)
    return sum(FORMATS[kind.upper()].row_bytes(sizes["kv_dim"]) for kind in types)


def state_bytes(weights: Weights, settings: Settings) -> int:
    """State and convolution of the DeltaNet blocks, in f32, whatever the context."""
    return weights.kinds.count(DELTA) * _state_numbers(weights.sizes) * _F32 * settings.sequences * (1 + settings.draft)


def _state_numbers(sizes: Mapping[str, int]) -> int:
    return sizes["head_k_dim"] * sizes["v_dim"] + (sizes["n_conv"] - 1) * sizes["conv_dim"]


def compute_bytes(weights: Weights, settings: Settings) -> int:
    """What llama.cpp logs as "compute buffer size" on a CPU."""
    return compute_buffer_bytes(weights.sizes, weights.kinds, _batch(weights.sizes, settings))


def _batch(sizes: Mapping[str, int], settings: Settings) -> Batch:
    tokens = min(settings.ubatch, settings.cells)
    tokens = -(-tokens // settings.sequences) * settings.sequences
    turns = sizes["head_dim"] % 64 == 0
    return Batch(
        context=settings.cells,
        tokens=tokens,
        outputs=min(tokens, settings.outputs),
        sequences=settings.sequences,
        flash_attention=settings.flash_attention,
        rotate_k=turns and not FORMATS[settings.cache_type_k.upper()].is_plain,
        rotate_v=turns and not FORMATS[settings.cache_type_v.upper()].is_plain,
        snapshots=1 + settings.draft,
    )


def runtime_bytes(weights: Weights, settings: Settings) -> int:
    """The runtime's own tables: vocabulary, description of the graph, positions of the cache's cells."""
    vocabulary = weights.n_tokens * _TOKEN_BYTES + weights.n_merges * _MERGE_BYTES
    return vocabulary + settings.cells * _CELL_BYTES + _GRAPH_BYTES


def mtp_parts(weights: Weights, settings: Settings, mtp: Weights | None) -> list[Part]:
    """What drafting with a multi-token-prediction block adds: its file or block, a cache of its own, and a batch."""
    nbytes = sum(weight.nbytes for weight in (mtp or weights).weights)
    if mtp is None:
        nbytes -= sum(weight.nbytes for weight in weights.trunk)
    alone = replace(settings, draft=0)
    cache = settings.cells * _cell_bytes(weights.sizes, settings)
    buffer = mtp_buffer_bytes(weights.sizes, _batch(weights.sizes, alone))
    return [
        Part("MTP weights", nbytes, False, "a file of its own, with its embedding" if mtp else "in the model's file"),
        Part("MTP KV cache", cache, False, "one block"),
        Part("MTP compute buffer", buffer, False, "one block and the head"),
    ]


def _say_held(kept: Held) -> str:
    if not kept.repacked:
        return "read where they lie in the file"
    return f"{kept.needed - kept.repacked:,} where they lie in the file, {kept.repacked:,} packed anew for the CPU"


def _say_cache(weights: Weights, settings: Settings) -> str:
    types = f"{settings.cache_type_k}/{settings.cache_type_v}"
    return f"{weights.kinds.count(ATTENTION)} of {len(weights.kinds)} blocks, {settings.cells:,} cells, {types}"


def _say_state(weights: Weights, settings: Settings) -> str:
    copies = f", {1 + settings.draft} times to draft" if settings.draft else ""
    return f"{weights.kinds.count(DELTA)} blocks, {settings.sequences} sequence(s){copies}, any context"


__all__ = ["CACHE_TYPES", "REPACKED_ROWS", "Part", "Settings", "memory_parts"]

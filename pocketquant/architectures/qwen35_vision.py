"""The vision tower of Qwen3.5 and Qwen3.6, which llama.cpp reads from a file of its own: `mmproj-*.gguf`.

Sources: transformers 5.23 `models/qwen3_5` (names, shapes, the maths and the defaults of its vision config) and
llama.cpp b10359 `conversion/qwen3vl.py`, `tools/mtmd/clip.cpp`, `tools/mtmd/models/qwen3vl.cpp` (GGUF names, keys, and
what the runtime has built in). All models of the family share one shape of tower: blocks of attention and feed-forward
with biases, then a merger that turns each square of 2 x 2 patches into one embedding of the text model.

The words for dimensions: n_embd n_ff n_layer n_head as in the text model, and
    n_patch n_channel n_frame    side of a patch in pixels, colours, frames of a patch (a still image is shown twice)
    n_pos                        positions of the square grid that the position embeddings were learned on
    n_qkv n_merged n_text        3 * n_embd, n_embd of 2 x 2 patches together, width of the text model
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from pocketquant.architectures.table import BLOCK, MODEL, Architecture, MetadataRule, Sizes, TensorRule
from pocketquant.errors import ArchitectureError, listing
from pocketquant.model import Role, Value

PROJECTOR = "qwen3vl_merger"
"""llama.cpp's name for this kind of tower; Qwen3-VL has the same."""
PREFIXES = ("model.visual.", "visual.", "model.language_model.visual.", "vision_tower.", "model.vision_tower.")
"""What the tower's names begin with in the checkpoints that are about; the last two are those of MLX programs."""

# ---------------------------------------------------------------- tensors

_KERNEL = "n_embd n_channel n_frame n_patch n_patch"
"""A kernel over two frames; in GGUF it is two, one for each frame, and a rule's `half` says which."""


def _linear(where: str, source: str, target: str, role: Role, rows: str, cols: str) -> tuple[TensorRule, TensorRule]:
    return (
        TensorRule(where, f"{source}.weight", f"{target}.weight", role, f"{rows} {cols}"),
        TensorRule(where, f"{source}.bias", f"{target}.bias", Role.VISION_BIAS, rows, keep_f32=True),
    )


def _norm(where: str, source: str, target: str) -> tuple[TensorRule, TensorRule]:
    return (
        TensorRule(where, f"{source}.weight", f"{target}.weight", Role.VISION_NORM, "n_embd", keep_f32=True),
        TensorRule(where, f"{source}.bias", f"{target}.bias", Role.VISION_NORM, "n_embd", keep_f32=True),
    )


_TENSORS = (
    TensorRule(MODEL, "patch_embed.proj.weight", "v.patch_embd.weight", Role.VISION_PATCH, _KERNEL, half=0),
    TensorRule(MODEL, "patch_embed.proj.weight", "v.patch_embd.weight.1", Role.VISION_PATCH, _KERNEL, half=1),
    TensorRule(MODEL, "patch_embed.proj.bias", "v.patch_embd.bias", Role.VISION_BIAS, "n_embd", keep_f32=True),
    # llama.cpp interpolates between positions, which it does in F32 only
    TensorRule(
        MODEL, "pos_embed.weight", "v.position_embd.weight", Role.VISION_POSITION, "n_pos n_embd", keep_f32=True
    ),
    *_norm(BLOCK, "norm1", "ln1"),
    *_linear(BLOCK, "attn.qkv", "attn_qkv", Role.VISION_QKV, "n_qkv", "n_embd"),
    *_linear(BLOCK, "attn.proj", "attn_out", Role.VISION_OUT, "n_embd", "n_embd"),
    *_norm(BLOCK, "norm2", "ln2"),
    *_linear(BLOCK, "mlp.linear_fc1", "ffn_up", Role.VISION_UP, "n_ff", "n_embd"),
    *_linear(BLOCK, "mlp.linear_fc2", "ffn_down", Role.VISION_DOWN, "n_embd", "n_ff"),
    *_norm(MODEL, "merger.norm", "v.post_ln"),
    *_linear(MODEL, "merger.linear_fc1", "mm.0", Role.VISION_MERGE, "n_merged", "n_merged"),
    *_linear(MODEL, "merger.linear_fc2", "mm.2", Role.VISION_MERGE, "n_text", "n_merged"),
)

# ---------------------------------------------------------------- sizes

_FROM_CONFIG = {
    "n_layer": ("depth", 27),
    "n_embd": ("hidden_size", 1152),
    "n_ff": ("intermediate_size", 4304),
    "n_head": ("num_heads", 16),
    "n_channel": ("in_channels", 3),
    "n_patch": ("patch_size", 16),
    "n_frame": ("temporal_patch_size", 2),
    "n_merge": ("spatial_merge_size", 2),
    "n_text": ("out_hidden_size", 3584),
    "n_pos": ("num_position_embeddings", 2304),
}
"""Word -> key, and the number that transformers takes where the key is missing: it saves only what differs."""
_BUILT_IN = {"n_channel": 3, "n_frame": 2, "n_merge": 2}
"""What llama.cpp's graph has no other number for."""
_LARGEST = 1 << 24


def _with_products(sizes: dict[str, int]) -> dict[str, int]:
    sizes["n_kv"] = sizes["n_head"]
    sizes["n_qkv"] = 3 * sizes["n_embd"]
    sizes["n_merged"] = sizes["n_merge"] ** 2 * sizes["n_embd"]
    return sizes


def _number(config: Mapping[str, Any], key: str, default: int) -> Any:
    value = config.get(key, default)
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return value[0]  # transformers allows [16, 16] for a square patch
    return value


def read_sizes(config: Mapping[str, Any]) -> Sizes:
    """Vision config -> the number of every dimension word.

    Raises:
        ArchitectureError: no sensible integers, or a tower that llama.cpp would compute differently (all listed).
    """
    sizes = {word: _number(config, key, default) for word, (key, default) in _FROM_CONFIG.items()}
    problems = [
        f"{_FROM_CONFIG[word][0]}: {value!r}, expected an integer from 1 to {_LARGEST}"
        for word, value in sizes.items()
        if type(value) is not int or not 1 <= value <= _LARGEST
    ]
    if problems:
        raise ArchitectureError(f"config.json vision_config does not describe a vision tower:\n{listing(problems)}")
    problems = [
        f"{_FROM_CONFIG[word][0]} {sizes[word]}: llama.cpp computes with {built_in}"
        for word, built_in in _BUILT_IN.items()
        if sizes[word] != built_in
    ]
    if sizes["n_embd"] % (4 * sizes["n_head"]):
        problems.append(
            f"hidden_size {sizes['n_embd']} is no multiple of 4 x num_heads {sizes['n_head']}, which the rotation needs"
        )
    if isqrt(sizes["n_pos"]) ** 2 != sizes["n_pos"]:
        problems.append(f"num_position_embeddings {sizes['n_pos']} is no square")
    if config.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        problems.append(f"hidden_act {config['hidden_act']!r}: llama.cpp computes gelu_pytorch_tanh")
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", 10000) if isinstance(rope, dict) else rope
    if theta != 10000:
        problems.append(f"rope_theta {theta!r}: llama.cpp rotates with 10000")
    if config.get("deepstack_visual_indexes"):
        problems.append(
            f"deepstack_visual_indexes {str(config['deepstack_visual_indexes'])[:80]}: a Qwen3-VL tower; the text "
            "models of Qwen3.5 take no features from within it, and llama.cpp does not load the two together"
        )
    if problems:
        raise ArchitectureError(f"config.json vision_config asks for what the runtimes cannot do:\n{listing(problems)}")
    return _with_products(sizes)


def sizes_from_gguf(metadata: Mapping[str, Value]) -> Sizes:
    """The same sizes from the metadata of an mmproj GGUF; ArchitectureError for another kind of tower."""
    projector = metadata.get("clip.projector_type", Value("str", None)).value
    if projector != PROJECTOR:
        raise ArchitectureError(f"GGUF metadata clip.projector_type {projector!r}: only {PROJECTOR} is supported")

    def number(key: str) -> int:
        value = metadata.get(f"clip.vision.{key}", Value("u32", None)).value
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise ArchitectureError(f"GGUF metadata clip.vision.{key}: missing or no sensible integer; broken file")
        return value

    n_patch = number("patch_size")
    return _with_products(
        {
            "n_layer": number("block_count"),
            "n_embd": number("embedding_length"),
            "n_ff": number("feed_forward_length"),
            "n_head": number("attention.head_count"),
            "n_channel": 3,
            "n_patch": n_patch,
            "n_frame": 2,
            "n_merge": number("spatial_merge_size"),
            "n_text": number("projection_dim"),
            "n_pos": (number("image_size") // n_patch) ** 2,
        }
    )


# ---------------------------------------------------------------- metadata

_METADATA = (
    MetadataRule("has_vision_encoder", "bool", lambda config, sizes: True),
    MetadataRule("vision.projection_dim", "u32", lambda config, sizes: sizes["n_text"]),
    MetadataRule("vision.image_size", "u32", lambda config, sizes: isqrt(sizes["n_pos"]) * sizes["n_patch"]),
    MetadataRule("vision.patch_size", "u32", lambda config, sizes: sizes["n_patch"]),
    MetadataRule("vision.embedding_length", "u32", lambda config, sizes: sizes["n_embd"]),
    MetadataRule("vision.feed_forward_length", "u32", lambda config, sizes: sizes["n_ff"]),
    MetadataRule("vision.block_count", "u32", lambda config, sizes: sizes["n_layer"]),
    MetadataRule("vision.attention.head_count", "u32", lambda config, sizes: sizes["n_head"]),
    MetadataRule("vision.image_mean", "f32[]", lambda config, sizes: config["image_mean"]),
    MetadataRule("vision.image_std", "f32[]", lambda config, sizes: config["image_std"]),
    MetadataRule("projector_type", "str", lambda config, sizes: PROJECTOR),
    MetadataRule("use_gelu", "bool", lambda config, sizes: True),
    MetadataRule("vision.spatial_merge_size", "u32", lambda config, sizes: sizes["n_merge"]),
    # transformers has this number in the code; llama.cpp's converter takes the text model's, which is the same so far
    MetadataRule("vision.attention.layer_norm_epsilon", "f32", lambda config, sizes: 1e-6),
    MetadataRule("vision.is_deepstack_layers", "bool[]", lambda config, sizes: [False] * sizes["n_layer"]),
)

QWEN35_VISION = Architecture(
    name="clip",
    classes=(),  # a checkpoint's class names its text model; `convert.vision` looks for the tower beside it
    tensors=_TENSORS,
    metadata=_METADATA,
    read_sizes=read_sizes,
    layer_kinds=lambda config: (BLOCK,) * read_sizes(config)["n_layer"],
    sizes_from_gguf=sizes_from_gguf,
    kinds_from_gguf=lambda metadata, n_blocks: (BLOCK,) * n_blocks,
    dropped={},
    blocks="v.blk",
)

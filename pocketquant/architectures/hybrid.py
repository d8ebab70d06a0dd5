"""What the dense and the mixture-of-experts text models share: all but the feed-forward; the order of value heads, too.

Sources: transformers `models/qwen3_5` and `models/qwen3_5_moe` (names, shapes, the maths) and llama.cpp
`conversion/qwen.py`, `src/models/qwen35.cpp`, `src/models/qwen35moe.cpp` (GGUF names, head order, keys). Two things are
easy to get wrong:

* RMSNorm in the checkpoint multiplies by `1 + weight`, GGML's by `weight`, so 1 is added on the way; DeltaNet's own
  norm multiplies by `weight` in both.
* A DeltaNet key head serves r = n_v / n_k value heads. The checkpoint groups value heads by key head
  `[g0v0 g0v1 .. g1v0 g1v1 ..]`, GGML broadcasts the key heads in tiles `[g0v0 g1v0 .. g0v1 g1v1 ..]`, so everything
  that is indexed by value head changes order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.architectures.table import (
    ATTENTION,
    BLOCK,
    DELTA,
    MODEL,
    ElementWise,
    MetadataRule,
    PreTokenizer,
    Sizes,
    TensorRule,
)
from pocketquant.errors import ArchitectureError, listing
from pocketquant.formats import F32Array
from pocketquant.model import Role

# ---------------------------------------------------------------- transforms


def _tiled(n_k: int, n_v: int, head_dim: int) -> npt.NDArray[np.int64]:
    grouped = np.arange(n_v * head_dim, dtype=np.int64).reshape(n_k, n_v // n_k, head_dim)
    return grouped.transpose(1, 0, 2).reshape(-1)


def tiled_heads(sizes: Sizes) -> npt.NDArray[np.int64]:
    """Value heads of `head_v_dim` entries each, grouped by key head -> tiled."""
    return _tiled(sizes["n_k"], sizes["n_v"], sizes["head_v_dim"])


def tiled_scalars(sizes: Sizes) -> npt.NDArray[np.int64]:
    """One entry per value head, grouped by key head -> tiled."""
    return _tiled(sizes["n_k"], sizes["n_v"], 1)


def tiled_after_qk(sizes: Sizes) -> npt.NDArray[np.int64]:
    """Query and key channels as they are, then value channels as `tiled_heads`."""
    n_qk = 2 * sizes["k_dim"]
    return np.concatenate([np.arange(n_qk, dtype=np.int64), n_qk + tiled_heads(sizes)])


def _add_one(rows: F32Array) -> F32Array:
    return rows + np.float32(1.0)


def _subtract_one(rows: F32Array) -> F32Array:
    return rows - np.float32(1.0)


def _minus_exp(rows: F32Array) -> F32Array:
    with np.errstate(over="ignore"):
        return (-np.exp(rows.astype(np.float64))).astype(np.float32)


def _log_of_minus(rows: F32Array) -> F32Array:
    return np.log(-rows.astype(np.float64)).astype(np.float32)


plus_one = ElementWise("plus_one", _add_one, _subtract_one)
"""x -> x + 1 in f32."""

minus_exp = ElementWise("minus_exp", _minus_exp, _log_of_minus)
"""x -> -exp(x), correctly rounded to f32, so that the bytes do not depend on a maths library."""


# ---------------------------------------------------------------- tensors

HYBRID_TENSORS = (
    TensorRule(MODEL, "embed_tokens.weight", "token_embd.weight", Role.EMBED, "n_vocab n_embd"),
    TensorRule(MODEL, "norm.weight", "output_norm.weight", Role.NORM, "n_embd", each=plus_one, keep_f32=True),
    TensorRule(MODEL, "lm_head.weight", "output.weight", Role.HEAD, "n_vocab n_embd", alone=True),
    TensorRule(BLOCK, "input_layernorm.weight", "attn_norm.weight", Role.NORM, "n_embd", each=plus_one, keep_f32=True),
    TensorRule(
        DELTA,
        "linear_attn.in_proj_qkv.weight",
        "attn_qkv.weight",
        Role.DELTA_QKV,
        "conv_dim n_embd",
        rows=tiled_after_qk,
    ),
    TensorRule(
        DELTA, "linear_attn.in_proj_z.weight", "attn_gate.weight", Role.DELTA_GATE, "v_dim n_embd", rows=tiled_heads
    ),
    TensorRule(
        DELTA, "linear_attn.in_proj_b.weight", "ssm_beta.weight", Role.DELTA_BETA, "n_v n_embd", rows=tiled_scalars
    ),
    TensorRule(
        DELTA, "linear_attn.in_proj_a.weight", "ssm_alpha.weight", Role.DELTA_ALPHA, "n_v n_embd", rows=tiled_scalars
    ),
    TensorRule(
        DELTA,
        "linear_attn.A_log",
        "ssm_a",
        Role.DELTA_DECAY,
        "n_v",
        rows=tiled_scalars,
        each=minus_exp,
        keep_f32=True,
    ),
    TensorRule(DELTA, "linear_attn.dt_bias", "ssm_dt.bias", Role.DELTA_DT, "n_v", rows=tiled_scalars, keep_f32=True),
    TensorRule(
        DELTA,
        "linear_attn.conv1d.weight",
        "ssm_conv1d.weight",
        Role.DELTA_CONV,
        "conv_dim 1 n_conv",
        rows=tiled_after_qk,
        keep_f32=True,
    ),
    TensorRule(DELTA, "linear_attn.norm.weight", "ssm_norm.weight", Role.NORM, "head_v_dim", keep_f32=True),
    TensorRule(
        DELTA, "linear_attn.out_proj.weight", "ssm_out.weight", Role.DELTA_OUT, "n_embd v_dim", cols=tiled_heads
    ),
    TensorRule(ATTENTION, "self_attn.q_proj.weight", "attn_q.weight", Role.ATTN_Q, "q_dim n_embd"),
    TensorRule(ATTENTION, "self_attn.k_proj.weight", "attn_k.weight", Role.ATTN_K, "kv_dim n_embd"),
    TensorRule(ATTENTION, "self_attn.v_proj.weight", "attn_v.weight", Role.ATTN_V, "kv_dim n_embd"),
    TensorRule(ATTENTION, "self_attn.o_proj.weight", "attn_output.weight", Role.ATTN_OUT, "n_embd attn_dim"),
    TensorRule(
        ATTENTION, "self_attn.q_norm.weight", "attn_q_norm.weight", Role.NORM, "head_dim", each=plus_one, keep_f32=True
    ),
    TensorRule(
        ATTENTION, "self_attn.k_norm.weight", "attn_k_norm.weight", Role.NORM, "head_dim", each=plus_one, keep_f32=True
    ),
    TensorRule(
        BLOCK,
        "post_attention_layernorm.weight",
        "post_attention_norm.weight",
        Role.NORM,
        "n_embd",
        each=plus_one,
        keep_f32=True,
    ),
)

# ---------------------------------------------------------------- sizes

FROM_CONFIG = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv": "num_key_value_heads",
    "head_dim": "head_dim",
    "n_k": "linear_num_key_heads",
    "n_v": "linear_num_value_heads",
    "head_k_dim": "linear_key_head_dim",
    "head_v_dim": "linear_value_head_dim",
    "n_conv": "linear_conv_kernel_dim",
    "n_vocab": "vocab_size",
    "n_ctx": "max_position_embeddings",
}
_EPSILON = 1e-6  # of RMSNorm, where config.json has none
LEAST_EPSILON = 2.0**-126  # in f32, smaller ones lose digits and end as 0
LARGEST_THETA, _LARGEST_FACTOR = 1e15, 1e6
LARGEST = 1 << 24  # no dimension of any model comes near; a larger one is a broken file
MOST = {"n_layer": 512, "n_expert": 1024}
"""What llama.cpp has room for (LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS of src/llama-hparams.h)."""


def with_products(sizes: dict[str, int]) -> dict[str, int]:
    """Adds the dimensions that follow from others, in place."""
    sizes["k_dim"] = sizes["n_k"] * sizes["head_k_dim"]
    sizes["v_dim"] = sizes["n_v"] * sizes["head_v_dim"]
    sizes["conv_dim"] = 2 * sizes["k_dim"] + sizes["v_dim"]
    sizes["attn_dim"] = sizes["n_head"] * sizes["head_dim"]
    sizes["q_dim"] = 2 * sizes["attn_dim"]  # query and output gate in one projection
    sizes["kv_dim"] = sizes["n_kv"] * sizes["head_dim"]
    sizes["mtp_dim"] = 2 * sizes["n_embd"]  # an embedding and a hidden state side by side
    return sizes


def read_sizes(config: Mapping[str, Any], feed_forward: Mapping[str, str]) -> dict[str, int]:
    """Text config -> the number of every dimension word.

    Args:
        config: the text model's.
        feed_forward: the feed-forward's dimension words -> keys of the config.

    Raises:
        ArchitectureError: keys missing or no sensible integers (all listed), or sizes that llama.cpp cannot run.
    """
    config = dict(config)
    width, n_head = config.get("hidden_size"), config.get("num_attention_heads") or 1
    if "head_dim" not in config and type(width) is int and type(n_head) is int:
        config["head_dim"] = width // max(1, n_head)
    keys = {**FROM_CONFIG, **feed_forward}
    problems = []
    for word, key in keys.items():
        limit = MOST.get(word, LARGEST)
        if type(config.get(key)) is not int or not 1 <= config[key] <= limit:
            expected = f"{config[key]!r}, expected an integer from 1 to {limit}" if key in config else "missing"
            problems.append(f"{key}: {expected}")
    epsilon = config.get("rms_norm_eps", _EPSILON)
    if type(epsilon) not in (int, float) or not LEAST_EPSILON <= epsilon <= 1:  # NaN is not, either
        problems.append(f"rms_norm_eps: {epsilon!r:.80}, expected a number above 0 and at most 1, like {_EPSILON}")
    if problems:
        raise ArchitectureError(f"config.json does not describe a Qwen3.5 text model:\n{listing(problems)}")
    sizes = with_products({word: config[key] for word, key in keys.items()})
    if sizes["head_k_dim"] != sizes["head_v_dim"]:
        problems.append(
            f"linear_key_head_dim {sizes['head_k_dim']} differs from linear_value_head_dim {sizes['head_v_dim']}: "
            "llama.cpp has one size for both"
        )
    if sizes["n_v"] % sizes["n_k"]:
        problems.append(f"linear_num_value_heads {sizes['n_v']} is no multiple of linear_num_key_heads {sizes['n_k']}")
    if sizes["n_head"] % sizes["n_kv"]:
        problems.append(f"num_attention_heads {sizes['n_head']} is no multiple of num_key_value_heads {sizes['n_kv']}")
    if config.get("attention_bias"):
        problems.append("attention_bias is set: no Qwen3.5 model has attention biases and llama.cpp reads none")
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {config['hidden_act']!r}: llama.cpp computes silu")
    if (gate := config.get("output_gate_type")) not in (None, "silu", "swish"):
        problems.append(f"output_gate_type {str(gate)[:40]!r}: llama.cpp computes silu")
    problems += _rope_problems(config, sizes)
    if problems:
        raise ArchitectureError(f"config.json asks for what the runtimes cannot do:\n{listing(problems)}")
    return sizes


def layer_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    """DELTA or ATTENTION for every block: `layer_types` decides, else `full_attention_interval`.

    Raises:
        ArchitectureError: `layer_types` of another length than the blocks, or with another word in it.
    """
    n_layer = config["num_hidden_layers"]
    types = config.get("layer_types")
    if types is None:
        interval = config.get("full_attention_interval", 4)
        if type(interval) is not int or interval < 1:
            raise ArchitectureError(f"config.json full_attention_interval: {interval!r}, expected a positive integer")
        return tuple(DELTA if (i + 1) % interval else ATTENTION for i in range(n_layer))
    words = {"linear_attention": DELTA, "full_attention": ATTENTION}
    if not isinstance(types, list) or len(types) != n_layer or not set(map(str, types)) <= words.keys():
        raise ArchitectureError(
            f"config.json layer_types: expected {n_layer} entries of {' or '.join(words)}, found {str(types)[:120]}"
        )
    return tuple(words[word] for word in types)


# ---------------------------------------------------------------- metadata


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ArchitectureError(f"config.json rope_parameters: {str(rope)[:80]}, expected an object")
    return {**{key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config}, **rope}


_YARN = ("extrapolation_factor", "attention_factor", "attn_factor", "beta_fast", "beta_slow")
"""What YaRN may be told besides its factor; transformers has a default for each."""


def _rope_problems(config: Mapping[str, Any], sizes: Sizes) -> list[str]:
    """What is no rotation: numbers that are none, or out of all proportion."""
    limits = {"rope_theta": LARGEST_THETA, "partial_rotary_factor": 1.0}
    if _rope_kind(config) in ("linear", "yarn"):
        limits |= dict.fromkeys(("factor", *_YARN), _LARGEST_FACTOR)
    rope = _rope(config)
    problems = [
        f"{key}: {rope[key]!r:.80}, expected a number above 0 and at most {limit:g}"
        for key, limit in limits.items()
        if key in rope
        and not (rope[key] is None and key in _YARN)
        and (type(rope[key]) not in (int, float) or not 0 < rope[key] <= limit)  # NaN is not, either
    ]
    if not problems and ((dimensions := _rope_dimensions(config, sizes)) % 2 or dimensions < 2):
        problems.append(f"partial_rotary_factor: turns {dimensions} of {sizes['head_dim']} dimensions: no pairs")
    return problems


def _rope_sections(config: Mapping[str, Any], sizes: Sizes) -> list[int]:
    sections = _rope(config).get("mrope_section", [11, 11, 10])  # transformers' default where the config has none
    if (
        not isinstance(sections, list)
        or not 1 <= len(sections) <= 4
        or any(type(n) is not int or not 0 <= n <= sizes["head_dim"] for n in sections)
    ):
        raise ArchitectureError(
            f"config.json mrope_section: {str(sections)[:80]}, expected up to four integers, none above head_dim"
        )
    return [*sections, 0, 0, 0, 0][:4]


def _rope_kind(config: Mapping[str, Any]) -> str:
    kind = _rope(config).get("rope_type") or _rope(config).get("type") or "default"
    if kind not in ("default", "mrope", "linear", "yarn"):
        raise ArchitectureError(f"config.json rope_type {kind!r}: llama.cpp runs default, linear and yarn")
    return str(kind)


def _rope_scaling(config: Mapping[str, Any], key: str) -> Any:
    return _rope(config).get(key) if _rope_kind(config) in ("linear", "yarn") else None


def _yarn(config: Mapping[str, Any], *keys: str) -> Any:
    """The first of the keys that a YaRN configuration gives, None for any other kind of rotation."""
    if _rope_kind(config) != "yarn":
        return None
    return next((_rope(config)[key] for key in keys if _rope(config).get(key) is not None), None)


def _interval(config: Mapping[str, Any]) -> int:
    """The interval that llama.cpp falls back to: the config's, else the first full-attention block's number."""
    kinds = layer_kinds(config)
    stated = config.get("full_attention_interval")
    if stated is None or stated == 0:
        return kinds.index(ATTENTION) + 1 if ATTENTION in kinds else len(kinds) + 1
    if type(stated) is not int or not 0 < stated < 1 << 32:
        raise ArchitectureError(f"config.json full_attention_interval: {stated!r:.80}, expected a positive integer")
    return stated


def _recurrent_layers(config: Mapping[str, Any], sizes: Sizes) -> list[bool]:
    """Which blocks are Gated DeltaNet; runtimes from before this key go by the interval."""
    return [kind == DELTA for kind in layer_kinds(config)] + [False] * sizes.get("n_mtp", 0)


def _rope_dimensions(config: Mapping[str, Any], sizes: Sizes) -> int:
    return int(sizes["head_dim"] * _rope(config).get("partial_rotary_factor", 0.25))


HYBRID_METADATA = (
    MetadataRule("block_count", "u32", lambda config, sizes: sizes["n_layer"] + sizes.get("n_mtp", 0), needed=True),
    MetadataRule("context_length", "u32", lambda config, sizes: sizes["n_ctx"], needed=True),
    MetadataRule("embedding_length", "u32", lambda config, sizes: sizes["n_embd"], needed=True),
    MetadataRule("feed_forward_length", "u32", lambda config, sizes: config.get("intermediate_size")),
    MetadataRule("attention.head_count", "u32", lambda config, sizes: sizes["n_head"], needed=True),
    MetadataRule("attention.head_count_kv", "u32", lambda config, sizes: sizes["n_kv"], needed=True),
    MetadataRule(
        "rope.scaling.type",
        "str",
        lambda config, sizes: _rope_kind(config) if _rope_scaling(config, "factor") else None,
    ),
    MetadataRule("rope.scaling.factor", "f32", lambda config, sizes: _rope_scaling(config, "factor")),
    MetadataRule(
        "rope.scaling.original_context_length",
        "u32",
        lambda config, sizes: _rope_scaling(config, "original_max_position_embeddings"),
    ),
    MetadataRule("rope.scaling.yarn_ext_factor", "f32", lambda config, sizes: _yarn(config, "extrapolation_factor")),
    MetadataRule(
        "rope.scaling.yarn_attn_factor", "f32", lambda config, sizes: _yarn(config, "attention_factor", "attn_factor")
    ),
    MetadataRule("rope.scaling.yarn_beta_fast", "f32", lambda config, sizes: _yarn(config, "beta_fast")),
    MetadataRule("rope.scaling.yarn_beta_slow", "f32", lambda config, sizes: _yarn(config, "beta_slow")),
    MetadataRule("rope.dimension_sections", "i32[]", _rope_sections),
    MetadataRule("rope.freq_base", "f32", lambda config, sizes: _rope(config).get("rope_theta", 10_000_000.0)),
    MetadataRule("attention.layer_norm_rms_epsilon", "f32", lambda config, sizes: config.get("rms_norm_eps", _EPSILON)),
    MetadataRule("attention.key_length", "u32", lambda config, sizes: sizes["head_dim"], needed=True),
    MetadataRule("attention.value_length", "u32", lambda config, sizes: sizes["head_dim"], needed=True),
    MetadataRule("ssm.conv_kernel", "u32", lambda config, sizes: sizes["n_conv"], needed=True),
    MetadataRule("ssm.state_size", "u32", lambda config, sizes: sizes["head_k_dim"], needed=True),
    MetadataRule("ssm.group_count", "u32", lambda config, sizes: sizes["n_k"], needed=True),
    MetadataRule("ssm.time_step_rank", "u32", lambda config, sizes: sizes["n_v"], needed=True),
    MetadataRule("ssm.inner_size", "u32", lambda config, sizes: sizes["v_dim"], needed=True),
    MetadataRule("attention.recurrent_layers", "bool[]", _recurrent_layers),
    MetadataRule("full_attention_interval", "u32", lambda config, sizes: _interval(config)),
    MetadataRule("rope.dimension_count", "u32", _rope_dimensions, needed=True),
    MetadataRule("nextn_predict_layers", "u32", lambda config, sizes: sizes.get("n_mtp") or None),
)

DROPPED = {
    "model.visual.": "vision tower",
    "visual.": "vision tower",
    "model.language_model.visual.": "vision tower",
    "vision_tower.": "vision tower",
    "model.vision_tower.": "vision tower",
    "mtp.": "multi-token-prediction block",
    "model.mtp.": "multi-token-prediction block",
    "language_model.mtp.": "multi-token-prediction block",
}
"""Checkpoint name prefixes that are left out -> what they are."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?"
PRE_TOKENIZERS = (
    PreTokenizer(
        "qwen35",
        _CONTRACTIONS + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        is_nfc=True,
    ),
    PreTokenizer(
        "qwen2", _CONTRACTIONS + r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", is_nfc=True
    ),
)
"""The family's own, and Qwen2's, which some fine-tunes carry: it splits combining marks from their letters."""

TRIAL_CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "full_attention_interval": 2,
}
"""Both kinds of blocks, and rows of a whole super-block."""

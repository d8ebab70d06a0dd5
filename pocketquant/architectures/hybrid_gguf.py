"""What a GGUF's metadata says of a hybrid text model: sizes, kinds of blocks, and whether a runtime can use it.

Source: `load_arch_hparams` of llama.cpp's src/models/qwen35.cpp, `get_key_or_arr` of src/llama-model-loader.cpp
(as of llama-cpp-python 0.3.36); the default rotary sections are transformers' (models/qwen3_5) and its converter's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pocketquant.architectures.hybrid import LARGEST, LARGEST_THETA, LEAST_EPSILON, MOST, with_products
from pocketquant.architectures.table import ATTENTION, DELTA, Sizes
from pocketquant.errors import ArchitectureError
from pocketquant.model import Value

_SECTIONS = "rope.dimension_sections"
_DEFAULT_SECTIONS = [11, 11, 10, 0]
_IN_GGUF = {
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_kv": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "n_k": "ssm.group_count",
    "n_v": "ssm.time_step_rank",
    "head_k_dim": "ssm.state_size",
    "v_dim": "ssm.inner_size",
    "n_conv": "ssm.conv_kernel",
    "n_ctx": "context_length",
}


def sizes_from_gguf(metadata: Mapping[str, Value], name: str, feed_forward: Mapping[str, str]) -> dict[str, int]:
    """The same sizes from a GGUF's metadata, without `n_vocab` if the file carries no tokens.

    Args:
        metadata: the file's.
        name: the architecture's, which its keys start with.
        feed_forward: the feed-forward's dimension words -> keys.

    Raises:
        ArchitectureError: a key missing or no sensible integer.
    """

    def number(key: str) -> int:
        value = metadata.get(f"{name}.{key}")
        if value is None or type(value.value) is not int or not 1 <= value.value <= LARGEST:
            raise ArchitectureError(f"GGUF metadata {name}.{key}: missing or no sensible integer; the file is broken")
        return value.value

    sizes = {word: number(key) for word, key in {**_IN_GGUF, **feed_forward}.items()}
    if n_mtp := _mtp_blocks(metadata, name, sizes["n_layer"]):
        sizes["n_mtp"] = n_mtp
        sizes["n_layer"] -= n_mtp  # block_count counts them, `n_layer` is the trunk
    sizes["head_v_dim"] = sizes["v_dim"] // sizes["n_v"]
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and tokens.kind == "str[]":
        sizes["n_vocab"] = len(tokens.value)
    return with_products(sizes)


def _mtp_blocks(metadata: Mapping[str, Value], name: str, n_blocks: int) -> int:
    n_mtp = metadata.get(f"{name}.nextn_predict_layers", Value("u32", 0)).value
    if type(n_mtp) is not int or not 0 <= n_mtp < n_blocks:
        raise ArchitectureError(f"GGUF metadata {name}.nextn_predict_layers: {n_mtp!r} of {n_blocks} blocks")
    return n_mtp


def kinds_from_gguf(metadata: Mapping[str, Value], n_trunk: int, name: str) -> tuple[str, ...]:
    """DELTA or ATTENTION for every block of the trunk, as llama.cpp decides it."""
    stated = metadata.get(f"{name}.attention.recurrent_layers")
    if stated is not None and isinstance(stated.value, list) and len(stated.value) >= n_trunk:
        return tuple(DELTA if is_recurrent else ATTENTION for is_recurrent in stated.value[:n_trunk])
    interval = metadata.get(f"{name}.full_attention_interval", Value("u32", 4)).value
    interval = interval if type(interval) is int and interval else 4
    return tuple(DELTA if (layer + 1) % interval else ATTENTION for layer in range(n_trunk))


def complete_sections(metadata: Mapping[str, Value], name: str) -> dict[str, tuple[Value, str]]:
    """Four rotary sections where the file has fewer: missing ones turn nothing; the family's own where all are missing.

    Ollama's files and those of older converters leave some out.
    """
    key = f"{name}.{_SECTIONS}"
    stated = metadata.get(key)
    if stated is None:
        if _number(metadata, name, "rope.dimension_count") != 2 * sum(_DEFAULT_SECTIONS):
            return {}
        sections, note = _DEFAULT_SECTIONS, f"missing; written as {_DEFAULT_SECTIONS}, the family's default"
    elif _are_sections(stated.value) and len(stated.value) < 4:
        sections = [*stated.value, 0, 0, 0][:4]
        note = f"{len(stated.value)} of the four numbers that llama.cpp loads; written as {sections}"
    else:
        return {}
    return {key: (Value("i32[]", sections), note)}


def transformers_config(keys: Mapping[str, Any], sizes: Sizes, kinds: Sequence[str]) -> dict[str, Any]:
    """What transformers' `TextConfig` of these models is made with.

    Args:
        keys: the metadata without the architecture's prefix.
        sizes: of the dimension words.
        kinds: DELTA or ATTENTION for every block.

    Raises:
        ArchitectureError: positions are scaled.
    """
    if "rope.scaling.type" in keys:
        raise ArchitectureError(
            f"positions are scaled by {keys['rope.scaling.type']}, so no gradients are computed; leave out --curvature"
        )
    return {
        "layer_types": ["linear_attention" if kind == DELTA else "full_attention" for kind in kinds],
        "rms_norm_eps": float(keys["attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(keys["rope.freq_base"]),
            "partial_rotary_factor": keys["rope.dimension_count"] / sizes["head_dim"],
            "mrope_interleaved": True,
            "mrope_section": list(keys.get(_SECTIONS, _DEFAULT_SECTIONS))[:3],
        },
    }


def _are_sections(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(n) is int and 0 <= n < 1 << 15 for n in value)


def _number(metadata: Mapping[str, Value], name: str, key: str) -> int | None:
    value = metadata.get(f"{name}.{key}")
    return value.value if value is not None and type(value.value) is int else None


def find_problems(metadata: Mapping[str, Value], name: str) -> Iterator[str]:
    """What no runtime loads, or computes nonsense with, one line each."""

    def number(key: str) -> int:
        return _number(metadata, name, key) or 0

    yield from _find_rope_problems(name, metadata)
    for key, most in (("block_count", MOST["n_layer"]), ("expert_count", MOST["n_expert"])):
        if number(key) > most:
            yield f"{name}.{key}: {number(key)}, llama.cpp has room for {most}"
    if number("expert_used_count") > number("expert_count"):
        yield f"{name}.expert_used_count: {number('expert_used_count')} of {number('expert_count')} experts"
    head_dim, value_dim = number("attention.key_length"), number("attention.value_length")
    if value_dim != head_dim:
        yield f"{name}.attention.value_length: {value_dim or 'missing'}, attention.key_length is {head_dim}"
    if number("attention.head_count") % number("attention.head_count_kv"):
        yield f"{name}.attention.head_count: no multiple of attention.head_count_kv"
    n_k, n_v, dim = (number(f"ssm.{key}") for key in ("group_count", "time_step_rank", "state_size"))
    if n_v % n_k:
        yield f"{name}.ssm.time_step_rank: {n_v}, no multiple of ssm.group_count {n_k}"
    if number("ssm.inner_size") != n_v * dim:
        yield f"{name}.ssm.inner_size: {number('ssm.inner_size')}, expected {n_v} heads of {dim}"
    recurrent = metadata.get(f"{name}.attention.recurrent_layers")
    n_blocks = number("block_count")
    if recurrent is not None and (recurrent.kind != "bool[]" or len(recurrent.value) != n_blocks):
        yield f"{name}.attention.recurrent_layers: expected true or false for each of {n_blocks} blocks"
    interval = metadata.get(f"{name}.full_attention_interval")
    if interval is not None and (type(interval.value) is not int or interval.value < 1):
        yield f"{name}.full_attention_interval: {str(interval.value)[:40]}, expected a positive whole number"


def _find_rope_problems(name: str, metadata: Mapping[str, Value]) -> Iterator[str]:
    sections = metadata.get(f"{name}.{_SECTIONS}")
    if sections is None:
        yield f"{name}.{_SECTIONS}: missing, and rope.dimension_count does not fit the default {_DEFAULT_SECTIONS}"
    elif not _are_sections(sections.value) or len(sections.value) != 4 or not any(sections.value):
        yield f"{name}.{_SECTIONS}: {str(sections.value)[:60]}, expected four whole numbers, not all of them 0"
    turned = _number(metadata, name, "rope.dimension_count")
    head_dim = _number(metadata, name, "attention.key_length") or 0
    if turned is None or turned % 2 or not 2 <= turned <= head_dim:
        found = "missing" if turned is None else turned
        yield f"{name}.rope.dimension_count: {found}, expected an even number up to the {head_dim} of a head"
    reals = {"rope.freq_base": (0.0, LARGEST_THETA), "attention.layer_norm_rms_epsilon": (LEAST_EPSILON, 1.0)}
    for key, (least, most) in reals.items():
        value = metadata.get(f"{name}.{key}")
        if value is None or type(value.value) is not float or not least < value.value <= most:
            found = "missing" if value is None else str(value.value)[:40]
            yield f"{name}.{key}: {found}, expected a number above {least:g} and at most {most:g}"

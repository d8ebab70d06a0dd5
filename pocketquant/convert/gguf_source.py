"""A GGUF as a source: what a checkpoint's config has to fulfil, its metadata has to, too.

`open_gguf` checks names and sizes, as looking at a file needs them. A file that is to be written anew must also load
and compute the right thing: what llama.cpp asks for is there, what it would compute with is within reason. Rotary
sections that are only short, as Ollama and older converters leave them, are made good, with a note.
Source: `load_arch_hparams` of llama.cpp's src/models/qwen35.cpp, `get_key_or_arr` of src/llama-model-loader.cpp
(as of llama-cpp-python 0.3.36); the default sections are transformers' (models/qwen3_5) and its converter's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocketquant.architectures.hybrid import LARGEST_THETA, LEAST_EPSILON, MOST
from pocketquant.errors import ArchitectureError, listing
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.model import Model, Value

_SECTIONS = "rope.dimension_sections"
_DEFAULT_SECTIONS = [11, 11, 10, 0]


def open_gguf_source(path: Path | str) -> Model:
    """Opens a GGUF to make another file of it.

    Raises:
        SourceError, ArchitectureError: as `open_gguf`; and metadata that no runtime could use (all of it listed).
    """
    model = open_gguf(path)
    if f"{model.architecture}.ssm.state_size" not in model.metadata:
        return model  # a vision tower, whose keys `open_gguf` has read
    model = _with_whole_sections(model)
    problems = list(_find_problems(model.architecture, model.metadata))
    if problems:
        raise ArchitectureError(
            f"{path}: metadata that llama.cpp does not load or computes nonsense with; take the checkpoint, or a file "
            f"that `check` finds nothing wrong with:\n{listing(problems)}"
        )
    return model


def _with_whole_sections(model: Model) -> Model:
    """Four sections, where the file has fewer: the missing ones turn nothing; all of them the family's, if they fit."""
    key = f"{model.architecture}.{_SECTIONS}"
    stated = model.metadata.get(key)
    if stated is None:
        turned = _number(model.metadata, model.architecture, "rope.dimension_count")
        if turned != 2 * sum(_DEFAULT_SECTIONS):
            return model
        sections, note = _DEFAULT_SECTIONS, f"missing; written as {_DEFAULT_SECTIONS}, the family's default"
    elif _are_sections(stated.value) and len(stated.value) < 4:
        sections = [*stated.value, 0, 0, 0][:4]
        note = f"{len(stated.value)} of the four numbers that llama.cpp loads; written as {sections}"
    else:
        return model
    metadata = {**model.metadata, key: Value("i32[]", sections)}
    return replace(model, metadata=metadata, notes=(*model.notes, f"{key}: {note}"))


def _are_sections(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(n) is int and 0 <= n < 1 << 15 for n in value)


def _number(metadata: Mapping[str, Value], name: str, key: str) -> int | None:
    value = metadata.get(f"{name}.{key}")
    return value.value if value is not None and type(value.value) is int else None


def _find_problems(name: str, metadata: Mapping[str, Value]) -> Iterator[str]:
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

"""Checks that the keys are there, are sensible, and agree with one another and with the tensors.

Source for what llama.cpp requires: `src/models/qwen35.cpp` `load_arch_hparams`, `src/llama-model.cpp` (b10359).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from pocketquant.check.contents import Contents
from pocketquant.check.findings import ERROR, WARNING, Finding
from pocketquant.formats import FORMATS

_LARGEST = 1 << 24
_MAIN_FORMAT = {number: item.name for item in FORMATS.values() for number in item.main_in}
"""llama.cpp's number for what a file mostly is -> the format."""


def check_metadata(contents: Contents) -> Iterator[Finding]:
    """Keys of a text model of this family; nothing for other architectures."""
    if not contents.is_text:
        return
    yield from _check_numbers(contents)
    yield from _check_blocks(contents)
    yield from _check_heads(contents)
    yield from _check_rope(contents)
    yield from _check_real(contents, "attention.layer_norm_rms_epsilon", 1e-12, 1e-2)
    yield from _check_real(contents, "rope.freq_base", 1.0, 1e12)
    if contents.is_file:
        yield from _check_file_type(contents)


def _error(contents: Contents, code: str, key: str, message: str, advice: str = "") -> Finding:
    again = "convert the checkpoint again; the number is in its config.json"
    return Finding(ERROR, code, f"{contents.architecture}.{key}", message, advice or again)


def _check_numbers(contents: Contents) -> Iterator[Finding]:
    for key in [rule.key for rule in contents.table.metadata if rule.needed] if contents.table else ():
        value = contents.metadata.get(f"{contents.architecture}.{key}")
        if value is None:
            yield _error(contents, "key-missing", key, "missing; the runtimes need it")
        elif type(value.value) is not int or not 1 <= value.value <= _LARGEST:
            text = str(value.value)[:60]
            yield _error(contents, "key-value", key, f"{text}, expected a whole number from 1 to {_LARGEST}")


def _check_blocks(contents: Contents) -> Iterator[Finding]:
    n_blocks, n_mtp = contents.number("block_count"), contents.n_mtp
    if n_blocks is None:
        return
    present = {int(name.split(".")[1]) for name in contents.entries if name.startswith("blk.") and _is_block(name)}
    if present and max(present) >= n_blocks:
        message = f"{n_blocks}, but there are tensors of blk.{max(present)}"
        yield _error(contents, "block-count", "block_count", message)
    elif present and max(present) + 1 < n_blocks - n_mtp:
        message = f"{n_blocks}, but the last block with tensors is blk.{max(present)}"
        yield _error(contents, "block-count", "block_count", message)
    announced = contents.metadata.get(f"{contents.architecture}.nextn_predict_layers")
    if announced is not None and (type(announced.value) is not int or not 0 <= announced.value < n_blocks):
        yield _error(contents, "key-value", "nextn_predict_layers", f"{str(announced.value)[:40]} of {n_blocks} blocks")
    stated = contents.metadata.get(f"{contents.architecture}.attention.recurrent_layers")
    if stated is not None and isinstance(stated.value, list) and len(stated.value) != n_blocks:
        message = f"{len(stated.value)} entries for {n_blocks} blocks"
        yield _error(contents, "key-value", "attention.recurrent_layers", message)


def _is_block(name: str) -> bool:
    return name.split(".")[1].isdecimal() and len(name.split(".")[1]) < 6


def _check_heads(contents: Contents) -> Iterator[Finding]:
    number = contents.number
    n_head, n_kv = number("attention.head_count"), number("attention.head_count_kv")
    if n_head and n_kv and n_head % n_kv:
        yield _error(contents, "heads", "attention.head_count_kv", f"{n_head} query heads for {n_kv} key/value heads")
    n_k, n_v = number("ssm.group_count"), number("ssm.time_step_rank")
    if n_k and n_v and n_v % n_k:
        yield _error(contents, "heads", "ssm.group_count", f"{n_v} value heads for {n_k} key heads")
    dim, inner = number("ssm.state_size"), number("ssm.inner_size")
    if n_v and dim and inner and n_v * dim != inner:
        message = f"{inner}, but ssm.time_step_rank {n_v} x ssm.state_size {dim} is {n_v * dim}"
        yield _error(contents, "heads", "ssm.inner_size", message)
    key, value = number("attention.key_length"), number("attention.value_length")
    if key and value and key != value:
        yield _error(contents, "heads", "attention.value_length", f"{value}, but attention.key_length is {key}")


def _check_rope(contents: Contents) -> Iterator[Finding]:
    key = "rope.dimension_sections"
    if contents.table is None or not contents.table.has_key(key):
        return
    value = contents.metadata.get(f"{contents.architecture}.{key}")
    if value is None:
        yield _error(contents, "key-missing", key, "missing; llama.cpp does not load the file without it")
        return
    sections: Any = value.value
    if not isinstance(sections, list) or len(sections) != 4 or any(type(n) is not int or n < 0 for n in sections):
        message = f"{str(sections)[:60]}, expected four whole numbers"
        yield _error(contents, "rope-sections", key, message, "pad config.json's mrope_section with zeros to four")
        return
    n_rotated, head_dim = contents.number("rope.dimension_count"), contents.number("attention.key_length")
    if n_rotated and sum(sections) != n_rotated // 2:
        message = (
            f"{sections} is {sum(sections)} pairs in all, but rope.dimension_count {n_rotated} has {n_rotated // 2}"
        )
        yield _error(contents, "rope-sections", key, message)
    if n_rotated and head_dim and n_rotated > head_dim:
        message = f"{n_rotated} of heads of {head_dim}"
        yield _error(contents, "key-value", "rope.dimension_count", message)


def _check_real(contents: Contents, key: str, least: float, most: float) -> Iterator[Finding]:
    if contents.table is None or not contents.table.has_key(key):
        return
    value = contents.metadata.get(f"{contents.architecture}.{key}")
    if value is None:
        yield _error(contents, "key-missing", key, "missing; the runtimes need it")
    elif type(value.value) is not float or not least <= value.value <= most:
        yield _error(contents, "key-value", key, f"{str(value.value)[:40]}, expected {least:g} to {most:g}")


def _check_file_type(contents: Contents) -> Iterator[Finding]:
    stated = contents.metadata.get("general.file_type")
    expected = _MAIN_FORMAT.get(stated.value) if stated is not None and type(stated.value) is int else None
    weights: Counter[str] = Counter()
    for entry in contents.entries.values():
        if len(entry.shape) > 1:
            weights[entry.format] += entry.n_rows * entry.n_cols
    is_sidecar = contents.n_mtp > 0 and not any(name.startswith("blk.0.") for name in contents.entries)
    if expected is None or not weights or is_sidecar:  # a sidecar has the model's type, and its block Q5_K or better
        return
    main, count = weights.most_common(1)[0]
    if weights[expected] * 4 < count:
        share = 100 * weights[expected] / weights.total()
        yield Finding(
            WARNING,
            "file-type",
            "general.file_type",
            f"says {expected}, which holds {share:.0f} % of the weights; most of them are {main}",
            "the name promises another size than the file has; look at the recipe that made it",
        )

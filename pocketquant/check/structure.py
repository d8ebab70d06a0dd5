"""Compares which tensors a file has, in which shapes and types, with the architecture's table.

Source for what a runtime needs: llama.cpp (b10359) `src/models/qwen35.cpp`, `src/llama-model-loader.cpp` (it refuses a
file with a tensor missing and one with a tensor that it does not ask for).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from pocketquant.architectures import gguf_names
from pocketquant.architectures.foreign import foreign_layout
from pocketquant.architectures.qwen35_mtp import MTP_LEAST
from pocketquant.architectures.table import Architecture, TensorRule, target_shape_of
from pocketquant.check.contents import Contents
from pocketquant.check.findings import ERROR, WARNING, Finding
from pocketquant.errors import ArchitectureError
from pocketquant.formats import FORMATS
from pocketquant.model import Role

_NEXTN_SHAPES = {"eh_proj": "n_embd 2n_embd", "enorm": "n_embd", "hnorm": "n_embd"}
_NEXTN_OPTIONAL = {
    "shared_head_norm": "n_embd",
    "embed_tokens": "n_vocab n_embd",
    "shared_head_head": "n_vocab n_embd",
}
_LEFTOVER = re.compile(
    r"SCB|absmax|quant_map|nested_|bitsandbytes|qweight|qzeros|g_idx|weight_scale|weight_packed|lora_[ab]|scale_inv"
)
_CONVERT_AGAIN = "convert the checkpoint again with a tool that knows this architecture"


def block_kinds(contents: Contents) -> tuple[str, ...]:
    """What kind each block of the trunk, or of a vision tower, is."""
    if contents.table is None:
        return ()
    n_blocks = contents.n_blocks - contents.n_mtp if contents.is_text else contents.number("vision.block_count") or 0
    return gguf_names.block_kinds(contents.table, contents.metadata, n_blocks)


def rules_by_name(contents: Contents, table: Architecture) -> dict[str, TensorRule]:
    """Name in GGUF -> its rule, for every tensor that the trunk and the MTP blocks should have, the head included."""
    return gguf_names.rules_by_name(table, block_kinds(contents), contents.n_mtp)


def check_structure(contents: Contents) -> Iterator[Finding]:
    """Tensors missing and unknown, wrong shapes, wrong types, MTP blocks."""
    table = contents.table
    if table is None:
        return
    if contents.is_text and (layout := foreign_layout(contents.architecture, contents.metadata, contents.entries)):
        yield Finding(ERROR, "layout", "", layout, "")
    rules = rules_by_name(contents, table)
    if not contents.is_text and not any(name.startswith("v.") for name in contents.entries):
        return  # said by `check_vision`
    n_trunk = len(block_kinds(contents))
    n_mtp = contents.n_mtp
    yield from _check_mtp(contents, n_trunk, n_mtp)
    for name, _ in gguf_names.missing_names(rules, contents.entries, n_trunk, n_mtp):
        layer = _layer_of(name)
        if layer is not None and layer >= n_trunk and not _has_block(contents, layer):
            continue  # said once, by `mtp-absent`
        yield Finding(ERROR, "tensor-missing", name, f"missing; {table.name} needs it", _CONVERT_AGAIN)
    yield from _check_unknown(contents, table, rules, n_trunk, n_mtp)
    yield from _check_shapes(contents, table, rules)
    yield from _check_types(contents, rules)


def _check_mtp(contents: Contents, n_trunk: int, n_mtp: int) -> Iterator[Finding]:
    key = f"{contents.architecture}.nextn_predict_layers"
    declared = range(n_trunk, n_trunk + n_mtp)
    found = {layer for name in contents.entries if ".nextn." in name and (layer := _layer_of(name)) is not None}
    absent = [layer for layer in declared if not _has_block(contents, layer)]
    if absent:
        yield Finding(
            ERROR,
            "mtp-absent",
            key,
            f"announces {n_mtp} multi-token-prediction block(s), but blk.{absent[0]} has no tensors; no runtime loads "
            f"this (it misses blk.{absent[0]}.attn_norm.weight)",
            "the MTP tensors were dropped when the checkpoint was saved; convert it with pocketquant, which counts the "
            "tensors and not the config, or take the key out and lower block_count",
        )
    undeclared = sorted(found - set(declared))
    if undeclared:
        yield Finding(
            ERROR,
            "mtp-undeclared",
            key,
            f"blk.{undeclared[0]}.nextn.* is there, but the key says {n_mtp} block(s)",
            "write nextn_predict_layers and a block_count that includes the block, or leave the tensors out",
        )
    present = sorted(found & set(declared))
    if present and _has_block(contents, 0):
        yield Finding(
            WARNING,
            "mtp-inside",
            key,
            "the file carries multi-token prediction; runtimes from before it cannot load it",
            "ship the trunk alone and the MTP block as an mtp- file beside it",
        )
    coarse = [
        name
        for name, entry in contents.entries.items()
        if _layer_of(name) in present and FORMATS[entry.format].bits_per_weight < FORMATS[MTP_LEAST].bits_per_weight
    ]
    for name in coarse:
        message = f"{contents.entries[name].format} in the multi-token-prediction block, which llama-imatrix leaves out"
        yield Finding(WARNING, "mtp-coarse", name, message, f"keep the MTP block at {MTP_LEAST} or better")


def _check_unknown(
    contents: Contents, table: Architecture, rules: Mapping[str, TensorRule], n_trunk: int, n_mtp: int
) -> Iterator[Finding]:
    for name, entry in contents.entries.items():
        layer, match = _layer_of(name), re.fullmatch(r"blk\.\d+\.nextn\.(\w+)\.weight", name)
        if name in rules or (match and match[1] in _NEXTN_SHAPES | _NEXTN_OPTIONAL):
            continue
        what = f"{entry.format} {list(entry.shape)}: no {table.name} model has this tensor"
        advice = _CONVERT_AGAIN
        if _LEFTOVER.search(name):
            what += "; it is a leftover of a quantized or adapted checkpoint"
            advice = "convert the full-precision, merged checkpoint"
        elif layer is not None and layer >= n_trunk + n_mtp:
            what += f" beyond block_count {n_trunk + n_mtp}"
        elif contents.is_text and name.startswith(("v.", "mm.")):
            what += "; it belongs into an mmproj file"
        yield Finding(ERROR, "tensor-unknown", name, what, advice)


def _check_shapes(contents: Contents, table: Architecture, rules: Mapping[str, TensorRule]) -> Iterator[Finding]:
    try:
        sizes = dict(table.sizes_from_gguf(contents.metadata))
    except (ArchitectureError, ZeroDivisionError, TypeError):
        return  # the keys are missing or nonsense, which `check_metadata` says
    embedding = contents.entries.get("token_embd.weight")
    if embedding is not None:
        sizes["n_vocab"] = embedding.n_rows  # whether the tokens are as many is the tokenizer's check
    sizes["2n_embd"] = sizes["mtp_dim"] = 2 * sizes["n_embd"]
    expected = {
        name: target_shape_of(_of_one_frame(rule), sizes)
        for name, rule in rules.items()
        if name in contents.entries
        and all(word.removeprefix("2*") in sizes or word.isdigit() for word in rule.shape.split())
    }
    for name in contents.entries:
        match = re.fullmatch(r"blk\.\d+\.nextn\.(\w+)\.weight", name)
        words = (_NEXTN_SHAPES | _NEXTN_OPTIONAL).get(match[1], "") if match else ""
        if words and all(word in sizes for word in words.split()):
            expected[name] = tuple(sizes[word] for word in words.split())
    for name, shape in expected.items():
        found = contents.entries[name].shape
        if found == shape:
            continue
        hint, advice = "", _CONVERT_AGAIN
        if found == shape[::-1]:
            hint = ": transposed"
        if rules.get(name) and rules[name].role is Role.DELTA_CONV and found[-1] != shape[-1]:
            advice = "the checkpoint was saved by MLX, with conv1d transposed and norms that hold + 1 already; "
            advice += "convert it with a tool that knows that layout"
        yield Finding(ERROR, "shape", name, f"{list(found)}, the metadata implies {list(shape)}{hint}", advice)


def _of_one_frame(rule: TensorRule) -> TensorRule:
    """A kernel over two frames is two kernels in GGUF, of the same shape without the frames."""
    words = rule.shape.split()
    return replace(rule, shape=" ".join(word for word in words if word != "n_frame")) if "n_frame" in words else rule


def _check_types(contents: Contents, rules: Mapping[str, TensorRule]) -> Iterator[Finding]:
    for name, entry in contents.entries.items() if contents.is_file else ():
        rule = rules.get(name)
        if rule is None or not rule.keep_f32 or entry.format == "F32":
            continue
        severity = WARNING if rule.role in (Role.ROUTER, Role.SHARED_ROUTER) else ERROR
        message = f"stored as {entry.format}; runtimes expect F32 here"
        yield Finding(severity, "type", name, message, _CONVERT_AGAIN)


def is_mtp(contents: Contents, name: str) -> bool:
    """Whether a tensor belongs to a block behind the trunk."""
    layer = _layer_of(name)
    return layer is not None and layer >= len(block_kinds(contents))


def _has_block(contents: Contents, layer: int) -> bool:
    return any(name.startswith(f"blk.{layer}.") for name in contents.entries)


def _layer_of(name: str) -> int | None:
    match = re.match(r"blk\.(\d{1,5})\.", name)
    return int(match[1]) if match else None

"""Checks a vision tower's file (`mmproj`): whether it holds a tower at all, and what llama.cpp needs to load it.

Source for names and keys: llama.cpp (b10359) `tools/mtmd/clip-impl.h`, `clip.cpp`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pocketquant.check.contents import Contents
from pocketquant.check.findings import ERROR, Finding
from pocketquant.model import Value

ARCHITECTURE = "clip"
_NEEDED = (
    "v.patch_embd.weight",
    "v.patch_embd.weight.1",
    "v.position_embd.weight",
    "v.post_ln.weight",
    "mm.0.weight",
    "mm.2.weight",
)
_NUMBERS = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "patch_size")


def check_vision(contents: Contents, notes: list[str]) -> Iterator[Finding]:
    """Finds a file without a tower, keys that are missing or wrong, blocks that contradict `block_count`, and missing
    tensors that belong to no block.
    """
    if contents.architecture != ARCHITECTURE:
        return
    advice = (
        "convert the vision tower again; a tool that does not know its prefix (model.language_model.visual.) finds no "
        "tensors and does not say so"
    )
    if not any(name.startswith("v.") for name in contents.entries):
        message = f"no tensor of a vision tower among {len(contents.entries)}"
        yield Finding(ERROR, "mmproj-empty", "", message, advice)
        return
    for key in _NUMBERS:
        value = contents.metadata.get(f"clip.vision.{key}")
        if value is None or type(value.value) is not int or value.value < 1:
            yield Finding(ERROR, "key-missing", f"clip.vision.{key}", "missing or no positive number", advice)
    for key in ("image_mean", "image_std"):
        value = contents.metadata.get(f"clip.vision.{key}", Value("f32[]", []))
        if not isinstance(value.value, list) or len(value.value) != 3:
            message = f"{str(value.value)[:60]}, expected three numbers"
            yield Finding(ERROR, "key-value", f"clip.vision.{key}", message, "take it from preprocessor_config.json")
    names = ("clip.projector_type", "clip.vision.projector_type")
    projector = next((contents.metadata[name].value for name in names if name in contents.metadata), None)
    if projector != "qwen3vl_merger":
        notes.append(f"projector {projector!r}: only qwen3vl_merger is known here, so its tensors are not checked")
        return
    blocks = {int(match[1]) for name in contents.entries if (match := re.match(r"v\.blk\.(\d{1,4})\.", name))}
    n_blocks = contents.metadata.get("clip.vision.block_count", Value("u32", 0)).value
    if type(n_blocks) is int and blocks != set(range(min(n_blocks, 4096))):
        message = f"{n_blocks}, but the file has tensors of {len(blocks)} blocks"
        yield Finding(ERROR, "block-count", "clip.vision.block_count", message, advice)
    if contents.table is not None:
        return  # `check_structure` knows every tensor
    for name in _NEEDED:
        if name not in contents.entries:
            yield Finding(ERROR, "tensor-missing", name, "missing; the runtime does not load the file", advice)
    notes.append("the shapes of the vision tower are not checked")

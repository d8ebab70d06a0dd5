"""Multi-token prediction (MTP): whether a checkpoint really holds the block, and which of its tensors a file needs.

The tensors decide. Fine-tunes keep `mtp_num_hidden_layers: 1` in config.json long after the block was dropped on save,
and a file that announces a block it does not hold is one that no runtime loads.

A runtime that drafts tokens takes the block from the model's own file (`embed`) or from one beside it (`sidecar`),
which repeats the embedding, the last norm and the head: they are what the block reads and predicts through.
Sources: llama.cpp `conversion/qwen.py` (--mtp, --no-mtp), `src/models/qwen35.cpp` (load_arch_tensors), b10359.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pocketquant.convert.mapping import MtpBlock
from pocketquant.convert.safetensors import CheckpointTensor
from pocketquant.errors import ArchitectureError, SourceError

MtpMode = Literal["sidecar", "embed", "drop"]
"""Where the block goes: into a file of its own, into the model's, or nowhere."""

MTP_PREFIXES = ("mtp.", "model.mtp.", "language_model.mtp.")
_BLOCK = re.compile(r"layers\.(\d+)\.")
_IN_TRUNK = re.compile(r"(?:.*\.)?layers\.\d+\.")


def find_mtp(stored: Mapping[str, CheckpointTensor], n_layer: int) -> MtpBlock | None:
    """The block that a checkpoint holds, None if it holds none.

    Args:
        stored: the checkpoint's tensors by name.
        n_layer: blocks of the trunk; the MTP block gets the next number.

    Raises:
        ArchitectureError: tensors under two prefixes, or more blocks than the one that runtimes can use.
    """
    prefixes = [prefix for prefix in MTP_PREFIXES if any(name.startswith(prefix) for name in stored)]
    if not prefixes:
        return None
    if len(prefixes) > 1:
        raise ArchitectureError(f"the checkpoint holds multi-token-prediction blocks under two prefixes: {prefixes}")
    behind = [name.removeprefix(prefixes[0]) for name in stored if name.startswith(prefixes[0])]
    numbers = sorted({int(match[1]) for name in behind if (match := _BLOCK.match(name))})
    if numbers and numbers != [0]:
        raise ArchitectureError(
            f"the checkpoint holds multi-token-prediction blocks {numbers}, and llama.cpp runs block 0 alone; leave "
            "them out (drop)"
        )
    return MtpBlock(prefixes[0], n_layer)


def note_mtp(block: MtpBlock | None, text_config: Mapping[str, Any], mode: MtpMode, notes: list[str]) -> None:
    """Says where config.json announces a block that is not there: the tensors decide."""
    if block is None and mode != "drop" and text_config.get("mtp_num_hidden_layers"):
        notes.append(
            "config.json announces a multi-token-prediction block, but the checkpoint has no tensors of one: a model "
            "without it"
        )


def check_mode(mode: str) -> None:
    """Refuses what is no `MtpMode`."""
    if mode not in get_args(MtpMode):
        raise SourceError(f"mtp {mode!r}: expected one of {', '.join(get_args(MtpMode))}")


def without_trunk(stored: Mapping[str, CheckpointTensor], block: MtpBlock) -> dict[str, CheckpointTensor]:
    """The tensors that a sidecar is made of, and others outside the trunk's blocks, which mapping leaves out."""
    return {
        name: tensor for name, tensor in stored.items() if name.startswith(block.prefix) or not _IN_TRUNK.match(name)
    }


def sidecar_path(model_file: Path) -> Path:
    """Where the sidecar of a model's file belongs: beside it, `mtp-` before the name."""
    return model_file.with_name(f"mtp-{model_file.name}")


__all__ = ["MTP_PREFIXES", "MtpBlock", "MtpMode", "check_mode", "find_mtp", "note_mtp", "sidecar_path", "without_trunk"]

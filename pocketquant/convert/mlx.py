"""Checkpoints that MLX programs have saved: told by their layout, read for what they are.

mlx-lm keeps DeltaNet's convolution as [channels, taps, 1], the original as [channels, 1, taps]: that is the sign. When
it turned the kernels round it also added 1 to the norms, so a table that adds 1 must not do it again. The sum was
rounded to the checkpoint's own type, which is all that such a file still knows of a norm. Experts lie in three tensors
for each block, `switch_mlp.{gate,up,down}_proj`.

Source: mlx-lm 0.32.2, `mlx_lm/models/qwen3_5.py` and `qwen3_5_moe.py` (sanitize), `mlx_lm/utils.py` (save_config).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocketquant.architectures.hybrid import plus_one
from pocketquant.architectures.table import Architecture, Sizes, TensorRule, shape_of
from pocketquant.convert.mtp import MTP_PREFIXES
from pocketquant.convert.safetensors import CheckpointTensor, StoredTensor
from pocketquant.errors import ArchitectureError, SourceError, listing
from pocketquant.model import Role


def refuse_mlx_quantized(config: Mapping[str, Any], stored: Mapping[str, CheckpointTensor], folder: Path) -> None:
    """Refuses a checkpoint that MLX has quantized, whether config.json or only the tensors say so.

    Raises:
        SourceError: naming the bits and groups if config.json does, and the tensors.
    """
    settings = config.get("quantization") or config.get("quantization_config")
    stated = isinstance(settings, dict) and {"group_size", "bits"} <= settings.keys() and "quant_method" not in settings
    modules = [name.removesuffix(".scales") for name in stored if name.endswith(".scales")]
    packed = [
        module for module in modules if f"{module}.weight" in stored and stored[f"{module}.weight"].dtype == "U32"
    ]
    if not stated and not packed:
        return
    kind = f"{settings['bits']} bits, groups of {settings['group_size']}" if stated and settings else "packed weights"
    tensors = f":\n{listing(f'{module}.weight, .scales' for module in packed)}" if packed else ""
    raise SourceError(
        f"{folder}: quantized by MLX ({kind}), and rounding twice loses quality; convert the BF16 checkpoint it was "
        f"made from{tensors}"
    )


def undo_mlx_layout(
    architecture: Architecture,
    sizes: Sizes,
    stored: Mapping[str, CheckpointTensor],
    notes: list[str],
    *,
    with_mtp: bool,
) -> tuple[Architecture, dict[str, CheckpointTensor]]:
    """The table and the tensors to map, if need be changed to what an MLX program has saved.

    Args:
        architecture: the table for original checkpoints.
        sizes: numbers for the dimension words.
        stored: the checkpoint's tensors by name.
        notes: what was recognised is added here.
        with_mtp: a multi-token-prediction block is not to be left out.

    Returns:
        The same for an original checkpoint. For an MLX one a table without + 1, and kernels as [channels, 1, taps].

    Raises:
        ArchitectureError: only some of the kernels are transposed; or there is an MTP block, whose norms are unknown.
    """
    kernels = next((rule for rule in architecture.tensors if rule.role is Role.DELTA_CONV), None)
    if kernels is None:  # an MLX program leaves no trace in a model without convolutions
        return architecture, dict(stored)
    channels, _, taps = shape_of(kernels, sizes)
    found = {name: tensor for name, tensor in stored.items() if name.endswith(kernels.source)}
    turned = {name for name, tensor in found.items() if tensor.shape == (channels, taps, 1) and taps > 1}
    if not turned:
        return architecture, dict(stored)
    original = [f"{name} {list(tensor.shape)}" for name, tensor in found.items() if name not in turned]
    if original:
        raise ArchitectureError(
            f"this looks like a checkpoint saved by MLX, but only {len(turned)} of its {len(found)} convolution "
            f"kernels are transposed, so nobody can tell whether its norms hold + 1 already; get the original. As in "
            f"the original are:\n{listing(original)}"
        )
    mtp = [name for name in stored if name.startswith(MTP_PREFIXES)]
    if mtp and with_mtp:
        raise ArchitectureError(
            "a checkpoint saved by MLX that holds a multi-token-prediction block: mlx-lm leaves such blocks out, "
            f"so nobody can tell whether its norms hold + 1; get the original, or leave the block out (drop):\n"
            f"{listing(mtp)}"
        )
    notes.append(
        f"saved by MLX (all {len(turned)} convolution kernels are transposed): kernels turned back, nothing added to "
        "the norms, which hold + 1 already"
    )
    rules = tuple(_as_saved(rule) for rule in architecture.tensors)
    tensors = {
        name: _turned_back(tensor, (channels, 1, taps)) if name in turned else tensor for name, tensor in stored.items()
    }
    return replace(architecture, tensors=rules), tensors


def _as_saved(rule: TensorRule) -> TensorRule:
    """The rule for what mlx-lm has made of the tensor."""
    if rule.one_by_one is not None:
        shape, matrix = rule.shape.replace("2*", ""), rule.one_by_one.rpartition("*.")[2]
        return replace(rule, source=f"mlp.switch_mlp.{matrix}", shape=shape, half=None, one_by_one=None)
    return replace(rule, each=None) if rule.each is plus_one else rule


def _turned_back(tensor: CheckpointTensor, shape: tuple[int, ...]) -> CheckpointTensor:
    """A dimension of one has no place in memory, so the same bytes are a tensor of the other shape."""
    if not isinstance(tensor, StoredTensor):
        raise ArchitectureError(f"{tensor.name}: quantized and transposed; no program is known to save that")
    return replace(tensor, shape=shape)

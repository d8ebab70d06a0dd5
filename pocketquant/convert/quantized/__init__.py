"""Checkpoints that are already quantized: their tensors, dequantized while they are read.

    settings       what config.json says that tensors cannot; refusals by name
    scaled         FP8 and INT8 times a grid of scales
    fp4            NVFP4, MXFP4
    packed_int     compressed-tensors' packed integers
    transposed     GPTQ, AWQ
    bitsandbytes   NF4, FP4, LLM.int8()
    tensor         the tensor object they all make
    numbers        small number formats, bit fields

Every scheme computes what its own library computes, bit for bit, in the type that library gives its result in; each
module says which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pocketquant.convert.quantized.bitsandbytes import eight_bit_tensor, four_bit_tensor
from pocketquant.convert.quantized.fp4 import blocked_fp4_tensor, packed_fp4_tensor
from pocketquant.convert.quantized.packed_int import packed_int_tensor
from pocketquant.convert.quantized.scaled import CODES, scaled_tensor
from pocketquant.convert.quantized.settings import ADVICE, Settings, read_settings
from pocketquant.convert.quantized.tensor import DequantizedTensor, Reads
from pocketquant.convert.quantized.transposed import transposed_tensor
from pocketquant.convert.safetensors import CheckpointTensor, StoredTensor
from pocketquant.errors import SourceError, listing

_FOR_ACTIVATIONS = (
    "activation_scale",
    "input_global_scale",
    "input_scale",
    "input_scale_ub",
    "input_zero_point",
    "k_scale",
    "output_scale",
    "q_scale",
    "v_scale",
)
_Found = tuple[DequantizedTensor, set[str]]


def dequantize_table(
    stored: Mapping[str, StoredTensor], config: Mapping[str, Any], folder: Path, notes: list[str]
) -> dict[str, CheckpointTensor]:
    """The checkpoint's tensors with each quantized group (codes, scales, zeros) replaced by one readable tensor.

    Reads no weights, only the few numbers that say a shape.

    Args:
        stored: the checkpoint's tensors by name.
        config: config.json.
        folder: where it lies, for errors and for the settings files beside config.json.
        notes: that the source is a lossy reference, and what was left out, is added here.

    Raises:
        SourceError: a scheme that is not supported, by name; groups with parts missing or not fitting (all listed).
    """
    settings = read_settings(config, folder)
    reads = Reads()
    table: dict[str, CheckpointTensor] = {}
    consumed: set[str] = set()
    schemes: Counter[str] = Counter()
    problems = []
    for name, tensor in stored.items():
        find = _finder(name, tensor, stored, settings, reads)
        if find is None:
            table.setdefault(name, tensor)
            continue
        try:
            _check_promised(name, stored, settings.promised)
            found, names = find()
        except SourceError as error:
            problems.append(f"{name}: {error}")
            continue
        if found.name != name and found.name in stored:
            problems.append(f"{name}: there is a {found.name} too; which one counts cannot be told")
        table[found.name] = found
        consumed |= names - {found.name}
        schemes[found.scheme] += 1
    if problems:
        raise SourceError(f"{folder}: quantized tensors that cannot be read; {ADVICE}:\n{listing(problems)}")
    table = {name: tensor for name, tensor in table.items() if name not in consumed}
    if settings.method or schemes:
        aside = {name for name in table if name.rpartition(".")[-1] in _FOR_ACTIVATIONS}
        table = {name: tensor for name, tensor in table.items() if name not in aside}
        if aside:
            notes.append(f"{len(aside)} scales of activations and of the KV cache: left out")
    if schemes:
        kinds = ", ".join(f"{count} tensors {scheme}" for scheme, count in sorted(schemes.items()))
        notes.append(
            f"a lossy reference: the source was already quantized ({kinds}); errors are measured from there, not from "
            "the model it was made from"
        )
    elif settings.method:
        notes.append(f"config.json says {settings.method}, but no tensor is quantized")
    return table


def _finder(
    name: str, tensor: StoredTensor, stored: Mapping[str, StoredTensor], settings: Settings, reads: Reads
) -> Callable[[], _Found] | None:
    """What makes the tensor whose codes this is; None if it holds no codes."""
    if name.endswith(".qweight"):
        return lambda: _transposed(name, stored, settings, reads)
    if name.endswith("_packed"):
        if tensor.dtype == "I32":
            return lambda: packed_int_tensor(name, stored, reads)
        return (lambda: packed_fp4_tensor(name, stored, reads)) if tensor.dtype == "U8" else None
    if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in stored:
        return lambda: blocked_fp4_tensor(name, stored, reads)
    if tensor.dtype == "U8" and any(other in stored for other in (f"{name}.absmax", f"{name}.quant_map")):
        return lambda: four_bit_tensor(name, stored, reads)
    if tensor.dtype == "U8" and f"{name}_scale" in stored:
        return lambda: packed_fp4_tensor(name, stored, reads)
    if tensor.dtype == "I8" and f"{name.removesuffix('.weight')}.SCB" in stored:
        return lambda: eight_bit_tensor(name, stored, reads)
    if tensor.dtype in CODES and any(f"{name}{suffix}" in stored for suffix in ("_scale", "_scale_inv")):
        return lambda: scaled_tensor(name, stored, settings.blocks, reads)
    return None


def _check_promised(name: str, stored: Mapping[str, StoredTensor], promised: tuple[str, ...]) -> None:
    """SourceError if config.json announces a part that the module of these codes has not."""
    stem = next((name.removesuffix(end) for end in ("qweight", "packed") if name.endswith(end)), "")
    wanted = [f"{stem}{word}" for word in promised] if stem else []
    if stored[name].dtype == "I8" and "zero_point" in promised:
        wanted = [f"{name}_zero_point"]
    missing = [part for part in wanted if part not in stored]
    if missing:
        raise SourceError(f"config.json announces {', '.join(missing)}, which the checkpoint has not")


def _transposed(name: str, stored: Mapping[str, StoredTensor], settings: Settings, reads: Reads) -> _Found:
    if settings.method not in ("gptq", "awq"):
        raise SourceError("GPTQ or AWQ, but config.json does not say which (quantization_config, quant_method)")
    module = name.removesuffix(".qweight")
    if f"{module}.pre_quant_scale" in stored:
        raise SourceError(f"{module}.pre_quant_scale: inputs are scaled, which no GGUF can say")
    is_awq = settings.method == "awq"
    zero_offset = 1 if settings.variants == ("gptq",) else 0
    return transposed_tensor(name, stored, is_awq=is_awq, zero_offset=zero_offset, reads=reads)


__all__ = ["DequantizedTensor", "dequantize_table"]

"""What a checkpoint says about its quantization, read for what its tensors cannot say, and refused by name.

Which modules are quantized is decided by the tensors; the lists in config.json are not read. The file says which
convention GPTQ's zeros follow, which packing AWQ has, and how large a block of scales is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketquant.errors import SourceError, listing
from pocketquant.files.json_kinds import FLAG, TEXT, WHOLE, Each, Fields, refuse_other_kinds
from pocketquant.files.small import is_present, read_object

METHODS = ("awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "modelopt", "mxfp4", "mxfp8")
_FORMATS = {
    "compressed-tensors": (
        "dense",
        "float-quantized",
        "int-quantized",
        "mixed-precision",
        "mxfp4-pack-quantized",
        "mxfp8-quantized",
        "naive-quantized",
        "nvfp4-pack-quantized",
        "pack-quantized",
    ),
    "gptq": ("gptq", "gptq_v2"),
    "awq": ("gemm",),
    "modelopt": ("FP8", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"),
}
_KINDS = Fields(
    {
        **dict.fromkeys(("quant_method", "quant_algo", "packing_format", "checkpoint_format", "format"), TEXT),
        **dict.fromkeys(("desc_act", "zero_point", "is_marlin_format"), FLAG),
        "weight_block_size": Each(WHOLE),
    }
)
_AUTO_ROUND = {"auto_round:auto_gptq": ("gptq", "gptq"), "auto_round:auto_awq": ("awq", "gemm")}
ADVICE = "convert the BF16, F16 or F32 checkpoint it was made from, or one that its own library has dequantized"


@dataclass(frozen=True)
class Settings:
    """What is needed beyond the tensors.

    Attributes:
        method: one of `METHODS`; "" if the checkpoint says nothing.
        variants: the formats named, in lower case.
        blocks: [rows, cols] of weights that share a scale, where the checkpoint names them.
        promised: parts that every quantized module must have beside its codes and scales: g_idx, qzeros, zero_point.
            Without one the numbers would be read, and be wrong.
    """

    method: str = ""
    variants: tuple[str, ...] = ()
    blocks: tuple[tuple[int, int], ...] = ()
    promised: tuple[str, ...] = ()


def read_settings(config: Mapping[str, Any], folder: Path) -> Settings:
    """Settings of config.json, hf_quant_config.json (ModelOpt) or quantize_config.json (AutoGPTQ).

    Raises:
        SourceError: a method or format that is not supported, by name.
    """
    found, where = _find(config, folder)
    if found is None:
        return Settings()
    if not isinstance(found, dict):
        raise SourceError(f"{where}: the quantization settings are no JSON object")
    refuse_other_kinds(found, _KINDS, where, SourceError)
    method = str(found.get("quant_method") or _guessed_method(found)).lower()
    variants = _variants(method, found)
    if method == "auto-round" and variants[0] in _AUTO_ROUND:
        method, variant = _AUTO_ROUND[variants[0]]
        variants = (variant,)
    if method not in METHODS:
        raise SourceError(
            f"{where}: the checkpoint is already quantized ({' '.join((method, *variants))}), which is not supported; "
            f"{ADVICE}. Supported: {', '.join(METHODS)}"
        )
    problems = [
        f"format {variant!r}, supported: {', '.join(_FORMATS[method])}"
        for variant in variants
        if method in _FORMATS and variant.lower() not in map(str.lower, _FORMATS[method])
    ]
    problems += _changed_weights(found)
    if problems:
        raise SourceError(f"{where}: this kind of {method} checkpoint is not supported; {ADVICE}:\n{listing(problems)}")
    lower = tuple(variant.lower() for variant in variants)
    return Settings(method, lower, _blocks(found), _promised(method, found))


def settings_file(config: Mapping[str, Any], folder: Path) -> str:
    """The file that says how a checkpoint is quantized; config.json where none does."""
    return _find(config, folder)[1].name


def _find(config: Mapping[str, Any], folder: Path) -> tuple[Any, Path]:
    text_config = config.get("text_config")
    for owner in (config, text_config if isinstance(text_config, dict) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            if owner.get(key):
                return owner[key], folder / "config.json"
    modelopt, auto_gptq = folder / "hf_quant_config.json", folder / "quantize_config.json"
    if is_present(modelopt):
        content = read_object(modelopt)
        inner = content.get("quantization")
        return ({"quant_method": "modelopt", **inner} if isinstance(inner, dict) else content), modelopt
    if is_present(auto_gptq):
        return {"quant_method": "gptq", **read_object(auto_gptq)}, auto_gptq
    return None, folder / "config.json"


def _guessed_method(found: Mapping[str, Any]) -> str:
    if "config_groups" in found:
        return "compressed-tensors"
    if "quant_algo" in found:
        return "modelopt"
    return "MLX" if {"group_size", "bits"} <= found.keys() else "unnamed"


def _variants(method: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """The formats that the settings name, the default of the library where they name none."""
    if method == "gptq":
        if found.get("is_marlin_format"):
            return ("marlin",)
        return (str(found.get("checkpoint_format") or found.get("format") or "gptq"),)
    if method == "awq":
        return (str(found.get("version") or found.get("format") or "gemm"),)
    if method == "auto-round":
        return (str(found.get("packing_format") or "auto_round"),)
    if method == "modelopt":
        return (str(found.get("quant_algo") or "unnamed"),)
    if method == "compressed-tensors":
        groups = [group.get("format") for group in _groups(found)]
        return tuple(dict.fromkeys(str(name) for name in (found.get("format") or "dense", *groups) if name))
    return ()


def _changed_weights(found: Mapping[str, Any]) -> list[str]:
    """Settings that make the weights something else than the model's own, whatever their format."""
    problems = []
    transforms = found.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        problems.append("transform_config: the weights are rotated and the runtime would have to rotate back")
    sparsity = found.get("sparsity_config")
    if isinstance(sparsity, dict) and str(sparsity.get("format", "dense")) != "dense":
        problems.append(f"sparsity_config: format {sparsity.get('format')!r}")
    return problems


def _groups(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = found.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _promised(method: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    if method == "gptq":
        return ("g_idx",) if found.get("desc_act") is True else ()
    if method == "awq":
        return ("qzeros",) if found.get("zero_point") is True else ()
    weights = [group["weights"] for group in _groups(found) if isinstance(group.get("weights"), dict)]
    asymmetric = bool(weights) and all(group.get("symmetric") is False for group in weights)
    ordered = bool(weights) and all(group.get("actorder") in ("group", True) for group in weights)
    return ("zero_point",) * asymmetric + ("g_idx",) * ordered


def _blocks(found: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    weights = [group["weights"] for group in _groups(found) if isinstance(group.get("weights"), dict)]
    stated = [found.get("weight_block_size"), *(group.get("block_structure") for group in weights)]
    return tuple(
        dict.fromkeys(
            (block[0], block[1])
            for block in stated
            if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
        )
    )

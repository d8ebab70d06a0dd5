"""Every scheme with the settings that config.json has for it, and whole checkpoints quantized by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_maker import text_config, weights_for, write_json_files
from quantized_maker import (
    Quantized,
    Stored,
    awq,
    bnb_4bit,
    bnb_8bit,
    gptq,
    mxfp4,
    mxfp8,
    nvfp4,
    packed_int,
    scaled,
    stored_as,
    write_tensors,
)


@dataclass(frozen=True)
class Scheme:
    """A way to quantize: settings for config.json, and module name, weight -> tensors."""

    config: dict[str, Any]
    quantize: Callable[[np.ndarray, np.random.Generator], Quantized]
    files: dict[str, Any] = field(default_factory=dict)


def _group_config(fmt: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": fmt}}
    return {"quant_method": "compressed-tensors", "format": fmt, "config_groups": groups, "ignore": ["lm_head"]}


def _with(function: Callable[..., Quantized], **options: Any) -> Callable[[np.ndarray, Any], Quantized]:
    return lambda weight, rng: function(weight, rng, **options)


_WHOLE = (1 << 20, 1 << 20)
_ROW = (1, 1 << 20)
_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64}
_HF_QUANT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}

SCHEMES: dict[str, Scheme] = {
    "fp8 blocks, f32 scales": Scheme(_FP8, _with(scaled, block=(128, 128))),
    "fp8 blocks, bf16 scales": Scheme(_FP8, _with(scaled, block=(128, 128), dtype="BF16")),
    "compressed fp8 per tensor": Scheme(
        _group_config("float-quantized", num_bits=8, type="float", strategy="tensor"),
        _with(scaled, block=_WHOLE, suffix="_scale", dtype="BF16", squeeze=True),
    ),
    "compressed fp8 per channel": Scheme(
        _group_config("float-quantized", num_bits=8, type="float", strategy="channel"),
        _with(scaled, block=_ROW, suffix="_scale", dtype="BF16"),
    ),
    "compressed fp8 blocks": Scheme(
        _group_config("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[96, 64]),
        _with(scaled, block=(96, 64), suffix="_scale", dtype="BF16"),
    ),
    "compressed int8 per channel": Scheme(
        _group_config("int-quantized", num_bits=8, type="int", strategy="channel"),
        _with(scaled, block=_ROW, suffix="_scale", codes="I8", dtype="BF16"),
    ),
    "compressed int8 asymmetric": Scheme(
        _group_config("naive-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        _with(scaled, block=_ROW, suffix="_scale", codes="I8", dtype="F16", zero=True),
    ),
    "compressed mxfp8": Scheme(_group_config("mxfp8-quantized", num_bits=8, type="float", group_size=32), mxfp8),
    "compressed int4 groups": Scheme(
        _group_config("pack-quantized", num_bits=4, type="int", group_size=32), _with(packed_int, bits=4, group=32)
    ),
    "compressed int4 asymmetric": Scheme(
        _group_config("pack-quantized", num_bits=4, type="int", group_size=128, symmetric=False),
        _with(packed_int, bits=4, group=128, asymmetric=True),
    ),
    "compressed int4 ordered": Scheme(
        _group_config("pack-quantized", num_bits=4, type="int", group_size=64, actorder="group"),
        _with(packed_int, bits=4, group=64, ordered=True, dtype="F16"),
    ),
    "compressed int8 packed": Scheme(
        _group_config("pack-quantized", num_bits=8, type="int", strategy="channel"),
        _with(packed_int, bits=8, group=None),
    ),
    "compressed int3 asymmetric": Scheme(
        _group_config("pack-quantized", num_bits=3, type="int", group_size=64, symmetric=False),
        _with(packed_int, bits=3, group=64, asymmetric=True),
    ),
    "compressed nvfp4": Scheme(
        _group_config("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16), _with(nvfp4, modelopt=False)
    ),
    "compressed mxfp4": Scheme(
        _group_config("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32), _with(mxfp4, blocks=False)
    ),
    "mxfp4 blocks": Scheme({"quant_method": "mxfp4"}, _with(mxfp4, blocks=True)),
    "modelopt nvfp4": Scheme({}, _with(nvfp4, modelopt=True), {"hf_quant_config.json": _HF_QUANT}),
    "modelopt fp8": Scheme(
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        _with(scaled, block=_WHOLE, suffix="_scale", squeeze=True),
    ),
    "gptq": Scheme(_GPTQ, gptq),
    "gptq desc_act": Scheme({**_GPTQ, "desc_act": True}, _with(gptq, desc_act=True)),
    "gptq_v2": Scheme({**_GPTQ, "checkpoint_format": "gptq_v2"}, _with(gptq, less_one=False)),
    "gptq 8-bit": Scheme({**_GPTQ, "bits": 8}, _with(gptq, bits=8)),
    "gptq 3-bit": Scheme({**_GPTQ, "bits": 3}, _with(gptq, bits=3, group=32)),
    "gptq 2-bit": Scheme({**_GPTQ, "bits": 2}, _with(gptq, bits=2)),
    "gptq of AutoGPTQ": Scheme({}, _with(gptq, g_idx=False), {"quantize_config.json": {"bits": 4, "group_size": 64}}),
    "auto-round as gptq": Scheme({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, gptq),
    "awq": Scheme({"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}, awq),
    "awq symmetric": Scheme(
        {"quant_method": "awq", "bits": 4, "zero_point": False, "version": "GEMM"}, _with(awq, zeros=False)
    ),
    "bitsandbytes nf4": Scheme(_BNB, bnb_4bit),
    "bitsandbytes nf4 nested": Scheme(_BNB, _with(bnb_4bit, nested=True, dtype="float16")),
    "bitsandbytes fp4": Scheme(_BNB, _with(bnb_4bit, kind="fp4", dtype="float32")),
    "bitsandbytes 8-bit": Scheme({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb_8bit),
}
_KEPT = ("in_proj_a", "in_proj_b", "conv1d", "embed_tokens", "norm", "lm_head", "mlp.gate.", "shared_expert_gate")


def quantize_weights(
    weights: Mapping[str, np.ndarray], scheme: Scheme, kept: tuple[str, ...] = _KEPT
) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """(the quantized checkpoint's tensors, the dequantized one's), modules named in `kept` left in BF16."""
    rng = np.random.default_rng(7)
    quantized: dict[str, Stored] = {}
    plain: dict[str, Stored] = {}
    for name, values in weights.items():
        if values.ndim != 2 or any(word in name for word in kept):
            quantized[name] = plain[name] = stored_as(values, "BF16")
            continue
        result = scheme.quantize(values, rng)
        module = name.removesuffix("weight")
        quantized |= {module + suffix: part for suffix, part in result.parts.items()}
        plain[name] = result.expected
    return quantized, plain


def make_quantized_checkpoints(
    folder: Path,
    scheme: Scheme,
    kept: tuple[str, ...] = _KEPT,
    model: tuple[dict[str, Any], dict[str, np.ndarray]] | None = None,
) -> tuple[Path, Path]:
    """(a quantized checkpoint, the same dequantized): two folders of the same name, whole and convertible.

    `model` is a config and its weights; the dense one of `text_config` if it is None.
    """
    config, weights = model or (text_config(), weights_for(text_config()))
    quantized, plain = quantize_weights(weights, scheme, kept)
    paths = []
    for kind, tensors, settings in (("quantized", quantized, scheme.config), ("plain", plain, {})):
        path = folder / kind / "Tiny-1M"
        path.mkdir(parents=True)
        write_json_files(path, {**config, "quantization_config": settings} if settings else config)
        write_tensors(path / "model.safetensors", tensors)
        paths.append(path)
    for name, content in scheme.files.items():
        (paths[0] / name).write_text(json.dumps(content))
    return paths[0], paths[1]

"""Quantized checkpoints that cannot be read right are refused, by name and all at once, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, text_config
from quantized_maker import Stored, write_tensors
from quantized_schemes import SCHEMES, make_quantized_checkpoints

from pocketquant import open_model
from pocketquant.convert.quantized import dequantize_table
from pocketquant.convert.safetensors import read_safetensors_header
from pocketquant.errors import PocketquantError, SourceError

WEIGHT = np.random.default_rng(1).standard_normal((64, 128)).astype(np.float32) * 0.05


def table_of(folder: Path, parts: dict[str, Stored], settings: dict[str, Any]) -> dict[str, Any]:
    write_tensors(folder / "model.safetensors", {f"m.{name}": part for name, part in parts.items()})
    stored = {tensor.name: tensor for tensor in read_safetensors_header(folder / "model.safetensors")}
    return dict(dequantize_table(stored, {"quantization_config": settings}, folder, []))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, r"already quantized \(hqq\), which is not supported; convert the BF16"),
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:mlx"}, r"auto-round auto_round:mlx"),
        ({"group_size": 64, "bits": 4}, "MLX"),
        ({"anything": 1}, r"already quantized \(unnamed\)"),
        ([1], "quantization_config: \\[1\\], expected an object"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, r"format 'marlin', supported: gptq, gptq_v2"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "marlin"),
        (
            {"quant_method": "gptq", "desc_act": "x"},
            r"config\.json: values of another kind(.|\n)*desc_act: 'x', expected",
        ),
        ({"quant_method": "awq", "zero_point": 1}, "zero_point: 1, expected true or false"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size: 128, expected a list"),
        ({"quant_method": "awq", "version": "gemv"}, r"format 'gemv', supported: gemm"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, r"format 'marlin-24'"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, r"format 'W4A8_AWQ', supported: FP8, NVFP4"),
        ({"config_groups": {}, "transform_config": {"config_groups": {"R4": {}}}}, "the weights are rotated"),
        ({"config_groups": {}, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    ],
)
def test_unsupported_schemes_are_refused_by_name(settings: Any, message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    (folder / "config.json").write_text(json.dumps(text_config(quantization_config=settings)))
    with pytest.raises(SourceError, match=message):
        open_model(folder)


def test_a_config_left_behind_is_noted(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    (folder / "config.json").write_text(json.dumps(text_config(quantization_config={"quant_method": "awq"})))
    assert open_model(folder).notes == ("config.json says awq, but no tensor is quantized",)


def test_breaks_today_06_leftovers_of_bitsandbytes_are_all_named(tmp_path: Path) -> None:
    quantized, _ = make_quantized_checkpoints(tmp_path, SCHEMES["bitsandbytes nf4"])
    path = quantized / "model.safetensors"
    raw = path.read_bytes().replace(b"quant_state.bitsandbytes__nf4", b"quant_state.left_behind______")
    path.write_bytes(raw)
    with pytest.raises(SourceError, match=r"model\S+: 0 quantization states .*bitsandbytes__nf4(.|\n)*and 15 more"):
        open_model(quantized)


@pytest.mark.parametrize(
    ("scheme", "gone", "message"),
    [
        ("gptq desc_act", "g_idx", r"config\.json announces m\.g_idx"),
        ("gptq", "scales", r"its m\.scales is missing"),
        ("awq", "qzeros", r"config\.json announces m\.qzeros"),
        ("compressed int4 asymmetric", "weight_zero_point", r"config\.json announces m\.weight_zero_point"),
        ("compressed int8 asymmetric", "weight_zero_point", r"config\.json announces m\.weight_zero_point"),
        ("compressed int4 ordered", "weight_g_idx", r"config\.json announces m\.weight_g_idx"),
        ("compressed int4 groups", "weight_shape", r"its m\.weight_shape is missing"),
        ("compressed nvfp4", "weight_global_scale", r"its m\.weight_global_scale is missing"),
        ("bitsandbytes nf4", "weight.absmax", r"its m\.weight\.absmax is missing"),
        ("bitsandbytes nf4 nested", "weight.nested_quant_map", r"its m\.weight\.nested_quant_map is missing"),
    ],
)
def test_missing_parts_are_refused(scheme: str, gone: str, message: str, tmp_path: Path) -> None:
    made = SCHEMES[scheme].quantize(WEIGHT, np.random.default_rng(2))
    del made.parts[gone]
    with pytest.raises(SourceError, match=message):
        table_of(tmp_path, made.parts, SCHEMES[scheme].config)


def test_gptq_tensors_without_settings_are_refused(tmp_path: Path) -> None:
    """Whether zeros are stored less one stands nowhere in the tensors."""
    made = SCHEMES["gptq"].quantize(WEIGHT, np.random.default_rng(2))
    with pytest.raises(SourceError, match=r"GPTQ or AWQ, but config\.json does not say which"):
        table_of(tmp_path, made.parts, {})


def test_awq_tensors_under_gptqs_name_are_refused(tmp_path: Path) -> None:
    made = SCHEMES["awq"].quantize(WEIGHT, np.random.default_rng(2))
    with pytest.raises(SourceError, match=r"m\.qweight"):
        table_of(tmp_path, made.parts, {"quant_method": "gptq"})


def test_a_weight_both_plain_and_quantized_is_refused(tmp_path: Path) -> None:
    made = SCHEMES["gptq"].quantize(WEIGHT, np.random.default_rng(2))
    made.parts["weight"] = made.expected
    with pytest.raises(SourceError, match=r"there is a m\.weight too"):
        table_of(tmp_path, made.parts, {"quant_method": "gptq"})


def test_a_group_index_beyond_the_scales_is_named(tmp_path: Path) -> None:
    made = SCHEMES["gptq desc_act"].quantize(WEIGHT, np.random.default_rng(2))
    made.parts["g_idx"][1][5] = 99
    tensor = table_of(tmp_path, made.parts, {"quant_method": "gptq"})["m.weight"]
    with pytest.raises(SourceError, match=r"m\.g_idx: names a group beyond the 2 scales"):
        tensor.words(0, 1)


def test_not_a_number_in_fp8_is_named(tmp_path: Path) -> None:
    scheme = SCHEMES["fp8 blocks, bf16 scales"]
    quantized, _ = make_quantized_checkpoints(tmp_path, scheme)
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = next(t for t in read_safetensors_header(quantized / "model.safetensors") if t.name == name)
    with open(quantized / "model.safetensors", "r+b") as file:
        file.seek(tensor.offset + 17 * tensor.shape[1] + 3)
        file.write(b"\x7f")
    down = next(tensor for tensor in open_model(quantized).tensors if tensor.name == "blk.1.ffn_down.weight")
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.down_proj\.weight rows 16 to 31: non-finite"):
        down.rows(16, 32)


def changed_shapes(part: Stored) -> list[Stored]:
    dtype, array = part
    flat = array.reshape(-1)
    return [
        (dtype, flat[:0]),
        (dtype, flat[:1].reshape(())),
        (dtype, flat[:1]),
        (dtype, flat[: flat.size // 2]),
        (dtype, flat.reshape(1, -1)),
        (dtype, flat.reshape(1, 1, 1, -1)),
        (dtype, np.ascontiguousarray(array.T)),
        ("I16", flat[: flat.size // 2].astype("<i2")),
        (dtype, np.full_like(array, 255 if array.dtype == np.uint8 else 99)),
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_hostile_parts_raise_nothing_but_our_errors(scheme: str, tmp_path: Path) -> None:
    """Every part with every wrong shape: refused, or read as some numbers of the announced shape."""
    made = SCHEMES[scheme].quantize(WEIGHT, np.random.default_rng(2))
    settings = SCHEMES[scheme].config or {"quant_method": "gptq" if "qweight" in made.parts else "modelopt"}
    settings = {"quant_algo": "NVFP4"} | settings if settings["quant_method"] == "modelopt" else settings
    n_refused = 0
    for name, part in made.parts.items():
        for wrong in changed_shapes(part):
            try:
                tensor = table_of(tmp_path, {**made.parts, name: wrong}, settings).get("m.weight")
                if tensor is None or len(tensor.shape) < 2:
                    continue
                words = tensor.words(0, int(np.prod(tensor.shape[:-1])))
                assert words.size == np.prod(tensor.shape)
            except PocketquantError:
                n_refused += 1
    assert n_refused > len(made.parts)

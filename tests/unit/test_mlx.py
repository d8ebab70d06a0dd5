"""Checkpoints saved by MLX: known by their kernels' layout, converted right, refused where nobody can tell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from adapter_maker import matrices_for, write_adapter
from checkpoint_maker import (
    ITEM_BYTES,
    encode,
    make_checkpoint,
    moe_config,
    mtp_weights_for,
    text_config,
    weights_for,
)

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.convert.checkpoint import open_checkpoint, open_mtp
from pocketquant.errors import ArchitectureError, SourceError
from pocketquant.gguf_file.reading import read_header

SHIFTED = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)


def bf16(values: np.ndarray) -> np.ndarray:
    """Values rounded to BF16, as f32."""
    words = np.frombuffer(encode(values, "BF16"), dtype="<u2").astype(np.uint32) << 16
    return words.view(np.float32).reshape(values.shape)


def as_mlx(weights: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """What mlx-lm's sanitize and save make of a checkpoint.

    Kernels turned, 1 added to norms in the stored type, experts in three tensors for each block.
    """
    saved = {}
    for name, values in weights.items():
        switch = name.replace(".experts.", ".switch_mlp.").removesuffix("gate_up_proj")
        if name.endswith(".experts.gate_up_proj"):
            gate, up = np.split(values, 2, axis=1)
            saved |= {f"{switch}gate_proj.weight": gate, f"{switch}up_proj.weight": up}
            continue
        if name.endswith(".experts.down_proj"):
            saved[f"{switch}.weight"] = values
            continue
        if name.endswith("conv1d.weight"):
            values = np.moveaxis(values, 2, 1)
        elif name.endswith(SHIFTED):
            values = bf16(bf16(values) + np.float32(1)) if dtype == "BF16" else values + np.float32(1)
        saved[name] = values
    return saved


@pytest.mark.parametrize("experts", [False, True])
def test_breaks_today_04_mlx_checkpoints_give_the_same_file(experts: bool, tmp_path: Path) -> None:
    """In F32 the norms lose nothing, so every byte is the original's."""
    config = moe_config() if experts else text_config()
    weights = weights_for(config)
    original = open_model(make_checkpoint(tmp_path / "a" / "Tiny-1M", dtype="F32", weights=weights, **config))
    mlx = open_model(make_checkpoint(tmp_path / "b" / "Tiny-1M", dtype="F32", weights=as_mlx(weights, "F32"), **config))
    for model, name in ((original, "a.gguf"), (mlx, "b.gguf")):
        write(plan(model, open_recipe("f32")), tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert original.notes == ()
    assert mlx.notes == (
        "saved by MLX (all 3 convolution kernels are transposed): kernels turned back, nothing added to the norms, "
        "which hold + 1 already",
    )


def test_breaks_today_04_mlx_norms_are_taken_as_stored(tmp_path: Path) -> None:
    """In BF16 the sum was rounded on save; nothing else may differ."""
    weights = weights_for(text_config(), "language_model.model.")
    original = open_model(make_checkpoint(tmp_path / "a", weights=weights))
    saved = as_mlx(weights, "BF16")
    mlx = open_model(make_checkpoint(tmp_path / "b", weights=saved))
    assert [tensor.name for tensor in mlx.tensors] == [tensor.name for tensor in original.tensors]
    different = []
    for first, second in zip(original.tensors, mlx.tensors, strict=True):
        one, other = first.rows(0, first.n_rows), second.rows(0, second.n_rows)
        if not np.array_equal(one, other):
            different.append(first.name)
            assert np.array_equal(bf16(one), other), first.name
    assert "output_norm.weight" in different
    assert all(name.endswith("norm.weight") and not name.endswith("ssm_norm.weight") for name in different)
    stored = saved["language_model.model.layers.3.self_attn.q_norm.weight"]
    q_norm = next(tensor for tensor in mlx.tensors if tensor.name == "blk.3.attn_q_norm.weight")
    assert np.array_equal(q_norm.rows(0, 1)[0], stored)


def test_breaks_today_04_mlx_half_transposed_is_refused(tmp_path: Path) -> None:
    weights = weights_for(text_config())
    name = "model.layers.1.linear_attn.conv1d.weight"
    weights[name] = np.moveaxis(weights[name], 2, 1)
    with pytest.raises(ArchitectureError) as caught:
        open_model(make_checkpoint(tmp_path / "c", weights=weights))
    assert "only 1 of its 3 convolution kernels are transposed" in str(caught.value)
    for layer in (0, 2):
        assert f"model.layers.{layer}.linear_attn.conv1d.weight [512, 1, 4]" in str(caught.value)


def test_mlx_with_mtp_is_refused_unless_dropped(tmp_path: Path) -> None:
    config = text_config()
    weights = as_mlx(weights_for(config), "BF16") | mtp_weights_for(config)
    folder = make_checkpoint(tmp_path / "c", weights=weights)
    for open_it in (open_model, open_mtp):
        with pytest.raises(ArchitectureError, match=r"leave the block out \(drop\):\n  mtp\."):
            open_it(folder)
    dropped = open_checkpoint(folder, mtp="drop")
    assert len(dropped.tensors) == len(weights_for(config))
    assert dropped.notes[0].startswith("saved by MLX")


def test_norms_of_an_adapter_do_not_go_into_an_mlx_checkpoint(tmp_path: Path) -> None:
    """There norms hold 1 + weight, and PEFT saves the weight alone."""
    weights = weights_for(text_config())
    folder = make_checkpoint(tmp_path / "c", weights=as_mlx(weights, "BF16"))
    name = "model.layers.0.input_layernorm"
    tensors = {f"base_model.model.{name}.weight": np.ones(256, np.float32)}
    norms = write_adapter(tmp_path / "norms", tensors, modules_to_save=["input_layernorm"])
    with pytest.raises(SourceError, match=f"saved by MLX(.|\n)*{name}"):
        open_model(folder, adapter=norms)
    matrices = write_adapter(tmp_path / "lora", matrices_for({"model.layers.0.mlp.up_proj": (512, 256)}, 4))
    assert any("merged into 1 tensors" in note for note in open_model(folder, adapter=matrices).notes)


def quantized_by_mlx(folder: Path) -> Path:
    """One linear layer as mlx-lm saves it at 4 bits: packed words, scales, biases; config.json as the original."""
    weights = weights_for(text_config())
    module = "model.layers.0.mlp.up_proj"
    del weights[f"{module}.weight"]
    make_checkpoint(folder, n_shards=2, weights=weights)
    header, data = {}, b""
    for name, dtype, shape in (
        ("weight", "U32", [512, 32]),
        ("scales", "BF16", [512, 4]),
        ("biases", "BF16", [512, 4]),
    ):
        nbytes = shape[0] * shape[1] * ({"U32": 4} | ITEM_BYTES)[dtype]
        offsets = [len(data), len(data) + nbytes]
        header[f"{module}.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += bytes(nbytes)
    raw = json.dumps(header).encode()
    (folder / "packed.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(header, "packed.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_mlx_quantized_is_refused_by_its_tensors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"quantized by MLX(.|\n)*\n  model\.layers\.0\.mlp\.up_proj\.weight"):
        open_model(quantized_by_mlx(tmp_path / "c"))


@pytest.mark.parametrize("keys", [["quantization"], ["quantization_config"], ["quantization", "quantization_config"]])
def test_mlx_quantized_is_refused_by_its_config(keys: list[str], tmp_path: Path) -> None:
    folder = quantized_by_mlx(tmp_path / "c")
    settings = {"group_size": 64, "bits": 4, "mode": "affine"}
    (folder / "config.json").write_text(json.dumps(text_config(**dict.fromkeys(keys, settings))))
    with pytest.raises(SourceError, match=r"quantized by MLX \(4 bits, groups of 64\)"):
        open_model(folder)


def test_gguf_of_an_mlx_checkpoint_has_the_original_shapes(tmp_path: Path) -> None:
    weights = as_mlx(weights_for(text_config()), "BF16")
    write(plan(open_model(make_checkpoint(tmp_path / "c", weights=weights)), open_recipe("bf16")), tmp_path / "a.gguf")
    shapes = {tensor.name: tensor.shape for tensor in read_header(tmp_path / "a.gguf").tensors}
    assert shapes["blk.0.ssm_conv1d.weight"] == (512, 4)

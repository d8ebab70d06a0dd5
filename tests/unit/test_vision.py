"""Vision towers: what maps, what is refused with every offender named, which types, and the sizes of the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, write_safetensors
from vision_maker import (
    MEAN,
    STD,
    TOWER_4B,
    TOWER_9B,
    both_config,
    make_sparse_vision_checkpoint,
    make_vision_checkpoint,
    vision_config,
    vision_weights,
    write_vision_files,
)

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.architectures.qwen35_vision import PREFIXES
from pocketquant.convert.vision import open_vision, read_pixel_scaling
from pocketquant.errors import ArchitectureError, SourceError
from pocketquant.gguf_file.reading import read_header
from pocketquant.model import Model, Role

RECIPE_TYPES = Path(__file__).parents[1] / "golden/recipe_types.json"
TEXT_HEADER_BYTES = 12_000_000
"""Upper bound for the text file's header at 248,320 tokens: about 250,000 tokens and as many merges."""


def tower_of(folder: Path, **options: Any) -> Model:
    model = open_vision(make_vision_checkpoint(folder, **options))
    assert model is not None
    return model


def rows_of(model: Model, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in model.tensors if tensor.name == name)
    return tensor.rows(0, tensor.n_rows)


def types_of(model: Model, recipe: str) -> dict[Role, set[str]]:
    types: dict[Role, set[str]] = {}
    for item in plan(model, open_recipe(recipe)).tensors:
        types.setdefault(item.tensor.role, set()).add(item.format.name)
    return types


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_breaks_today_03_every_prefix_gives_the_whole_tower(prefix: str, dtype: str, tmp_path: Path) -> None:
    ours = tower_of(tmp_path / "a", prefix=prefix, dtype=dtype)
    expected = tower_of(tmp_path / "b", dtype=dtype)
    assert len(ours.tensors) == 34
    for tensor, other in zip(ours.tensors, expected.tensors, strict=True):
        assert (tensor.name, tensor.role, tensor.shape) == (other.name, other.role, other.shape)
        assert np.array_equal(tensor.rows(0, tensor.n_rows), other.rows(0, other.n_rows)), tensor.name
    # the text model beside it opens as before, and says that the tower is in a file of its own
    assert any("vision tower" in note for note in open_model(tmp_path / "a").notes)


def test_every_tensor_holds_its_own_numbers(tmp_path: Path) -> None:
    weights = vision_weights(vision_config())
    model = tower_of(tmp_path / "a", weights=weights)
    names = {
        "v.patch_embd.bias": "patch_embed.proj.bias",
        "v.position_embd.weight": "pos_embed.weight",
        "v.post_ln.weight": "merger.norm.weight",
        "v.post_ln.bias": "merger.norm.bias",
    }
    names |= {
        f"mm.{at}.{kind}": f"merger.linear_fc{at // 2 + 1}.{kind}" for at in (0, 2) for kind in ("weight", "bias")
    }
    parts = {"ln1": "norm1", "ln2": "norm2", "attn_qkv": "attn.qkv", "attn_out": "attn.proj"}
    parts |= {"ffn_up": "mlp.linear_fc1", "ffn_down": "mlp.linear_fc2"}
    for block in range(2):
        for ours, theirs in parts.items():
            names |= {f"v.blk.{block}.{ours}.{kind}": f"blocks.{block}.{theirs}.{kind}" for kind in ("weight", "bias")}
    kernel = weights["model.visual.patch_embed.proj.weight"]
    expected = {"v.patch_embd.weight": kernel[:, :, 0], "v.patch_embd.weight.1": kernel[:, :, 1]}
    expected |= {ours: weights[f"model.visual.{theirs}"] for ours, theirs in names.items()}
    assert {tensor.name: tensor.shape for tensor in model.tensors} == {n: a.shape for n, a in expected.items()}
    for name, values in expected.items():
        assert np.array_equal(rows_of(model, name), values.reshape(-1, values.shape[-1])), name


@pytest.mark.parametrize("step", [1, 7, 16, 100])
def test_rows_do_not_depend_on_the_chunk(step: int, tmp_path: Path) -> None:
    for tensor in tower_of(tmp_path / "a").tensors:
        pieces = [tensor.rows(start, min(start + step, tensor.n_rows)) for start in range(0, tensor.n_rows, step)]
        assert np.array_equal(np.concatenate(pieces), tensor.rows(0, tensor.n_rows)), tensor.name


def test_metadata(tmp_path: Path) -> None:
    metadata = tower_of(tmp_path / "Tiny-1M").metadata
    found = {key: value.value for key, value in metadata.items() if not key.startswith("general.sampling")}
    assert found["general.architecture"] == "clip"
    assert found["general.type"] == "mmproj"
    assert {key.removeprefix("clip."): value for key, value in found.items() if key.startswith("clip.")} == {
        "has_vision_encoder": True,
        "projector_type": "qwen3vl_merger",
        "use_gelu": True,
        "vision.projection_dim": 256,
        "vision.image_size": 96,
        "vision.patch_size": 16,
        "vision.embedding_length": 64,
        "vision.feed_forward_length": 96,
        "vision.block_count": 2,
        "vision.attention.head_count": 4,
        "vision.image_mean": MEAN,
        "vision.image_std": STD,
        "vision.spatial_merge_size": 2,
        "vision.attention.layer_norm_epsilon": 1e-6,
        "vision.is_deepstack_layers": [False, False],
    }


def test_keys_that_transformers_leaves_out_have_its_defaults(tmp_path: Path) -> None:
    short = {key: value for key, value in vision_config().items() if not key.startswith(("in_ch", "patch", "spatial"))}
    assert tower_of(tmp_path / "a", vision={**short, "temporal_patch_size": [2, 2]}).sizes["n_patch"] == 16


@pytest.mark.parametrize("recipe", ["f32", "f16", "bf16", "q8_0", "pocket_mmproj"])
def test_written_file_opens_as_the_same_tower(recipe: str, tmp_path: Path) -> None:
    model = tower_of(tmp_path / "a")
    write(plan(model, open_recipe(recipe)), tmp_path / "mmproj.gguf")
    again = open_model(tmp_path / "mmproj.gguf")
    assert again.architecture == "clip"
    assert again.sizes == model.sizes
    assert [(t.name, t.role, t.layer, t.shape, t.keep_f32) for t in again.tensors] == [
        (t.name, t.role, t.layer, t.shape, t.keep_f32) for t in model.tensors
    ]
    assert again.metadata.keys() == model.metadata.keys()
    assert open_vision(tmp_path / "mmproj.gguf") is None  # a GGUF is one model, with nothing beside it


def test_two_steps_give_the_same_bytes(tmp_path: Path) -> None:
    model = tower_of(tmp_path / "a")
    write(plan(model, open_recipe("f32")), tmp_path / "f32.gguf")
    write(plan(model, open_recipe("pocket_mmproj")), tmp_path / "one.gguf")
    write(plan(open_model(tmp_path / "f32.gguf"), open_recipe("pocket_mmproj")), tmp_path / "two.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_types(tmp_path: Path) -> None:
    tower = tower_of(tmp_path / "a")
    kept = {Role.VISION_NORM, Role.VISION_BIAS, Role.VISION_POSITION}
    for recipe in ("f16", "bf16", "q8_0", "pocket_mmproj", "q4_k_m"):
        types = types_of(tower, recipe)
        assert all(types[role] == {"F32"} for role in kept), recipe
        # runtimes convolve with kernels in F16 and F32 only
        assert types[Role.VISION_PATCH] == ({"F16"} if recipe in ("f16", "pocket_mmproj") else {"F32"}), recipe
    assert types_of(tower, "bf16")[Role.VISION_QKV] == {"BF16"}


def test_breaks_today_07_text_only_checkpoints_have_no_tower(checkpoint: Path, tmp_path: Path) -> None:
    assert open_vision(checkpoint) is None
    assert open_vision(make_vision_checkpoint(tmp_path / "declares one", weights={})) is None


def test_breaks_today_03_a_tower_in_part_is_refused_with_every_offender(tmp_path: Path) -> None:
    weights = vision_weights(vision_config())
    del weights["model.visual.blocks.1.norm2.bias"], weights["model.visual.merger.linear_fc2.weight"]
    weights["model.visual.deepstack_merger_list.0.norm.bias"] = np.ones(256, np.float32)
    weights["model.visual.blocks.0.attn.qkv.weight"] = np.ones((192, 63), np.float32)
    folder = make_vision_checkpoint(tmp_path / "a", weights=weights)
    with pytest.raises(ArchitectureError) as raised:
        open_vision(folder)
    for words in (
        "2 tensors missing",
        "model.visual.blocks.1.norm2.bias [64]",
        "model.visual.merger.linear_fc2.weight [256, 256]",
        "1 tensors that no Qwen3.5 vision tower has",
        "model.visual.deepstack_merger_list.0.norm.bias F32 [256]",
        "model.visual.blocks.0.attn.qkv.weight: F32 [192, 63], expected [n_qkv=192 n_embd=64]",
    ):
        assert words in str(raised.value)


def test_breaks_today_03_an_empty_file_is_refused(tmp_path: Path) -> None:
    model = tower_of(tmp_path / "a")
    whole = plan(model, open_recipe("f32"))
    raw = bytearray(whole.header)
    raw[8:16] = bytes(8)  # number of tensors
    (tmp_path / "empty.gguf").write_bytes(raw)
    assert read_header(tmp_path / "empty.gguf").tensors == ()
    with pytest.raises(ArchitectureError, match="holds no tensors"):
        open_model(tmp_path / "empty.gguf")


def test_two_towers_are_refused(tmp_path: Path) -> None:
    weights = {**vision_weights(vision_config()), **vision_weights(vision_config(), "visual.")}
    with pytest.raises(ArchitectureError, match="two vision towers"):
        open_vision(make_vision_checkpoint(tmp_path / "a", weights=weights))


@pytest.mark.parametrize("prefix", ["vision_tower.", "model.visual."])
def test_breaks_today_04_mlx_towers_give_the_same_file(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = vision_weights(vision_config())
    saved = {name.replace("model.visual.", prefix): values for name, values in original.items()}
    saved[f"{prefix}patch_embed.proj.weight"] = np.ascontiguousarray(
        original["model.visual.patch_embed.proj.weight"].transpose(0, 2, 3, 4, 1)
    )
    towers = [
        open_vision(make_vision_checkpoint(tmp_path / folder / "Tiny-1M", weights=weights))
        for folder, weights in (("a", original), ("b", saved))
    ]
    assert towers[0] is not None
    assert towers[1] is not None
    assert towers[1].notes == ("vision tower saved by MLX (its kernel's channels are last): put back in their place",)
    assert towers[0].notes == ()
    monkeypatch.setattr("pocketquant.gguf_file.writing.CHUNK_WEIGHTS", 16 * 21)  # chunks that end within a channel
    for tower, name in zip(towers, ("a.gguf", "b.gguf"), strict=True):
        write(plan(tower, open_recipe("f32")), tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    text = [open_model(tmp_path / folder / "Tiny-1M") for folder in ("a", "b")]
    assert [tensor.name for tensor in text[0].tensors] == [tensor.name for tensor in text[1].tensors]


def write_mixed(path: Path, entries: dict[str, tuple[str, list[int], bytes]]) -> None:
    """A safetensors file of tensors of several types: name -> type, shape, bytes."""
    header, at = {}, 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    raw = json.dumps(header).encode()
    data = b"".join(data for _, _, data in entries.values())
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def plain_entries() -> dict[str, tuple[str, list[int], bytes]]:
    weights = vision_weights(vision_config())
    return {name: ("F32", list(values.shape), values.tobytes()) for name, values in weights.items()}


def test_breaks_today_06_bitsandbytes_leftovers_are_refused(tmp_path: Path) -> None:
    entries = plain_entries()
    name = "model.visual.blocks.0.attn.qkv.weight"
    entries[name] = ("U8", [192 * 32, 1], bytes(192 * 32))
    write_vision_files(tmp_path, both_config())
    write_mixed(tmp_path / "model.safetensors", entries)
    with pytest.raises(ArchitectureError, match="bitsandbytes"):
        open_vision(tmp_path)


def test_breaks_today_09_a_quantized_tower_is_dequantized_and_says_so(tmp_path: Path) -> None:
    entries = plain_entries()
    name = "model.visual.blocks.0.mlp.linear_fc1.weight"
    codes = np.random.default_rng(5).integers(0, 0x7F, (96, 64), dtype=np.uint8)
    scale = np.array([0.01], np.float32)
    entries[name] = ("F8_E4M3", [96, 64], codes.tobytes())
    entries[f"{name}_scale"] = ("F32", [1], scale.tobytes())
    method = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
    write_vision_files(tmp_path, {**both_config(), "quantization_config": method})
    write_mixed(tmp_path / "model.safetensors", entries)
    model = open_vision(tmp_path)
    assert model is not None
    assert any("a lossy reference" in note for note in model.notes)
    # sign, four bits of exponent, three of mantissa
    exponent, mantissa = (codes >> 3).astype(int), codes & 7
    values = np.where(exponent, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    np.testing.assert_allclose(rows_of(model, "v.blk.0.ffn_up.weight"), values * scale[0], rtol=2**-8)

    write_mixed(tmp_path / "model.safetensors", plain_entries())
    tower = open_vision(tmp_path)
    assert tower is not None
    assert tower.notes == ()  # only the text model is quantized


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": "two"}, "depth: 'two', expected an integer"),
        ({"hidden_size": 0}, "hidden_size: 0, expected an integer"),
        ({"patch_size": [16, 14]}, r"patch_size: \[16, 14\], expected an integer"),
        ({"temporal_patch_size": 1}, "temporal_patch_size 1: llama.cpp computes with 2"),
        ({"spatial_merge_size": 3}, "spatial_merge_size 3: llama.cpp computes with 2"),
        ({"in_channels": 4}, "in_channels 4: llama.cpp computes with 3"),
        ({"num_heads": 5}, "hidden_size 64 is no multiple of 4 x num_heads 5"),
        ({"num_position_embeddings": 35}, "num_position_embeddings 35 is no square"),
        ({"hidden_act": "silu"}, "hidden_act 'silu': llama.cpp computes gelu_pytorch_tanh"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta 1000000.0: llama.cpp rotates with 10000"),
        ({"deepstack_visual_indexes": [5, 11]}, r"deepstack_visual_indexes \[5, 11\]: a Qwen3-VL tower"),
        ({"out_hidden_size": 512}, "embeddings of 512 numbers .* the text model takes 256"),
    ],
)
def test_configs_that_cannot_be_right_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = make_vision_checkpoint(tmp_path / "a")
    (folder / "config.json").write_text(json.dumps(both_config(vision_config(**changes))))
    with pytest.raises(ArchitectureError, match=message):
        open_vision(folder)


def test_tensors_without_a_config_are_refused(tmp_path: Path) -> None:
    folder = make_vision_checkpoint(tmp_path / "a")
    config = both_config()
    del config["vision_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureError, match=r"config\.json has no vision_config"):
        open_vision(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "image_mean: missing\n  image_std: missing"),
        ({"preprocessor_config.json": {"image_mean": [0.5, 0.5], "image_std": STD}}, "expected three numbers"),
        ({"preprocessor_config.json": {"image_mean": MEAN, "image_std": [1, 0, 1]}}, "expected positive numbers"),
        ({"preprocessor_config.json": {"image_mean": MEAN, "image_std": ["1", 1, 1]}}, "expected three numbers"),
        ({"processor_config.json": {"image_mean": MEAN, "image_std": STD, "rescale_factor": 1}}, "scales with 1/255"),
        ({"processor_config.json": {"image_processor": []}}, "image_processor: no JSON object"),
        ({"preprocessor_config.json": []}, "no JSON object"),
    ],
)
def test_pixel_scaling_that_is_not_known_is_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(SourceError, match=message):
        read_pixel_scaling(tmp_path)


def test_pixel_scaling_of_the_newer_file_wins(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": STD, "image_std": STD}))
    assert read_pixel_scaling(tmp_path) == {"image_mean": STD, "image_std": STD}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"image_mean": MEAN}}))
    assert read_pixel_scaling(tmp_path) == {"image_mean": MEAN, "image_std": STD}


def test_breaks_today_12_non_finite_weights_are_named(tmp_path: Path) -> None:
    weights = vision_weights(vision_config())
    weights["model.visual.patch_embed.proj.weight"][3, 1, 1, 4, 5] = np.inf
    model = tower_of(tmp_path / "a", weights=weights)
    assert np.isfinite(rows_of(model, "v.patch_embd.weight")).all()
    with pytest.raises(SourceError, match=r"patch_embed\.proj\.weight.*non-finite"):
        rows_of(model, "v.patch_embd.weight.1")


def test_a_file_of_another_tower_is_refused(tmp_path: Path) -> None:
    write(plan(tower_of(tmp_path / "a"), open_recipe("f32")), tmp_path / "mmproj.gguf")
    raw = (tmp_path / "mmproj.gguf").read_bytes()
    (tmp_path / "mmproj.gguf").write_bytes(raw.replace(b"qwen3vl_merger", b"qwen2vl_merger"))
    with pytest.raises(ArchitectureError, match="projector_type 'qwen2vl_merger': only qwen3vl_merger"):
        open_model(tmp_path / "mmproj.gguf")


def test_a_stray_tensor_is_not_taken_for_a_tower(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "a")
    write_safetensors(folder / "model.safetensors", {"model.visualizer.weight": np.ones((2, 2), np.float32)})
    assert open_vision(folder) is None


def test_breaks_today_10_sizes_of_the_real_towers(tmp_path: Path) -> None:
    """The tower of 4B with its text model in pocket_4bit is below 3 GB; the widest tower falls back where it must."""
    small = {"hidden_size": 2560, "num_hidden_layers": 4}
    tower = open_vision(make_sparse_vision_checkpoint(tmp_path / "4B", TOWER_4B, **small))
    assert tower is not None
    sizes = {name: plan(tower, open_recipe(name)).file_bytes for name in ("f16", "q8_0", "pocket_mmproj")}
    assert sizes == {"f16": 672_423_168, "q8_0": 366_894_336, "pocket_mmproj": 275_668_256}
    text = json.loads(RECIPE_TYPES.read_text(encoding="utf-8"))["4B pocket_4bit"]["nbytes"]
    assert text + TEXT_HEADER_BYTES + sizes["pocket_mmproj"] < 3.00e9

    wide = open_vision(make_sparse_vision_checkpoint(tmp_path / "9B", TOWER_9B, hidden_size=4096))
    assert wide is not None
    types = types_of(wide, "pocket_mmproj")
    # 1152 columns are no multiple of 256, 4304 not even of 32
    assert types[Role.VISION_UP] == {"Q5_0"}
    assert types[Role.VISION_DOWN] == {"F16"}
    assert types[Role.VISION_MERGE] == {"Q8_0"}
    assert types_of(wide, "q8_0")[Role.VISION_DOWN] == {"F16"}

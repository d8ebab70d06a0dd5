"""Already-quantized checkpoints: every scheme is read as its own arithmetic says, in chunks and end to end."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from checkpoint_maker import moe_config, one_by_one, weights_for
from quantized_maker import Quantized, Stored, as_floats, bnb_4bit, gptq, nvfp4, packed_int, scaled, write_tensors
from quantized_schemes import SCHEMES, make_quantized_checkpoints

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.convert.quantized import dequantize_table
from pocketquant.convert.safetensors import CheckpointTensor, read_safetensors_header


def table_of(folder: Path, parts: dict[str, Stored], config: dict[str, object]) -> dict[str, CheckpointTensor]:
    write_tensors(folder / "model.safetensors", {f"m.{name}": part for name, part in parts.items()})
    stored = {tensor.name: tensor for tensor in read_safetensors_header(folder / "model.safetensors")}
    return dequantize_table(stored, {"quantization_config": config}, folder, [])


def words_of(stored: Stored) -> np.ndarray:
    dtype, array = stored
    return array.view({"F32": "<u4"}.get(dtype, "<u2"))


@pytest.mark.parametrize("name", SCHEMES)
def test_breaks_today_09_every_scheme_converts_as_its_dequantized_checkpoint(name: str, tmp_path: Path) -> None:
    """FP8, AWQ, GPTQ, NVFP4, compressed-tensors, MXFP4, bitsandbytes: through the value-head reorder to equal bytes."""
    quantized, plain = make_quantized_checkpoints(tmp_path, SCHEMES[name])
    ours, expected = open_model(quantized), open_model(plain)
    assert [(t.name, t.dtype, t.shape) for t in ours.tensors] == [(t.name, t.dtype, t.shape) for t in expected.tensors]
    for recipe in ("f32", "bf16"):
        for path, model in ((tmp_path / "ours.gguf", ours), (tmp_path / "expected.gguf", expected)):
            write(plan(model, open_recipe(recipe)), path)
        assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes(), recipe
    assert any("a lossy reference" in note and "25 tensors" in note for note in ours.notes), ours.notes
    assert not expected.notes


@pytest.mark.parametrize("name", SCHEMES)
def test_chunks_are_slices_of_the_whole(name: str, tmp_path: Path) -> None:
    weight = np.random.default_rng(1).standard_normal((96, 384)).astype(np.float32) * 0.05
    scheme = SCHEMES[name]
    made = scheme.quantize(weight, np.random.default_rng(2))
    config = scheme.config or {"quant_method": "gptq" if "qweight" in made.parts else "modelopt", "quant_algo": "NVFP4"}
    table = table_of(tmp_path, made.parts, config)
    assert list(table) == ["m.weight"]
    tensor = table["m.weight"]
    whole = tensor.words(0, 96)
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == (made.expected[0], (96, 384), whole.nbytes)
    assert np.array_equal(whole, words_of(made.expected))
    for start, stop in ((0, 1), (1, 2), (5, 38), (31, 33), (32, 64), (90, 96)):
        assert np.array_equal(tensor.words(start, stop), whole[start:stop]), (start, stop)
    assert np.array_equal(pickle.loads(pickle.dumps(tensor)).words(3, 9), whole[3:9])


RNG = np.random.default_rng(3)
ODD = RNG.standard_normal((130, 200)).astype(np.float32) * 0.05
RAGGED = {
    "fp8 blocks": (scaled(ODD, RNG, block=(128, 128)), {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "int8 rows": (scaled(ODD, RNG, block=(1, 200), suffix="_scale", codes="I8", zero=True), {}),
    "packed rows of 3 bits": (packed_int(ODD[:, :77], RNG, bits=3, group=None, asymmetric=True), {}),
    "packed groups of 5 bits": (packed_int(ODD, RNG, bits=5, group=40, asymmetric=True), {}),
    "nf4, a block over two rows": (bnb_4bit(ODD, RNG), {"quant_method": "bitsandbytes"}),
    "nf4, odd rows": (bnb_4bit(ODD[:33, :77], RNG, nested=True), {"quant_method": "bitsandbytes"}),
    "gptq, 40 outputs": (gptq(ODD[:40, :192], RNG, group=96), {"quant_method": "gptq"}),
    "nvfp4, 3 rows": (nvfp4(ODD[:3, :48], RNG, modelopt=False), {}),
}


@pytest.mark.parametrize("name", RAGGED)
def test_sizes_that_blocks_do_not_divide(name: str, tmp_path: Path) -> None:
    made, config = RAGGED[name]
    tensor = table_of(tmp_path, made.parts, config or {"quant_method": "compressed-tensors"})["m.weight"]
    n_rows = len(made.expected[1])
    assert np.array_equal(tensor.words(0, n_rows), words_of(made.expected))
    for start in range(0, n_rows, 11):
        stop = min(start + 11, n_rows)
        assert np.array_equal(tensor.words(start, stop), words_of(made.expected)[start:stop])


def test_fused_experts_of_fp8(tmp_path: Path) -> None:
    """[E, r, c] with [E, r / 128, c / 128] scales: rows count through the experts."""
    weight = np.random.default_rng(4).standard_normal((3, 130, 256)).astype(np.float32) * 0.05
    made = [scaled(matrix, RNG, block=(128, 128)) for matrix in weight]
    parts = {part: (made[0].parts[part][0], np.stack([m.parts[part][1] for m in made])) for part in made[0].parts}
    experts = {name.replace("weight", "gate_up_proj"): part for name, part in parts.items()}
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    tensor = table_of(tmp_path, experts, config)["m.gate_up_proj"]
    expected = np.concatenate([as_floats(m.expected) for m in made])
    assert tensor.shape == (3, 130, 256)
    assert np.array_equal(tensor.words(100, 300).view("<f4"), expected[100:300])


@pytest.mark.parametrize("name", ["fp8 blocks, bf16 scales", "gptq desc_act", "awq", "compressed nvfp4"])
def test_experts_quantized_one_by_one(name: str, tmp_path: Path) -> None:
    config = moe_config()
    model = config, one_by_one(weights_for(config))
    quantized, plain = make_quantized_checkpoints(tmp_path, SCHEMES[name], model=model)
    for source in (quantized, plain):
        write(plan(open_model(source), open_recipe("q8_0")), tmp_path / f"{source.parent.name}.gguf")
    assert (tmp_path / "quantized.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_tensors_decide_what_is_quantized(tmp_path: Path) -> None:
    """The config excludes nothing; attention stays BF16, and a module in its list is quantized all the same."""
    scheme = SCHEMES["fp8 blocks, f32 scales"]
    scheme.config["modules_to_not_convert"] = ["model.layers.0.mlp.up_proj"]
    kept = ("self_attn", "in_proj_a", "in_proj_b", "conv1d", "embed_tokens", "norm")
    try:
        quantized, plain = make_quantized_checkpoints(tmp_path, scheme, kept)
    finally:
        del scheme.config["modules_to_not_convert"]
    ours, expected = open_model(quantized), open_model(plain)
    for tensor, other in zip(ours.tensors, expected.tensors, strict=True):
        assert np.array_equal(tensor.rows(0, tensor.n_rows), other.rows(0, other.n_rows)), tensor.name
    assert {tensor.dtype for tensor in ours.tensors if "attn_k" in tensor.name} == {"BF16"}


def test_all_codes_of_fp8_and_int8(tmp_path: Path) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    half = (codes.astype("<u2") << 8).view("<f2").astype(np.float32)
    scale = np.array([0.5, 3.0], "<f4")
    for dtype, values in (("F8_E5M2", half), ("I8", codes.view("i1").astype(np.float32))):
        parts: dict[str, Stored] = {"weight": (dtype, codes), "weight_scale": ("F32", scale)}
        tensor = table_of(tmp_path, parts, {"quant_method": "compressed-tensors"})["m.weight"]
        with np.errstate(invalid="ignore"):
            assert np.array_equal(tensor.words(0, 2).view("<f4"), values * scale[:, None], equal_nan=True)


def test_expected_tensors_are_no_copies_of_the_code() -> None:
    """The maker's numbers are near the weights they were made from: packing and expectation agree with reality."""
    made: Quantized = gptq(ODD[:40, :192], np.random.default_rng(1))
    assert np.corrcoef(as_floats(made.expected).ravel(), ODD[:40, :192].ravel())[0, 1] > 0.5

"""What each scheme's own library quantizes is read exactly as that library dequantizes it: every bit, type and shape.

compressed-tensors, bitsandbytes, transformers and nvidia-modelopt run on a CPU and do both halves. GPTQModel and
AutoAWQ do not: AWQ's packing is read by compressed-tensors' converter, and GPTQ is compared with llama.cpp's converter.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from quantized_maker import gptq
from quantized_schemes import SCHEMES, Scheme, make_quantized_checkpoints

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.convert.quantized import dequantize_table
from pocketquant.convert.safetensors import read_safetensors_header
from pocketquant.files.reading import read_at
from pocketquant.gguf_file.reading import read_header

CONFIGS = {
    "awq": {"quant_method": "awq"},
    "bitsandbytes": {"quant_method": "bitsandbytes"},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "transformers": {"quant_method": "fp8"},
}
N_CASES = {"awq": 1, "bitsandbytes": 25, "compressed-tensors": 18, "modelopt": 2, "transformers": 4}

MINUS_ZERO = ("modelopt nvfp4", "bitsandbytes fp4")
"""Code 8 is -0: ModelOpt's table says 0, and bitsandbytes' kernels disagree among themselves."""


@pytest.fixture(scope="module")
def cases(oracle_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("libraries")
    script = Path(__file__).with_name("dequantize_quantized.py")
    run = subprocess.run([oracle_python, script, folder], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return folder


@pytest.mark.parametrize("library", CONFIGS)
def test_equals_the_library_bit_for_bit(library: str, cases: Path) -> None:
    paths = sorted(path for path in cases.glob(f"{library}*.safetensors") if ".expected." not in path.name)
    if not paths:
        pytest.skip(f"no case of {library}: it, or compressed-tensors for awq, is not in .venv-peers")
    assert len(paths) == N_CASES[library]
    for path in paths:
        config = dict(CONFIGS[library])
        if "block" in path.stem or "fp8" in path.stem:
            config["weight_block_size"] = [128, 128]
        stored = {tensor.name: tensor for tensor in read_safetensors_header(path)}
        table = dequantize_table(stored, {"quantization_config": config}, path.parent, [])
        assert list(table) == ["m.weight"], path.stem
        ours = table["m.weight"]
        [expected] = read_safetensors_header(path.with_name(f"{path.stem}.expected.safetensors"))
        assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape), path.stem
        n_rows = int(np.prod(ours.shape[:-1]))
        mine, theirs = ours.words(0, n_rows), expected.words(0, n_rows)
        assert np.array_equal(ours.words(n_rows // 3, n_rows - 1), mine[n_rows // 3 : -1]), path.stem
        if any(word in path.stem for word in MINUS_ZERO):
            magnitude = mine.dtype.type((1 << (8 * mine.itemsize - 1)) - 1)
            mine, theirs = (np.where(words & magnitude == 0, 0, words) for words in (mine, theirs))
        assert np.array_equal(mine, theirs), path.stem


def f32_tensors(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: read_at(path, tensor.offset, tensor.nbytes).view("<f4") for tensor in read_header(path).tensors
    }


def without_zero_0(bits: int, desc_act: bool = False) -> Scheme:
    """GPTQ's first format stores a zero of 0 as the highest code; its libraries read 0 again, llama.cpp 2^bits."""
    return Scheme(
        {"quant_method": "gptq", "bits": bits},
        lambda weight, rng: gptq(weight, rng, bits=bits, desc_act=desc_act, lowest_zero=1),
    )


WHOLE = {
    "fp8": SCHEMES["fp8 blocks, f32 scales"],
    "gptq": without_zero_0(4, desc_act=True),
    "gptq 8-bit": without_zero_0(8),
    "gptq_v2": SCHEMES["gptq_v2"],
}


@pytest.mark.parametrize("name", WHOLE)
def test_breaks_today_09_equals_llama_cpps_converter(name: str, tmp_path: Path, oracle_python: Path) -> None:
    """Whole checkpoints. llama.cpp leaves GPTQ's product in f32 where GPTQ's own library rounds it to F16."""
    quantized, _ = make_quantized_checkpoints(tmp_path, WHOLE[name])
    config = json.loads((quantized / "config.json").read_text())
    write(plan(open_model(quantized), open_recipe("f32")), tmp_path / "ours.gguf")
    script = Path(__file__).with_name("llama_convert.py")
    run = subprocess.run([oracle_python, script, quantized, tmp_path, "f32"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    ours, theirs = f32_tensors(tmp_path / "ours.gguf"), f32_tensors(tmp_path / "theirs-f32.gguf")
    assert ours.keys() == theirs.keys()
    n_rounded = 0
    for tensor, values in theirs.items():
        is_gptq = config["quantization_config"]["quant_method"] == "gptq" and values.size >= 256 * 64
        if is_gptq and "token_embd" not in tensor:
            values = values.astype(np.float16).astype(np.float32)
            n_rounded += 1
        if tensor.endswith("ssm_a"):
            np.testing.assert_array_max_ulp(ours[tensor], values, maxulp=1)
        else:
            assert np.array_equal(ours[tensor], values), tensor
    assert n_rounded == (0 if name == "fp8" else 25)

"""Every tensor byte and metadata key against llama.cpp's own converter, on the same checkpoints.

What may differ, and why, is written out below; docs/explain/against-llama-cpp.md tells it to users.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, text_config

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.files.reading import read_at
from pocketquant.gguf_file.reading import GgufHeader, read_header

INTERVAL = "qwen35.full_attention_interval"
OURS_ONLY = {"pocketquant.recipe", "pocketquant.version"}
ROPE = text_config()["rope_parameters"]
CASES: dict[str, dict[str, Any]] = {
    "one value head per key head": {"linear_num_value_heads": 2},
    "two value heads per key head": {},
    "four value heads per key head": {"linear_num_value_heads": 8},
    "untied": {"tie_word_embeddings": False},
    "three shards": {"n_shards": 3},
    "untied, two shards, four heads": {"tie_word_embeddings": False, "n_shards": 2, "linear_num_value_heads": 8},
    "f32 checkpoint": {"dtype": "F32"},
    "irregular layers": {"layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"]},
    "no layer_types": {"layer_types": None, "full_attention_interval": 4},
    "repetition penalty": {"generation": {"repetition_penalty": 1.05, "min_p": 0.1}},
    "yarn": {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
    "yarn, with everything": {
        "rope_parameters": {
            **ROPE,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "attention_factor": 0.9,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        }
    },
}


def convert_both(checkpoint: Path, kinds: Sequence[str], folder: Path, oracle_python: Path) -> list[tuple[Path, Path]]:
    """(ours, theirs) for each kind; one process of the peer makes all of its files, as starting it takes longest."""
    for kind in kinds:
        write(plan(open_model(checkpoint), open_recipe(kind)), folder / f"ours-{kind}.gguf")
    script = Path(__file__).with_name("llama_convert.py")
    run = subprocess.run([oracle_python, script, checkpoint, folder, *kinds], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return [(folder / f"ours-{kind}.gguf", folder / f"theirs-{kind}.gguf") for kind in kinds]


def different_tensors(ours: Path, theirs: Path) -> list[str]:
    """Names of the tensors of other bytes; the sets, shapes and types must be equal."""
    mine, others = ({tensor.name: tensor for tensor in read_header(path).tensors} for path in (ours, theirs))
    assert {name: (tensor.shape, tensor.format) for name, tensor in mine.items()} == {
        name: (tensor.shape, tensor.format) for name, tensor in others.items()
    }
    return [
        name
        for name, tensor in mine.items()
        if not np.array_equal(
            read_at(ours, tensor.offset, tensor.nbytes), read_at(theirs, others[name].offset, tensor.nbytes)
        )
    ]


def values(path: Path, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in read_header(path).tensors if tensor.name == name)
    return read_at(path, tensor.offset, tensor.nbytes).view("<f4")


def metadata_of(header: GgufHeader) -> dict[str, Any]:
    return {key: (value.kind, value.value) for key, value in header.metadata.items() if key not in OURS_ONLY}


@pytest.mark.parametrize("case", CASES)
def test_bytes_and_metadata_equal_the_peers(case: str, tmp_path: Path, oracle_python: Path) -> None:
    changes = dict(CASES[case])
    generation = changes.pop("generation", None)
    checkpoint = make_checkpoint(tmp_path / "Tiny-1M", **changes)
    if generation is not None:
        (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    for ours, theirs in convert_both(checkpoint, ["bf16", "f16", "f32"], tmp_path, oracle_python):
        for name in different_tensors(ours, theirs):
            # -exp(A_log): ours is rounded correctly, torch's maths library may be one unit in the last place off.
            assert name.endswith(".ssm_a"), name
            np.testing.assert_array_max_ulp(values(ours, name), values(theirs, name), maxulp=1)
        mine, others = metadata_of(read_header(ours)), metadata_of(read_header(theirs))
        if (
            case == "irregular layers"
        ):  # theirs is 4 wherever the config states none; runtimes without the list go by it
            assert (mine.pop(INTERVAL), others.pop(INTERVAL)) == (("u32", 2), ("u32", 4))
        assert mine == others


def test_f16_checkpoint_differs_only_where_the_peer_computes_in_half(tmp_path: Path, oracle_python: Path) -> None:
    """The peer adds 1 to an F16 norm, and takes exp of an F16 A_log, in half precision; we do it in f32."""
    checkpoint = make_checkpoint(tmp_path / "Tiny-1M", dtype="F16")
    [(ours, theirs)] = convert_both(checkpoint, ["f16"], tmp_path, oracle_python)
    different = different_tensors(ours, theirs)
    assert different
    for name in different:
        assert name.endswith(("norm.weight", ".ssm_a")), name
        assert not name.endswith("ssm_norm.weight"), name
        exact = values(ours, name)
        np.testing.assert_allclose(exact, values(theirs, name), rtol=2**-10)
        assert np.array_equal(exact.astype(np.float16).astype(np.float32), values(theirs, name)) or ".ssm_a" in name

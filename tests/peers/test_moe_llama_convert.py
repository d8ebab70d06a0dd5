"""Mixtures of experts: every tensor byte and metadata key against llama.cpp's own converter, in both layouts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, moe_config, one_by_one, weights_for
from test_llama_convert import convert_both, different_tensors, metadata_of, values

from pocketquant.gguf_file.reading import read_header

CASES: dict[str, dict[str, Any]] = {
    "two value heads per key head": {},
    "one value head per key head, tied": {"linear_num_value_heads": 2, "tie_word_embeddings": True},
    "five experts, odd widths": {
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 160,
    },
    "with intermediate_size, three shards": {"intermediate_size": 512, "n_shards": 3},
    "f32 checkpoint": {"dtype": "F32"},
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_and_metadata_equal_the_peers_in_both_layouts(case: str, tmp_path: Path, oracle_python: Path) -> None:
    changes = {"num_experts": 6, **CASES[case]}
    fused = weights_for(moe_config(**{key: changes[key] for key in changes.keys() - {"dtype", "n_shards"}}))
    digests = set()
    for layout, weights in (("fused", fused), ("one by one", one_by_one(fused))):
        folder = tmp_path / layout
        checkpoint = make_checkpoint(folder / "Tiny-MoE", weights=weights, **changes)
        pairs = convert_both(checkpoint, ["bf16", "f16", "f32"], folder, oracle_python)
        for ours, theirs in pairs:
            for name in different_tensors(ours, theirs):
                # -exp(A_log): ours is rounded correctly, torch's maths library may be one unit in the last place off.
                assert name.endswith(".ssm_a"), name
                np.testing.assert_array_max_ulp(values(ours, name), values(theirs, name), maxulp=1)
            assert metadata_of(read_header(ours)) == metadata_of(read_header(theirs))
        digests.add(tuple(hashlib.sha256(ours.read_bytes()).hexdigest() for ours, _ in pairs))
    assert len(digests) == 1, "the layouts give different files"

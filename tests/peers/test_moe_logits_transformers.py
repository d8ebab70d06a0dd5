"""The golden logits of the mixture of experts are what the installed transformers computes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
from moe_checkpoint import golden_checkpoint, golden_ids

GOLDEN = Path(__file__).parents[1] / "golden/moe_logits.npz"


def test_golden_is_what_transformers_computes(tmp_path: Path, oracle_python: Path) -> None:
    checkpoint = golden_checkpoint(tmp_path / "Tiny-MoE")
    np.save(tmp_path / "ids.npy", golden_ids())
    script = Path(__file__).with_name("transformers_logits.py")
    command = [oracle_python, script, checkpoint, tmp_path / "ids.npy", tmp_path / "out.npz"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    computed, golden = np.load(tmp_path / "out.npz"), np.load(GOLDEN)
    assert np.array_equal(computed["tokens"], golden["tokens"])
    assert golden["tokens"].all(), "an expert that no token reaches is not tested"
    np.testing.assert_allclose(computed["logits"], golden["logits"], atol=1e-4)

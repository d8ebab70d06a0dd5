"""Evaluation with 248,320 tokens of vocabulary in memory that the context does not move.

The model is narrow, so nearly all of it is logits: one window of 1,024 tokens would have 1 GB of them for each side.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_maker import make_checkpoint
from test_memory import anonymous_bytes

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.demo import text_path

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
LIMIT_BYTES = 700e6
N_VOCAB = 248_320


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_logits_of_a_large_vocabulary_are_folded_a_few_rows_at_a_time(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(
        tmp_path / "Wide",
        vocab_size=N_VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        rope_parameters={
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000.0,
            "rope_type": "default",
        },
    )
    files = [tmp_path / f"{recipe}.gguf" for recipe in ("q8_0", "f32")]
    for file in files:
        write(plan(open_model(checkpoint), open_recipe(file.stem)), file)
    command = [Path(sys.executable).with_name("pocketquant"), "eval", files[0], "--reference", files[1], "--positions"]
    command += ["--text", text_path("evaluation"), "--context", "1024", "--chunks", "1", "--threads", "2"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    assert process.returncode == 0
    assert process.stdout is not None
    assert "| 512 to 1022 | 511 |" in process.stdout.read()
    assert 1024 * 4 * N_VOCAB > 1e9 > LIMIT_BYTES > peak > 1e8

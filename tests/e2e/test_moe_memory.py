"""A mixture of experts of real widths in bounded memory, through the command line.

Four blocks instead of forty and 32 experts instead of 256: a fused tensor is still 268 MB as stored and 537 MB as f32,
and memory must not depend on it. The checkpoint is a hole in a sparse file.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_maker import make_sparse_checkpoint, moe_config
from test_memory import anonymous_bytes

from pocketquant.gguf_file.reading import read_header

LIMIT_BYTES = 250e6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_breaks_today_10_moe_memory_is_a_few_chunks_whatever_the_experts_weigh(tmp_path: Path) -> None:
    config = moe_config(
        hidden_size=2048,
        num_attention_heads=16,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=32,
        num_experts_per_tok=8,
        moe_intermediate_size=1024,
    )
    folder = make_sparse_checkpoint(tmp_path / "c", config, prefix="model.")
    command = [Path(sys.executable).with_name("pocketquant"), "quantize", folder, "--recipe", "q4_k_m"]
    process = subprocess.Popen([*map(str, command), "--out", str(tmp_path / "out.gguf"), "--quiet"])
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    print(f"peak of anonymous memory: {peak / 1e6:.0f} MB")
    assert process.returncode == 0
    shapes = {tensor.name: tensor.shape for tensor in read_header(tmp_path / "out.gguf").tensors}
    assert shapes["blk.0.ffn_gate_exps.weight"] == (32, 1024, 2048)
    assert shapes["blk.3.ffn_down_exps.weight"] == (32, 2048, 1024)
    assert 2e7 < peak < LIMIT_BYTES

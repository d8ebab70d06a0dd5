"""One-pass quantization of the 4B and the 9B model's widths in bounded memory.

Four blocks instead of thirty-two, since memory depends on the widest tensors (the embedding of 248,320 x 4,096 is one
of them) and not on how many there are. The checkpoint is a hole in a sparse file.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_maker import make_sparse_checkpoint, text_config

LIMIT_BYTES = 600e6


WIDTHS = {
    "4B": {"hidden_size": 2560, "intermediate_size": 9216, "tie_word_embeddings": True},
    "9B": {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}


def config_of(size: str, n_layer: int) -> dict[str, object]:
    return text_config(
        **WIDTHS[size],
        num_hidden_layers=n_layer,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        layer_types=None,
        vocab_size=248320,
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("size", "recipe", "file_bytes"),
    [pytest.param("4B", "q4_k_m", 6e8, marks=pytest.mark.slow), ("9B", "q8_0", 3e9)],
)
def test_anonymous_memory_stays_under_600_mb(size: str, recipe: str, file_bytes: float, tmp_path: Path) -> None:
    folder = make_sparse_checkpoint(tmp_path / "c", config_of(size, 4), prefix="model.")
    command = [Path(sys.executable).with_name("pocketquant"), "quantize", folder, "--recipe", recipe]
    process = subprocess.Popen([*map(str, command), "--out", str(tmp_path / "out.gguf"), "--quiet"])
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    print(f"peak of anonymous memory: {peak / 1e6:.0f} MB")
    assert process.returncode == 0
    assert (tmp_path / "out.gguf").stat().st_size > file_bytes
    (tmp_path / "out.gguf").unlink()
    assert 2e7 < peak < LIMIT_BYTES


def anonymous_bytes(pid: int) -> int:
    """Of the process and of its children, which do a command's work."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
    return own + sum(anonymous_bytes(int(child)) for child in children)

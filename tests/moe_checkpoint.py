"""The mixture-of-experts checkpoint of the golden logits: numbers that depend on a tensor's name only.

So a change of the order in which tensors are made changes no number, and the golden stays what it is.
"""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import numpy as np
from checkpoint_maker import make_checkpoint, moe_config, source_shapes

N_TOKENS = 64


def golden_weights() -> dict[str, np.ndarray]:
    """Checkpoint name -> f32 array; distinct for every head and expert, two value heads per key head."""
    weights = {}
    for name, (_, shape) in source_shapes(moe_config(), "model.").items():
        rng = np.random.default_rng(crc32(name.encode()))
        if name.endswith("A_log"):
            weights[name] = rng.uniform(0.0, 2.0, shape).astype(np.float32)
        elif len(shape) == 1:
            weights[name] = rng.normal(0.0, 0.1, shape).astype(np.float32)
        else:
            weights[name] = rng.normal(0.0, shape[-1] ** -0.5, shape).astype(np.float32)
    return weights


def golden_checkpoint(folder: Path) -> Path:
    """Writes it, in BF16 and with fused experts."""
    return make_checkpoint(folder, weights=golden_weights(), num_experts=moe_config()["num_experts"])


def golden_ids() -> np.ndarray:
    """i64[64] token ids."""
    return np.random.default_rng(35).integers(0, 256, N_TOKENS)

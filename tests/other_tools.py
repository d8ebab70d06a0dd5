"""Does to a GGUF what other tools do: tensors fused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf_maker import Parts

Change = Callable[[Parts], object]


def fuse(target: str, names: tuple[str, ...], axis: int) -> Change:
    """Puts the tensors of every block that has them one below the other."""

    def change(parts: Parts) -> None:
        for name in [name for name in parts.tensors if name.endswith(f".{names[0]}")]:
            block = name.removesuffix(names[0])
            values = [parts.tensors.pop(block + part) for part in names]
            parts.tensors[block + target] = (np.concatenate([each for each, _ in values], axis), values[0][1])

    return change


QKV = fuse("attn_qkv.weight", ("attn_q.weight", "attn_k.weight", "attn_v.weight"), 0)
GATE_UP = fuse("ffn_gate_up_exps.weight", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), 1)

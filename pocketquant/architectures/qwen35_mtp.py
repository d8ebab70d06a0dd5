"""Qwen3.5's multi-token-prediction (MTP) block: the rows that it has beside those of a full-attention block.

The block stands behind the last one of the trunk. It joins the embedding of the next token with the trunk's last hidden
state (`fc` over the two norms), runs one full-attention block, and predicts through the trunk's own output head; its
attention and feed-forward tensors are the architecture's usual rows. One block is all that the runtimes can use.

Sources: llama.cpp `conversion/qwen.py` (names), `src/models/qwen35.cpp` and `src/models/qwen35moe.cpp` (what the
runtime loads), b10359.
"""

from __future__ import annotations

from pocketquant.architectures.hybrid import plus_one
from pocketquant.architectures.table import MTP, TensorRule
from pocketquant.model import Role

MTP_LEAST = "Q5_K"
"""The format of fewest bits that the block gets: no importance matrix has entries for it."""

MTP_TENSORS = (
    TensorRule(MTP, "fc.weight", "nextn.eh_proj.weight", Role.MTP_JOIN, "n_embd mtp_dim"),
    TensorRule(
        MTP,
        "pre_fc_norm_embedding.weight",
        "nextn.enorm.weight",
        Role.NORM,
        "n_embd",
        each=plus_one,
        keep_f32=True,
    ),
    TensorRule(
        MTP, "pre_fc_norm_hidden.weight", "nextn.hnorm.weight", Role.NORM, "n_embd", each=plus_one, keep_f32=True
    ),
    TensorRule(MTP, "norm.weight", "nextn.shared_head_norm.weight", Role.NORM, "n_embd", each=plus_one, keep_f32=True),
)

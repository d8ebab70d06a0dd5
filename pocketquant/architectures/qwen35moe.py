"""Qwen3.5 and Qwen3.6, mixture of experts: the hybrid trunk with routed experts and one shared expert in every block.

Sources: transformers `models/qwen3_5_moe` and llama.cpp `conversion/qwen.py`, `src/models/qwen35moe.cpp` (b10359). A
checkpoint keeps a block's experts fused, gate and up projection one below the other in one tensor
(`gate_up_proj` [n_expert, 2 n_ff_exp, n_embd]), or in three tensors for every expert; both give the same GGUF. Routers
stay F32 there: they are small, and a rounded one sends tokens to other experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pocketquant.architectures import hybrid, hybrid_gguf
from pocketquant.architectures.qwen35_mtp import MTP_TENSORS
from pocketquant.architectures.table import (
    BLOCK,
    Architecture,
    MetadataRule,
    Sizes,
    TensorRule,
    TransformersModel,
)
from pocketquant.errors import ArchitectureError
from pocketquant.model import Role, Value

_FEED_FORWARD = (
    TensorRule(BLOCK, "mlp.gate.weight", "ffn_gate_inp.weight", Role.ROUTER, "n_expert n_embd", keep_f32=True),
    TensorRule(
        BLOCK,
        "mlp.experts.gate_up_proj",
        "ffn_gate_exps.weight",
        Role.EXPERT_GATE,
        "n_expert 2*n_ff_exp n_embd",
        half=0,
        one_by_one="mlp.experts.*.gate_proj.weight",
    ),
    TensorRule(
        BLOCK,
        "mlp.experts.gate_up_proj",
        "ffn_up_exps.weight",
        Role.EXPERT_UP,
        "n_expert 2*n_ff_exp n_embd",
        half=1,
        one_by_one="mlp.experts.*.up_proj.weight",
    ),
    TensorRule(
        BLOCK,
        "mlp.experts.down_proj",
        "ffn_down_exps.weight",
        Role.EXPERT_DOWN,
        "n_expert n_embd n_ff_exp",
        one_by_one="mlp.experts.*.down_proj.weight",
    ),
    TensorRule(
        BLOCK,
        "mlp.shared_expert_gate.weight",
        "ffn_gate_inp_shexp.weight",
        Role.SHARED_ROUTER,
        "n_shared n_embd",
        keep_f32=True,
    ),
    TensorRule(
        BLOCK, "mlp.shared_expert.gate_proj.weight", "ffn_gate_shexp.weight", Role.SHARED_GATE, "n_ff_shared n_embd"
    ),
    TensorRule(BLOCK, "mlp.shared_expert.up_proj.weight", "ffn_up_shexp.weight", Role.SHARED_UP, "n_ff_shared n_embd"),
    TensorRule(
        BLOCK, "mlp.shared_expert.down_proj.weight", "ffn_down_shexp.weight", Role.SHARED_DOWN, "n_embd n_ff_shared"
    ),
)


_FROM_CONFIG = {
    "n_expert": "num_experts",
    "n_expert_used": "num_experts_per_tok",
    "n_ff_exp": "moe_intermediate_size",
    "n_ff_shared": "shared_expert_intermediate_size",
}
_N_SHARED = 1
"""Shared experts of a block; the gate of the shared one keeps its single row in GGUF, as in llama.cpp's converter."""


def read_sizes(config: Mapping[str, Any]) -> Sizes:
    """Text config -> the number of every dimension word.

    Raises:
        ArchitectureError: as `hybrid.read_sizes`, or more experts in use than there are.
    """
    sizes = hybrid.read_sizes(config, _FROM_CONFIG)
    if sizes["n_expert_used"] > sizes["n_expert"]:
        raise ArchitectureError(
            f"config.json: num_experts_per_tok {sizes['n_expert_used']} is more than num_experts {sizes['n_expert']}"
        )
    return {**sizes, "n_shared": _N_SHARED}


def sizes_from_gguf(metadata: Mapping[str, Value]) -> Sizes:
    """The same sizes from a GGUF's metadata, without `n_vocab` if the file carries no tokens."""
    sizes = hybrid_gguf.sizes_from_gguf(
        metadata,
        "qwen35moe",
        {
            "n_expert": "expert_count",
            "n_expert_used": "expert_used_count",
            "n_ff_exp": "expert_feed_forward_length",
            "n_ff_shared": "expert_shared_feed_forward_length",
        },
    )
    return {**sizes, "n_shared": _N_SHARED}


_METADATA = (
    MetadataRule("expert_count", "u32", lambda config, sizes: sizes["n_expert"], needed=True),
    MetadataRule("expert_used_count", "u32", lambda config, sizes: sizes["n_expert_used"], needed=True),
    MetadataRule("expert_feed_forward_length", "u32", lambda config, sizes: sizes["n_ff_exp"], needed=True),
    MetadataRule("expert_shared_feed_forward_length", "u32", lambda config, sizes: sizes["n_ff_shared"], needed=True),
)

QWEN35MOE = Architecture(
    name="qwen35moe",
    classes=("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
    tensors=hybrid.HYBRID_TENSORS + _FEED_FORWARD + MTP_TENSORS,
    metadata=hybrid.HYBRID_METADATA + _METADATA,
    read_sizes=read_sizes,
    layer_kinds=hybrid.layer_kinds,
    sizes_from_gguf=sizes_from_gguf,
    kinds_from_gguf=partial(hybrid_gguf.kinds_from_gguf, name="qwen35moe"),
    dropped=hybrid.DROPPED,
    config_keys={**hybrid.FROM_CONFIG, **_FROM_CONFIG},
    pre_tokenizers=hybrid.PRE_TOKENIZERS,
    find_problems=partial(hybrid_gguf.find_problems, name="qwen35moe"),
    complete=partial(hybrid_gguf.complete_sections, name="qwen35moe"),
    trial_config={
        **hybrid.TRIAL_CONFIG,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
    },
    transformers=TransformersModel("qwen3_5_moe", "Qwen3_5Moe", hybrid_gguf.transformers_config),
)

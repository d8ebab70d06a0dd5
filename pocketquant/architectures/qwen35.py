"""Qwen3.5 and Qwen3.6, dense text model: Gated DeltaNet and full attention, three blocks to one.

Sources: transformers `models/qwen3_5` and llama.cpp `conversion/qwen.py`, `src/models/qwen35.cpp`; what it shares with
the mixture of experts, and the order of DeltaNet's heads, is in `hybrid`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from pocketquant.architectures import hybrid, hybrid_gguf
from pocketquant.architectures.qwen35_mtp import MTP_TENSORS
from pocketquant.architectures.table import BLOCK, Architecture, Sizes, TensorRule, TransformersModel
from pocketquant.model import Role, Value

_FEED_FORWARD = (
    TensorRule(BLOCK, "mlp.gate_proj.weight", "ffn_gate.weight", Role.FFN_GATE, "n_ff n_embd"),
    TensorRule(BLOCK, "mlp.up_proj.weight", "ffn_up.weight", Role.FFN_UP, "n_ff n_embd"),
    TensorRule(BLOCK, "mlp.down_proj.weight", "ffn_down.weight", Role.FFN_DOWN, "n_embd n_ff"),
)


_FROM_CONFIG = {"n_ff": "intermediate_size"}


def read_sizes(config: Mapping[str, Any]) -> Sizes:
    """Text config -> the number of every dimension word; ArchitectureError as `hybrid.read_sizes`."""
    return hybrid.read_sizes(config, _FROM_CONFIG)


def sizes_from_gguf(metadata: Mapping[str, Value]) -> Sizes:
    """The same sizes from a GGUF's metadata, without `n_vocab` if the file carries no tokens."""
    return hybrid_gguf.sizes_from_gguf(metadata, "qwen35", {"n_ff": "feed_forward_length"})


QWEN35 = Architecture(
    name="qwen35",
    classes=("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
    tensors=hybrid.HYBRID_TENSORS + _FEED_FORWARD + MTP_TENSORS,
    metadata=tuple(
        replace(rule, needed=True) if rule.key == "feed_forward_length" else rule for rule in hybrid.HYBRID_METADATA
    ),
    read_sizes=read_sizes,
    layer_kinds=hybrid.layer_kinds,
    sizes_from_gguf=sizes_from_gguf,
    kinds_from_gguf=partial(hybrid_gguf.kinds_from_gguf, name="qwen35"),
    dropped=hybrid.DROPPED,
    config_keys={**hybrid.FROM_CONFIG, **_FROM_CONFIG},
    pre_tokenizers=hybrid.PRE_TOKENIZERS,
    find_problems=partial(hybrid_gguf.find_problems, name="qwen35"),
    complete=partial(hybrid_gguf.complete_sections, name="qwen35"),
    trial_config=hybrid.TRIAL_CONFIG,
    transformers=TransformersModel("qwen3_5", "Qwen3_5", hybrid_gguf.transformers_config),
)

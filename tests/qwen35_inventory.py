"""Qwen3.5 models made of shapes: every tensor of the text family, from its dimensions, with random rows."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from pocketquant.formats import F32Array
from pocketquant.model import Model, Role, Tensor, Value


@dataclass(frozen=True)
class RandomRows:
    """Normal numbers that depend only on the tensor's name and the row."""

    name: str
    n_cols: int

    def rows(self, start: int, stop: int) -> F32Array:
        seeds = (np.random.default_rng([crc32(self.name.encode()), row]) for row in range(start, stop))
        return np.stack([seed.standard_normal(self.n_cols, dtype=np.float32) for seed in seeds]) * np.float32(0.02)

    def stored(self, start: int, stop: int) -> None:
        return None


@dataclass(frozen=True)
class Dimensions:
    """What decides the inventory; the defaults are small and fit every block length."""

    n_layer: int = 4
    n_embd: int = 256
    n_ff: int = 512
    n_head: int = 4
    n_kv: int = 2
    head_dim: int = 64
    n_k: int = 2
    n_v: int = 4
    head_v_dim: int = 64
    n_vocab: int = 64
    tied: bool = True
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_exp: int = 0
    n_ff_shared: int = 0


QWEN35_08B = Dimensions(24, 1024, 3584, 8, 2, 256, 16, 16, 128, 248320, True)
QWEN35_4B = Dimensions(32, 2560, 9216, 16, 4, 256, 16, 32, 128, 248320, True)
QWEN35_9B = Dimensions(32, 4096, 12288, 16, 4, 256, 16, 32, 128, 248320, False)
QWEN35_35B_A3B = Dimensions(40, 2048, 0, 16, 2, 256, 16, 32, 128, 248320, False, 256, 8, 512, 512)


def build_model(d: Dimensions, dtype: str = "F32") -> Model:
    """A `Model` with the names, roles and shapes that a Qwen3.5 GGUF of these dimensions has."""
    v_dim = d.n_v * d.head_v_dim
    conv_dim = 2 * d.n_k * d.head_v_dim + v_dim
    tensors = [_weight("token_embd.weight", Role.EMBED, None, (d.n_vocab, d.n_embd), dtype)]
    if not d.tied:
        tensors.append(_weight("output.weight", Role.HEAD, None, (d.n_vocab, d.n_embd), dtype))
    tensors.append(_kept("output_norm.weight", Role.NORM, None, (d.n_embd,)))
    for i in range(d.n_layer):
        tensors.append(_kept(f"blk.{i}.attn_norm.weight", Role.NORM, i, (d.n_embd,)))
        tensors.append(_kept(f"blk.{i}.post_attention_norm.weight", Role.NORM, i, (d.n_embd,)))
        if i % 4 == 3:
            tensors += [
                _weight(f"blk.{i}.attn_q.weight", Role.ATTN_Q, i, (2 * d.n_head * d.head_dim, d.n_embd), dtype),
                _weight(f"blk.{i}.attn_k.weight", Role.ATTN_K, i, (d.n_kv * d.head_dim, d.n_embd), dtype),
                _weight(f"blk.{i}.attn_v.weight", Role.ATTN_V, i, (d.n_kv * d.head_dim, d.n_embd), dtype),
                _weight(f"blk.{i}.attn_output.weight", Role.ATTN_OUT, i, (d.n_embd, d.n_head * d.head_dim), dtype),
                _kept(f"blk.{i}.attn_q_norm.weight", Role.NORM, i, (d.head_dim,)),
                _kept(f"blk.{i}.attn_k_norm.weight", Role.NORM, i, (d.head_dim,)),
            ]
        else:
            tensors += [
                _weight(f"blk.{i}.attn_qkv.weight", Role.DELTA_QKV, i, (conv_dim, d.n_embd), dtype),
                _weight(f"blk.{i}.attn_gate.weight", Role.DELTA_GATE, i, (v_dim, d.n_embd), dtype),
                _weight(f"blk.{i}.ssm_alpha.weight", Role.DELTA_ALPHA, i, (d.n_v, d.n_embd), dtype),
                _weight(f"blk.{i}.ssm_beta.weight", Role.DELTA_BETA, i, (d.n_v, d.n_embd), dtype),
                _weight(f"blk.{i}.ssm_out.weight", Role.DELTA_OUT, i, (d.n_embd, v_dim), dtype),
                _kept(f"blk.{i}.ssm_a", Role.DELTA_DECAY, i, (d.n_v,)),
                _kept(f"blk.{i}.ssm_dt.bias", Role.DELTA_DT, i, (d.n_v,)),
                _kept(f"blk.{i}.ssm_conv1d.weight", Role.DELTA_CONV, i, (conv_dim, 4)),
                _kept(f"blk.{i}.ssm_norm.weight", Role.NORM, i, (d.head_v_dim,)),
            ]
        tensors += _experts(d, i, dtype) if d.n_expert else _feed_forward(d, i, dtype)
    sizes = {"n_layer": d.n_layer, "n_embd": d.n_embd, "n_ff": d.n_ff, "n_head": d.n_head, "n_kv": d.n_kv}
    sizes["n_expert"] = d.n_expert
    return Model("qwen35moe" if d.n_expert else "qwen35", _metadata(d, v_dim), tuple(tensors), sizes)


def _feed_forward(d: Dimensions, i: int, dtype: str) -> list[Tensor]:
    return [
        _weight(f"blk.{i}.ffn_gate.weight", Role.FFN_GATE, i, (d.n_ff, d.n_embd), dtype),
        _weight(f"blk.{i}.ffn_up.weight", Role.FFN_UP, i, (d.n_ff, d.n_embd), dtype),
        _weight(f"blk.{i}.ffn_down.weight", Role.FFN_DOWN, i, (d.n_embd, d.n_ff), dtype),
    ]


def _experts(d: Dimensions, i: int, dtype: str) -> list[Tensor]:
    wide, narrow = (d.n_expert, d.n_ff_exp, d.n_embd), (d.n_expert, d.n_embd, d.n_ff_exp)
    return [
        _kept(f"blk.{i}.ffn_gate_inp.weight", Role.ROUTER, i, (d.n_expert, d.n_embd)),
        _weight(f"blk.{i}.ffn_gate_exps.weight", Role.EXPERT_GATE, i, wide, dtype),
        _weight(f"blk.{i}.ffn_up_exps.weight", Role.EXPERT_UP, i, wide, dtype),
        _weight(f"blk.{i}.ffn_down_exps.weight", Role.EXPERT_DOWN, i, narrow, dtype),
        _kept(f"blk.{i}.ffn_gate_inp_shexp.weight", Role.SHARED_ROUTER, i, (1, d.n_embd)),
        _weight(f"blk.{i}.ffn_gate_shexp.weight", Role.SHARED_GATE, i, (d.n_ff_shared, d.n_embd), dtype),
        _weight(f"blk.{i}.ffn_up_shexp.weight", Role.SHARED_UP, i, (d.n_ff_shared, d.n_embd), dtype),
        _weight(f"blk.{i}.ffn_down_shexp.weight", Role.SHARED_DOWN, i, (d.n_embd, d.n_ff_shared), dtype),
    ]


def _weight(name: str, role: Role, layer: int | None, shape: tuple[int, ...], dtype: str) -> Tensor:
    return Tensor(name, role, layer, shape, dtype, RandomRows(name, shape[-1]))


def _kept(name: str, role: Role, layer: int | None, shape: tuple[int, ...]) -> Tensor:
    return Tensor(name, role, layer, shape, "F32", RandomRows(name, shape[-1]), keep_f32=True)


def _metadata(d: Dimensions, v_dim: int) -> dict[str, Value]:
    numbers = {
        "block_count": d.n_layer,
        "context_length": 4096,
        "embedding_length": d.n_embd,
        "feed_forward_length": d.n_ff,
        "attention.head_count": d.n_head,
        "attention.head_count_kv": d.n_kv,
        "attention.key_length": d.head_dim,
        "attention.value_length": d.head_dim,
        "rope.dimension_count": d.head_dim // 4,
        "ssm.conv_kernel": 4,
        "ssm.state_size": d.head_v_dim,
        "ssm.group_count": d.n_k,
        "ssm.time_step_rank": d.n_v,
        "ssm.inner_size": v_dim,
        "full_attention_interval": 4,
    }
    if d.n_expert:
        del numbers["feed_forward_length"]
        numbers |= {
            "expert_count": d.n_expert,
            "expert_used_count": d.n_expert_used,
            "expert_feed_forward_length": d.n_ff_exp,
            "expert_shared_feed_forward_length": d.n_ff_shared,
        }
    name = "qwen35moe" if d.n_expert else "qwen35"
    return {
        "general.architecture": Value("str", name),
        **{f"{name}.{key}": Value("u32", number) for key, number in numbers.items()},
        f"{name}.attention.layer_norm_rms_epsilon": Value("f32", 1e-6),
        f"{name}.rope.freq_base": Value("f32", 1e7),
        f"{name}.rope.dimension_sections": Value("i32[]", [3, 3, 2, 0]),
    }

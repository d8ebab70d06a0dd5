"""transformers' decoder layers with an opened model's weights, one at a time; what gradients are computed by.

The weights come out of the opened model, put back into the order and form of a checkpoint, so that every source that
can be quantized can be differentiated. One layer is in memory at a time, whatever the size of the model.

Source: transformers' `models/qwen3_5` (5.23).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocketquant.architectures import architecture_named
from pocketquant.architectures.hybrid import minus_exp, plus_one
from pocketquant.architectures.table import ATTENTION, BLOCK, DELTA, TensorRule
from pocketquant.errors import ArchitectureError, EvalError
from pocketquant.files import usable_threads
from pocketquant.formats import F32Array
from pocketquant.model import Model, Role, Tensor

_ROWS = 1 << 14


@dataclass(frozen=True)
class Setting:
    """A model and what computes it."""

    torch: Any
    modeling: Any
    config: Any
    model: Model
    device: str
    rules: tuple[TensorRule, ...]


def require_torch() -> tuple[Any, Any]:
    """torch and transformers' Qwen3.5; EvalError where one of them is not installed."""
    try:
        import torch
        import transformers.models.qwen3_5.modeling_qwen3_5 as modeling
    except ImportError as error:
        raise EvalError(
            f"gradients need torch and transformers, which cannot be imported here ({error}); "
            "pip install 'pocketquant[curvature]', or calibrate without gradients"
        ) from error
    return torch, modeling


def set_up(model: Model, device: str, threads: int | None) -> Setting:
    """Reads a model's sizes into transformers' configuration.

    Raises:
        EvalError: torch or transformers is absent.
        ArchitectureError: a mixture of experts, or a model whose positions are scaled.
    """
    if model.architecture != "qwen35":
        raise ArchitectureError(
            f"{model.architecture}: gradients are known of the dense model only; calibrate without gradients"
        )
    torch, modeling = require_torch()
    torch.set_num_threads(threads or usable_threads())
    keys = {key.split(".", 1)[1]: value.value for key, value in model.metadata.items() if key.startswith("qwen35.")}
    if "rope.scaling.type" in keys:
        raise ArchitectureError(f"positions scaled by {keys['rope.scaling.type']}: calibrate without gradients")
    sizes = model.sizes
    roles = {(tensor.layer, tensor.role) for tensor in model.tensors}
    n_layer, sections = sizes["n_layer"], list(keys.get("rope.dimension_sections", (11, 11, 10, 0)))[:3]
    config = modeling.Qwen3_5TextConfig(
        vocab_size=sizes["n_vocab"],
        hidden_size=sizes["n_embd"],
        intermediate_size=sizes["n_ff"],
        num_hidden_layers=n_layer,
        num_attention_heads=sizes["n_head"],
        num_key_value_heads=sizes["n_kv"],
        head_dim=sizes["head_dim"],
        linear_num_key_heads=sizes["n_k"],
        linear_num_value_heads=sizes["n_v"],
        linear_key_head_dim=sizes["head_k_dim"],
        linear_value_head_dim=sizes["head_v_dim"],
        linear_conv_kernel_dim=sizes["n_conv"],
        layer_types=[
            "linear_attention" if (layer, Role.DELTA_QKV) in roles else "full_attention" for layer in range(n_layer)
        ],
        rms_norm_eps=float(keys["attention.layer_norm_rms_epsilon"]),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(keys["rope.freq_base"]),
            "partial_rotary_factor": keys["rope.dimension_count"] / sizes["head_dim"],
            "mrope_interleaved": True,
            "mrope_section": sections,
        },
    )
    config._attn_implementation = "sdpa"
    rules = tuple(
        rule for rule in architecture_named(model.architecture).tensors if rule.where in (BLOCK, DELTA, ATTENTION)
    )
    return Setting(torch, modeling, config, model, device, rules)


def tensors_of(setting: Setting, layer: int) -> list[tuple[TensorRule, Tensor]]:
    """Rules and tensors of a layer."""
    tensors = {tensor.name: tensor for tensor in setting.model.tensors if tensor.layer == layer}
    pairs = [(rule, tensors.get(f"blk.{layer}.{rule.target}")) for rule in setting.rules]
    return [(rule, tensor) for rule, tensor in pairs if tensor is not None]


def linears_of(setting: Setting, layer: int) -> list[tuple[TensorRule, Tensor]]:
    """Those of them that are multiplied."""
    return [(rule, tensor) for rule, tensor in tensors_of(setting, layer) if not tensor.keep_f32]


def read_whole(tensor: Tensor) -> F32Array:
    """A whole tensor, f32[n_rows, n_cols], in GGUF's order."""
    starts = range(0, tensor.n_rows, _ROWS)
    return np.concatenate([tensor.rows(start, min(start + _ROWS, tensor.n_rows)) for start in starts])


def source_weights(rule: TensorRule, tensor: Tensor, setting: Setting, values: F32Array) -> F32Array:
    """A tensor's values as the checkpoint has them: `each` undone, rows and columns where they came from."""
    if rule.each is plus_one:
        values = values - np.float32(1)
    elif rule.each is minus_exp:
        values = np.log(-values.astype(np.float64)).astype(np.float32)
    elif rule.each is not None:
        raise ArchitectureError(f"{tensor.name}: its transform {rule.each.__name__} is not known backwards")
    source = np.empty_like(values)
    source[_places(rule, tensor, setting)] = values
    return source


def gguf_weights(rule: TensorRule, tensor: Tensor, setting: Setting, source: F32Array) -> F32Array:
    """Numbers of a checkpoint's matrix, such as its gradients, in GGUF's order of rows and columns."""
    return source.reshape(tensor.n_rows, tensor.n_cols)[_places(rule, tensor, setting)]


def _places(rule: TensorRule, tensor: Tensor, setting: Setting) -> Any:
    rows = None if rule.rows is None else rule.rows(setting.model.sizes)
    cols = None if rule.cols is None else rule.cols(setting.model.sizes)
    if len(tensor.shape) == 1:
        rows, cols = None, rows
    shape = (tensor.n_rows, tensor.n_cols)
    return np.ix_(*(np.arange(n) if o is None else o for o, n in zip((rows, cols), shape, strict=True)))


def build_layer(setting: Setting, layer: int, read: Callable[[Tensor], F32Array] = read_whole) -> Any:
    """transformers' decoder layer in f32; `read` gives each tensor's values f32[n_rows, n_cols] in GGUF's order."""
    torch = setting.torch
    with torch.device("meta"):
        module = setting.modeling.Qwen3_5DecoderLayer(setting.config, layer)
    shapes = {name: parameter.shape for name, parameter in module.state_dict().items()}
    weights = {
        rule.source: torch.from_numpy(source_weights(rule, tensor, setting, read(tensor))).reshape(shapes[rule.source])
        for rule, tensor in tensors_of(setting, layer)
    }
    module.load_state_dict(weights, strict=True, assign=True)
    return module.to(setting.device).requires_grad_(False).eval()


def positions_of(setting: Setting, context: int) -> Any:
    """Cosines and sines of a window's positions."""
    torch = setting.torch
    rotary = setting.modeling.Qwen3_5TextRotaryEmbedding(setting.config).to(setting.device)
    numbers = torch.arange(context, device=setting.device).view(1, 1, -1).expand(3, 1, -1)
    return rotary(torch.zeros(1, context, 1, device=setting.device), numbers)


def build_norm(setting: Setting) -> Any:
    """The norm before the output head."""
    tensor = next(tensor for tensor in setting.model.tensors if tensor.role is Role.NORM and tensor.layer is None)
    norm = setting.modeling.Qwen3_5RMSNorm(setting.model.sizes["n_embd"], eps=setting.config.rms_norm_eps)
    norm.weight.data = setting.torch.from_numpy(read_whole(tensor)[0] - np.float32(1))
    return norm.to(setting.device).requires_grad_(False)

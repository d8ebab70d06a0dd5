"""transformers' decoder layers with the weights of an opened model, for gradients.

The weights come from the opened model and are put back into the order and form of a checkpoint. So gradients can be
computed for every source that can be quantized. One layer is in memory at a time, whatever the size of the model.

Source: transformers' `models/qwen3_5` and `models/qwen3_5_moe` (5.23).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pocketquant.architectures import ARCHITECTURES, architecture_named
from pocketquant.architectures.table import ATTENTION, BLOCK, DELTA, TensorRule
from pocketquant.errors import ArchitectureError, EvalError
from pocketquant.extras import install_command
from pocketquant.formats import F32Array
from pocketquant.machine import usable_threads
from pocketquant.model import Model, Role, Tensor

_ROWS = 1 << 14

_OF_EXPERTS = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)


@dataclass(frozen=True)
class Setting:
    """A model, and torch to compute it; `part("DecoderLayer")` is transformers' class of that name for this model."""

    torch: Any
    part: Callable[[str], Any]
    config: Any
    model: Model
    device: str
    rules: tuple[TensorRule, ...]


def require_torch() -> tuple[Any, dict[str, Any]]:
    """torch, and architecture -> transformers' module of it; EvalError where one of them is not installed."""
    found = {item.name: item.transformers.module for item in ARCHITECTURES if item.transformers is not None}
    try:
        import torch

        modeling = {
            name: importlib.import_module(f"transformers.models.{module}.modeling_{module}")
            for name, module in found.items()
        }
    except ImportError as error:
        raise EvalError(
            f"`tune` and `calibrate --curvature` need torch and transformers, which cannot be imported here ({error}); "
            f"{install_command('curvature')}"
        ) from error
    return torch, modeling


def set_up(model: Model, device: str, threads: int | None) -> Setting:
    """Reads a model's sizes into transformers' configuration.

    Raises:
        EvalError: torch or transformers is absent.
        ArchitectureError: no text model, or one whose positions are scaled.
    """
    architecture = architecture_named(model.architecture)
    counterpart = architecture.transformers
    if counterpart is None:
        raise ArchitectureError(
            f"{model.architecture}: gradients are computed for text models only; leave out --curvature"
        )
    torch, modeling = require_torch()

    def part(name: str) -> Any:
        return getattr(modeling[architecture.name], counterpart.classes + name)

    torch.set_num_threads(threads or usable_threads())
    start = f"{model.architecture}."
    keys = {key.removeprefix(start): value.value for key, value in model.metadata.items() if key.startswith(start)}
    sizes = model.sizes
    config = part("TextConfig")(
        **counterpart.config(keys, sizes, architecture.kinds_from_gguf(model.metadata, sizes["n_layer"])),
        **{key: sizes[word] for word, key in architecture.config_keys.items()},
    )
    config._attn_implementation, config._experts_implementation = "sdpa", "eager"
    rules = tuple(rule for rule in architecture.tensors if rule.where in (BLOCK, DELTA, ATTENTION))
    return Setting(torch, part, config, model, device, rules)


def tensors_of(setting: Setting, layer: int) -> list[tuple[TensorRule, Tensor]]:
    """Rules and tensors of a layer."""
    tensors = {tensor.name: tensor for tensor in setting.model.tensors if tensor.layer == layer}
    pairs = [(rule, tensors.get(f"blk.{layer}.{rule.target}")) for rule in setting.rules]
    return [(rule, tensor) for rule, tensor in pairs if tensor is not None]


def linears_of(setting: Setting, layer: int) -> list[tuple[TensorRule, Tensor]]:
    """Those of the tensors that are multiplied."""
    return [(rule, tensor) for rule, tensor in tensors_of(setting, layer) if not tensor.keep_f32]


def read_whole(tensor: Tensor) -> F32Array:
    """A whole tensor, f32[n_rows, n_cols], in GGUF's order."""
    starts = range(0, tensor.n_rows, _ROWS)
    return np.concatenate([tensor.rows(start, min(start + _ROWS, tensor.n_rows)) for start in starts])


def source_weights(rule: TensorRule, tensor: Tensor, setting: Setting, values: F32Array) -> F32Array:
    """A tensor's values as in the checkpoint: `each` is undone, and rows and columns go back to their places."""
    if rule.each is not None:
        values = rule.each.undo(values)
    source = np.empty_like(values)
    source[_places(rule, tensor, setting)] = values
    return source.reshape(tensor.shape)


def gguf_weights(rule: TensorRule, tensor: Tensor, setting: Setting, source: F32Array) -> F32Array:
    """The numbers of a checkpoint's matrix, for instance its gradients, in GGUF's order: f32[n_rows, n_cols]."""
    if rule.half is not None:
        source = np.split(source, 2, axis=1)[rule.half]
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
        module = setting.part("DecoderLayer")(setting.config, layer)
    shapes = {name: parameter.shape for name, parameter in module.state_dict().items()}
    parts: dict[str, list[F32Array]] = {}
    for rule, tensor in tensors_of(setting, layer):  # of two that are one in the checkpoint, the upper comes first
        parts.setdefault(rule.source, []).append(source_weights(rule, tensor, setting, read(tensor)))
    weights = {
        name: torch.from_numpy(found[0] if len(found) == 1 else np.concatenate(found, axis=1)).reshape(shapes[name])
        for name, found in parts.items()
    }
    module.load_state_dict(weights, strict=True, assign=True)
    return module.to(setting.device).requires_grad_(False).eval()


def watch_outputs(
    setting: Setting,
    module: Any,
    linears: Sequence[tuple[TensorRule, Tensor]],
    add: Callable[[str, int, Any], None],
) -> None:
    """Calls `add` in the backward pass of a layer, for every matrix product of a linear layer.

    It gets the tensor's name, the number of the expert (0 where there are none), and the gradient at the output,
    [..., rows of one matrix], in the checkpoint's order.
    """

    def watch(name: str, expert: int, output: Any) -> None:
        output.register_hook(lambda gradient: add(name, expert, gradient))

    def watched(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:  # what a hook returns would replace the output
            watch(name, 0, output)

        return hook

    for rule, tensor in linears:
        if tensor.role not in _OF_EXPERTS:
            module.get_submodule(rule.source.removesuffix(".weight")).register_forward_hook(watched(tensor.name))
    names = {tensor.role: tensor.name for _, tensor in linears}
    if names.keys() & set(_OF_EXPERTS):
        seen = partial(_run_experts, setting.torch, module.mlp.experts, [names[role] for role in _OF_EXPERTS], watch)
        module.mlp.experts.forward = seen


def _run_experts(
    torch: Any,
    experts: Any,
    names: Sequence[str],
    watch: Callable[[str, int, Any], None],
    hidden: Any,
    index: Any,
    weights: Any,
) -> Any:
    """The sum of the experts [n, n_embd] as transformers computes it, with a hook on every matrix product.

    Args:
        hidden: [n, n_embd].
        index, weights: [n, n_used], the experts that a token is routed to, and their weights.
    """
    total, multiply = torch.zeros_like(hidden), torch.nn.functional.linear
    for expert in torch.unique(index).tolist():
        tokens, places = torch.where(index == expert)
        gate, up = multiply(hidden[tokens], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        down = multiply(experts.act_fn(gate) * up, experts.down_proj[expert])
        for name, output in zip(names, (gate, up, down), strict=True):
            watch(name, expert, output)
        total.index_add_(0, tokens, down * weights[tokens, places, None])
    return total


def positions_of(setting: Setting, context: int) -> Any:
    """The cosines and sines of the positions of a window."""
    torch = setting.torch
    rotary = setting.part("TextRotaryEmbedding")(setting.config).to(setting.device)
    numbers = torch.arange(context, device=setting.device).view(1, 1, -1).expand(3, 1, -1)
    return rotary(torch.zeros(1, context, 1, device=setting.device), numbers)


def build_norm(setting: Setting) -> Any:
    """The norm before the output head."""
    tensor = next(tensor for tensor in setting.model.tensors if tensor.role is Role.NORM and tensor.layer is None)
    norm = setting.part("RMSNorm")(setting.model.sizes["n_embd"], eps=setting.config.rms_norm_eps)
    rule = next(rule for rule in architecture_named(setting.model.architecture).tensors if rule.target == tensor.name)
    norm.weight.data = setting.torch.from_numpy(source_weights(rule, tensor, setting, read_whole(tensor)))
    return norm.to(setting.device).requires_grad_(False)

"""Runs a quantized model in torch, and moves its blocks against the gradients of its divergence from the reference.

The weights and gradients of one layer are in memory at a time. The forward pass keeps the input of each layer, and the
backward pass computes each layer once more. Needs the extra `curvature`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.calibration.torch_layers import (
    Setting,
    build_layer,
    build_norm,
    gguf_weights,
    linears_of,
    positions_of,
    read_whole,
)
from pocketquant.errors import OutputError
from pocketquant.formats import F32Array
from pocketquant.model import Model, Role, Tensor
from pocketquant.tuning.block_scales import BlockScales

Numbers = npt.NDArray[np.int64]
"""Numbers of windows."""

_BETAS = (0.9, 0.98)
_EPSILON = 1e-12
_LOGIT_ROWS = 64


def run_reference(
    setting: Setting, windows: npt.NDArray[np.int32], batches: Sequence[Numbers], states: Path, step: Callable[[], None]
) -> npt.NDArray[np.float32]:
    """The reference's normed last hidden states f32[n_window, context, n_embd], mapped from a file in `states`.

    Args:
        batches: numbers of the windows that are run together.
        step: called after each batch.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        shape = (*windows.shape, setting.model.sizes["n_embd"])
        hidden = np.memmap(states / "hidden", np.float32, "w+", shape=shape)
    except OSError as error:
        raise OutputError(f"{states}: cannot be written: {error.strerror}") from error
    embedding = read_whole(_embedding(setting))
    for batch in batches:
        hidden[batch] = embedding[windows[batch]]
    for layer in range(setting.model.sizes["n_layer"]):
        module, positions = build_layer(setting, layer), positions_of(setting, windows.shape[1])
        for batch in batches:
            hidden[batch] = _run_layer(setting, module, hidden[batch], positions)
    norm = build_norm(setting)
    for batch in batches:
        with setting.torch.no_grad():
            hidden[batch] = norm(setting.torch.from_numpy(hidden[batch]).to(setting.device)).cpu().numpy()
        step()
    return hidden


def _embedding(setting: Setting) -> Tensor:
    return next(tensor for tensor in setting.model.tensors if tensor.role is Role.EMBED)


def _head(setting: Setting) -> Tensor:
    return next((tensor for tensor in setting.model.tensors if tensor.role is Role.HEAD), _embedding(setting))


def _run_layer(setting: Setting, module: Any, given: F32Array, positions: Any) -> F32Array:
    with setting.torch.no_grad():
        made = module(setting.torch.from_numpy(given).to(setting.device), position_embeddings=positions)
    return made.cpu().numpy()  # type: ignore[no-any-return]


class Tuner:
    """The quantized model with blocks that can move, and the state of Adam.

    `hidden` f32[n_window, context, n_embd] is the input of the reference's output head.
    """

    def __init__(
        self,
        setting: Setting,
        model: Model,
        scales: dict[str, BlockScales],
        windows: npt.NDArray[np.int32],
        hidden: npt.NDArray[np.float32],
    ) -> None:
        self._setting, self._scales, self._windows, self._hidden = setting, scales, windows, hidden
        self._tensors = {tensor.name: tensor for tensor in model.tensors}
        self._means = {name: {f: np.zeros_like(c) for f, c in each.changes.items()} for name, each in scales.items()}
        self._squares = {name: {f: np.zeros_like(c) for f, c in each.changes.items()} for name, each in scales.items()}
        self._step = 0
        torch = setting.torch
        self._reference_head = torch.from_numpy(read_whole(_head(setting))).to(setting.device)
        self._norm = build_norm(setting)

    def divergence(self, batches: Sequence[Numbers], step: Callable[[], None]) -> float:
        """Mean KL divergence over windows, in nats a token."""
        total, tokens = 0.0, 0
        for batch in batches:
            inputs = self._forward(batch)
            loss, _, _ = self._head(batch, inputs[-1], want=False)
            total, tokens = total + loss, tokens + batch.size * self._windows.shape[1]
            step()
        return total / tokens

    def step(self, batch: Numbers, rate: float, code_rate: float) -> None:
        """One step of all scales and codes, each tensor's as soon as its gradient is known."""
        self._step += 1
        for name, gradient in self.gradients(batch):
            scales = self._scales[name]
            at_scales = scales.scale_gradients(gradient)
            if scales.codes is not None:
                scales.move_codes(gradient, code_rate)
            self._change(name, at_scales, rate)

    def gradients(self, batch: Numbers) -> Iterator[tuple[str, F32Array]]:
        """Yields tensors from the last one back, with the gradient of the mean divergence by their weights."""
        setting, torch = self._setting, self._setting.torch
        inputs = self._forward(batch)
        _, above, at_head = self._head(batch, inputs.pop(), want=True)
        positions = positions_of(setting, self._windows.shape[1])
        for layer in reversed(range(setting.model.sizes["n_layer"])):
            module = build_layer(setting, layer, self._read)
            free = [(rule, tensor) for rule, tensor in linears_of(setting, layer) if tensor.name in self._scales]
            for rule, _ in free:
                module.get_parameter(rule.source).requires_grad_()
            given = torch.from_numpy(inputs.pop()).to(setting.device).requires_grad_()
            module(given, position_embeddings=positions).backward(above)
            above = given.grad
            for rule, tensor in free:
                gradient = module.get_parameter(rule.source).grad.cpu().numpy()
                yield tensor.name, gguf_weights(rule, tensor, setting, gradient)
        embedding, head = _embedding(setting).name, _head(setting).name
        at_rows = above.cpu().numpy().reshape(-1, above.shape[-1])
        at_embedding = at_head if embedding == head else np.zeros_like(at_head)
        np.add.at(at_embedding, self._windows[batch].reshape(-1), at_rows)
        for name, gradient in {head: at_head, embedding: at_embedding}.items():
            if name in self._scales:
                yield name, gradient

    def _read(self, tensor: Tensor) -> F32Array:
        """A tensor of the quantized model."""
        scales = self._scales.get(tensor.name)
        return read_whole(self._tensors[tensor.name]) if scales is None else scales.weights()

    def _forward(self, batch: Numbers) -> list[F32Array]:
        """Every layer's input and the last one's output, f32[n, context, n_embd] each."""
        setting = self._setting
        positions = positions_of(setting, self._windows.shape[1])
        states = [self._read(_embedding(setting))[self._windows[batch]]]
        for layer in range(setting.model.sizes["n_layer"]):
            states.append(_run_layer(setting, build_layer(setting, layer, self._read), states[-1], positions))
        return states

    def _head(self, batch: Numbers, last: F32Array, *, want: bool) -> tuple[float, Any, F32Array]:
        """The divergence summed over tokens, and its mean's gradients at the last layer's output and of the head."""
        setting, torch = self._setting, self._setting.torch
        head = torch.from_numpy(self._read(_head(setting))).to(setting.device)
        given = torch.from_numpy(last).to(setting.device).requires_grad_(want)
        normed = self._norm(given)
        rows = normed.detach().reshape(-1, normed.shape[-1])
        theirs = torch.from_numpy(self._hidden[batch]).to(setting.device).reshape(rows.shape)
        at_rows, at_head, total = torch.zeros_like(rows), torch.zeros_like(head), 0.0
        for start in range(0, len(rows), _LOGIT_ROWS):
            chosen = slice(start, start + _LOGIT_ROWS)
            log_p = torch.log_softmax(theirs[chosen] @ self._reference_head.T, dim=-1)
            log_q = torch.log_softmax(rows[chosen] @ head.T, dim=-1)
            p = log_p.exp()
            total += float((p * (log_p - log_q)).sum(dtype=torch.float64))
            if want:
                at_logits = (log_q.exp() - p) / len(rows)
                at_rows[chosen] = at_logits @ head
                at_head.addmm_(at_logits.T, rows[chosen])
        if want:
            normed.backward(at_rows.reshape(normed.shape))
        return total, given.grad, at_head.cpu().numpy()

    def _change(self, name: str, gradients: dict[str, F32Array], rate: float) -> None:
        """Adam's step for the scales of one tensor."""
        scales = self._scales[name]
        for field, found in gradients.items():
            mean, square = self._means[name][field], self._squares[name][field]
            mean += (1 - _BETAS[0]) * (found - mean)
            square += (1 - _BETAS[1]) * (found * found - square)
            size = np.sqrt(square / (1 - _BETAS[1] ** self._step))
            step = mean / (1 - _BETAS[0] ** self._step) / (size + _EPSILON)
            scales.changes[field] -= np.float32(rate) * step

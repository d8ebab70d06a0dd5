"""Collects Fisher matrices G = E[g g^T] of the output gradients of every linear layer, with torch.

The gradients are those of the log-likelihood of labels that are drawn from the model itself. Their second moments are
the Fisher information, and half of it times a squared error is a KL divergence. Kunstner, Hennig and Balles,
"Limitations of the empirical Fisher approximation", 2019, show why the labels must not be those of the text.

The model is processed layer by layer: forwards, all windows go through one layer, whose outputs go to disk; backwards,
each layer is computed once more from its stored input. So the weights and matrices of one layer are in memory at a
time, whatever the size of the model, and an interrupted run goes on with the layer that it was in. Needs the extra
`curvature`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketquant.architectures.table import TensorRule
from pocketquant.calibration.layer_states import LayerStates
from pocketquant.calibration.statistics import COUNT, EMBED_OUTPUT, OUTPUT, fingerprint
from pocketquant.calibration.statistics_writing import About, StatisticsLayout, lay_out, triangles
from pocketquant.calibration.torch_layers import (
    Setting,
    build_layer,
    build_norm,
    linears_of,
    positions_of,
    read_whole,
    set_up,
    watch_outputs,
)
from pocketquant.errors import EvalError
from pocketquant.files.replacing import hidden_beside
from pocketquant.formats import F32Array
from pocketquant.model import Model, Role, Tensor
from pocketquant.texts.corpus import TextRecord, digest_of_tokens

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all; a step is one layer in one direction."""

_LOGIT_ROWS = 64

_Linears = Sequence[tuple[TensorRule, Tensor]]
"""The rules and tensors of the linear layers of a layer."""


@dataclass(frozen=True)
class FisherSettings:
    """How gradients are computed.

    Attributes:
        batch: windows at a time.
        device: torch's name of the device that computes: "cpu", "cuda".
        threads: threads that compute; None for all that this process may use.
        seed: of the labels.
    """

    batch: int = 4
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0


DEFAULT = FisherSettings()


def collect_fisher(
    model: Model,
    windows: npt.NDArray[np.int32],
    texts: Sequence[TextRecord],
    out: Path,
    settings: FisherSettings = DEFAULT,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes the Fisher matrix at the output of every linear layer and of the embedding.

    Args:
        model: the opened checkpoint or its GGUF in F32 or BF16.
        windows: i32[n_window, context], tokens.
        texts: the texts that they come from.
        out: the statistics file, without Hessians; `merge_statistics` joins it to a file that has them. Hidden states
            lie beside it during the run, in the folder `.NAME.states`: 4 n_layer n_embd bytes for each token.
        settings: how gradients are computed.
        resume: go on where an interrupted run stopped; the result is the same.
        progress: told after each layer.

    Raises:
        EvalError: torch or transformers is absent, or the unfinished work is of another run.
        ArchitectureError: it is not a text model, or its positions are scaled.
    """
    setting = set_up(model, settings.device, settings.threads)
    linears = [linears_of(setting, layer) for layer in range(model.sizes["n_layer"])]
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, stated in _matrices(model, (tensor for layer in linears for _, tensor in layer)):
        arrays[name + COUNT] = ("I64", stated[1][:1])
        arrays[name] = stated
    layout = lay_out(About(0, fingerprint(model), tuple(texts), {}), arrays)
    header, tokens = hashlib.sha256(layout.header).hexdigest(), digest_of_tokens(windows)
    run = {"header": header, "tokens": tokens, "seed": settings.seed, "batch": settings.batch}
    states = LayerStates(hidden_beside(out, "states"), (*windows.shape, model.sizes["n_embd"]))
    batches = [slice(start, start + settings.batch) for start in range(0, len(windows), settings.batch)]
    with states.begun(layout, run, resume):
        total = 2 * len(linears) + 1
        for done, run_step in enumerate(_steps(setting, windows, linears, batches, states, layout, settings.seed), 1):
            run_step()
            if progress is not None:
                progress(done, total)
        with states.reading("gradient", 0) as gradient:
            fisher = np.zeros((gradient.shape[2],) * 2, np.float32)
            for batch in batches:
                rows = gradient[batch].reshape(-1, gradient.shape[2])
                fisher += rows.T @ rows
        layout.put(states.unfinished, _pieces(EMBED_OUTPUT, fisher[None], windows.size))
        states.finish(out)


def _steps(
    setting: Setting,
    windows: npt.NDArray[np.int32],
    linears: Sequence[_Linears],
    batches: Sequence[slice],
    states: LayerStates,
    layout: StatisticsLayout,
    seed: int,
) -> Iterator[Callable[[], None]]:
    """The layers forwards, the head, and the layers backwards; what an earlier run finished is left out."""
    going_back = states.gradients()

    def forward(layer: int) -> None:
        if going_back is None:
            if layer == 0:
                _embed(setting, windows, batches, states)
            if not states.has("hidden", layer + 1):
                _forward(setting, layer, batches, states)

    def backward(layer: int) -> None:
        if going_back is None or layer < going_back:
            _backward(setting, layer, linears[layer], batches, states, layout)

    for layer in range(len(linears)):
        yield partial(forward, layer)
    yield lambda: _differentiate_head(setting, batches, states, seed) if going_back is None else None
    for layer in reversed(range(len(linears))):
        yield partial(backward, layer)


def cost_of_gradients(model: Model, linears: Collection[str]) -> tuple[int, int]:
    """The bytes of the matrices in a file, and of the largest layer's weights and matrices in memory.

    Args:
        model: the opened model.
        linears: names of the tensors that get matrices.
    """
    chosen = [tensor for tensor in model.tensors if tensor.name in linears]
    of_layer: Counter[int | None] = Counter()
    for tensor in chosen:  # a matrix has as many rows and columns as a weight's has rows
        of_layer[tensor.layer] += 4 * tensor.n_rows * (tensor.n_cols + tensor.shape[-2])
    return sum(4 * prod(shape) for _, (_, shape) in _matrices(model, chosen)), max(of_layer.values(), default=0)


def _matrices(model: Model, linears: Iterable[Tensor]) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Name, dtype and shape of the array of every Fisher matrix."""
    for tensor in linears:
        yield tensor.name + OUTPUT, triangles(tensor.n_matrix, tensor.shape[-2])
    yield EMBED_OUTPUT, triangles(1, model.sizes["n_embd"])


# ---------------------------------------------------------------- forwards and backwards


def _embed(setting: Setting, windows: npt.NDArray[np.int32], batches: Sequence[slice], states: LayerStates) -> None:
    if states.has("hidden", 0):
        return
    embedding = next(tensor for tensor in setting.model.tensors if tensor.role is Role.EMBED)
    used, places = np.unique(windows, return_inverse=True)
    rows = np.concatenate([embedding.rows(int(token), int(token) + 1) for token in used])
    places = places.reshape(windows.shape)
    states.write("hidden", 0, ((part, rows[places[part]]) for part in batches))


def _forward(setting: Setting, layer: int, batches: Sequence[slice], states: LayerStates) -> None:
    torch, module = setting.torch, build_layer(setting, layer)
    with states.reading("hidden", layer) as hidden:
        positions = positions_of(setting, hidden.shape[1])

        def outputs() -> Iterator[tuple[slice, F32Array]]:
            with torch.no_grad():
                for part in batches:
                    given = torch.from_numpy(np.array(hidden[part])).to(setting.device)
                    yield part, module(given, position_embeddings=positions).cpu().numpy()

        states.write("hidden", layer + 1, outputs())


def _differentiate_head(setting: Setting, batches: Sequence[slice], states: LayerStates, seed: int) -> None:
    """Gradients of the drawn labels' log-likelihood at the last layer's output."""
    torch, n_layer = setting.torch, setting.model.sizes["n_layer"]
    tensors = {tensor.role: tensor for tensor in setting.model.tensors if tensor.layer is None}
    matrix = torch.from_numpy(read_whole(tensors.get(Role.HEAD, tensors[Role.EMBED]))).to(setting.device)
    norm = build_norm(setting)
    with states.reading("hidden", n_layer) as hidden:

        def gradients() -> Iterator[tuple[slice, F32Array]]:
            for part in batches:
                # the labels of a window depend on its number and the seed alone
                draws = [np.random.default_rng((seed, i)).random(hidden.shape[1]) for i in _numbers(part, hidden)]
                given = torch.from_numpy(np.array(hidden[part])).to(setting.device).requires_grad_()
                normed = norm(given)
                rows = normed.detach().reshape(-1, normed.shape[-1])
                at_rows = torch.empty_like(rows)
                uniform = torch.from_numpy(np.concatenate(draws)).to(setting.device)
                for start in range(0, len(rows), _LOGIT_ROWS):
                    chosen = slice(start, start + _LOGIT_ROWS)
                    at_rows[chosen] = _label_gradients(torch, rows[chosen] @ matrix.T, uniform[chosen]) @ matrix
                normed.backward(at_rows.reshape(normed.shape))
                yield part, given.grad.cpu().numpy()

        states.write("gradient", n_layer, gradients())


def _label_gradients(torch: Any, logits: Any, uniform: Any) -> Any:
    """Gradients of the drawn labels' log-likelihood at the logits: one at the label, less the probabilities."""
    probabilities = torch.softmax(logits.double(), dim=-1)
    sums = probabilities.cumsum(-1)
    labels = torch.searchsorted(sums, (uniform[:, None] * sums[:, -1:]), right=True).clamp(max=logits.shape[1] - 1)
    gradients = -probabilities
    gradients.scatter_add_(1, labels, torch.ones_like(gradients[:, :1]))
    return gradients.to(logits.dtype)


def _numbers(part: slice, windows: npt.NDArray[Any]) -> range:
    return range(*part.indices(len(windows)))


def _backward(
    setting: Setting,
    layer: int,
    linears: _Linears,
    batches: Sequence[slice],
    states: LayerStates,
    layout: StatisticsLayout,
) -> None:
    torch, module = setting.torch, build_layer(setting, layer)
    fishers = {
        tensor.name: torch.zeros(tensor.n_matrix, tensor.shape[-2], tensor.shape[-2], device=setting.device)
        for _, tensor in linears
    }

    def add(name: str, expert: int, gradient: Any) -> None:
        rows = gradient.detach().reshape(-1, gradient.shape[-1])
        fishers[name][expert].addmm_(rows.T, rows)

    watch_outputs(setting, module, linears, add)
    with states.reading("hidden", layer) as hidden, states.reading("gradient", layer + 1) as above:
        positions = positions_of(setting, hidden.shape[1])
        n_tokens = hidden.shape[0] * hidden.shape[1]

        def gradients() -> Iterator[tuple[slice, F32Array]]:
            for part in batches:
                given = torch.from_numpy(np.array(hidden[part])).to(setting.device).requires_grad_()
                output = module(given, position_embeddings=positions)
                output.backward(torch.from_numpy(np.array(above[part])).to(setting.device))
                yield part, given.grad.cpu().numpy()
            for rule, tensor in linears:
                found = fishers.pop(tensor.name).cpu().numpy()
                if rule.rows is not None:
                    order = rule.rows(setting.model.sizes)
                    found = found[:, order[:, None], order]
                layout.put(states.unfinished, _pieces(tensor.name + OUTPUT, found, n_tokens))

        states.write("gradient", layer, gradients())
    states.drop("hidden", layer + 1)
    states.drop("gradient", layer + 1)


def _pieces(name: str, sums: F32Array, n_tokens: int) -> Iterator[tuple[str, int | None, npt.NDArray[Any]]]:
    """Turns sums f32[n_matrix, m, m] over the text's tokens into means over all tokens, also those of an expert."""
    if not np.isfinite(sums).all():
        raise EvalError(f"{name}: its gradients are not finite; the model is damaged")
    yield name + COUNT, None, np.full(len(sums), n_tokens)
    for index, matrix in enumerate(sums):
        yield name, index, matrix / np.float32(n_tokens)

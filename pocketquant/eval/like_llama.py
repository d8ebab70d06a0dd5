"""The numbers that llama-perplexity computes from its file of logits, with the same rounding.

Its base pass stores each row of log-probabilities as 16-bit steps between the largest one and the smallest one, or 16
below the largest; its compare pass reads the reference's losses, its most likely token and the divergence off those,
and skips what is less likely than exp(-16). It computes in f32, but for sums over the vocabulary. Total variation and
the top 5 it does not print; they are the exact ones.

Source: tools/perplexity/perplexity.cpp of llama.cpp (b10359), both `log_softmax` that take `uint16_t`.
"""

from __future__ import annotations

from concurrent.futures import Executor
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from pocketquant.eval.metrics import Positions, score_rows
from pocketquant.formats import F32Array

_STEPS = np.float32(65535)
_DEPTH = np.float32(16)


@numba.njit(nogil=True, cache=True)
def _store_row(reference: F32Array, steps: npt.NDArray[np.uint16]) -> tuple[np.float32, np.float32]:
    """A row of logits as the base pass writes it: (size of a step, smallest log-probability), and u16 steps."""
    largest, smallest = reference[0], reference[0]
    for i in range(reference.size):
        largest, smallest = max(largest, reference[i]), min(smallest, reference[i])
    smallest = max(smallest, np.float32(largest - _DEPTH))
    total = 0.0
    for i in range(reference.size):
        total += np.float64(np.exp(np.float32(reference[i] - largest)))
    log_total = np.float32(np.log(total))
    scale = np.float32(np.float32(largest - smallest) / _STEPS)
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    for i in range(reference.size):
        above = np.float32(reference[i] - smallest)
        steps[i] = np.uint16(np.rint(np.float32(inverse * above))) if above > 0 else np.uint16(0)
    return scale, np.float32(np.float32(smallest - largest) - log_total)


@numba.njit(nogil=True, cache=True)
def _compare_row(
    model: F32Array, steps: npt.NDArray[np.uint16], scale: np.float32, lowest: np.float32, token: int, out: Any
) -> None:
    largest, place = model[0], 0
    for i in range(model.size):
        if model[i] > largest:
            largest, place = model[i], i
    total = 0.0
    for i in range(model.size):
        total += np.float64(np.exp(np.float32(model[i] - largest)))
    log_total = np.float32(np.float32(largest) + np.float32(np.log(total)))
    reference_place, divergence = 0, 0.0
    for i in range(model.size):
        if steps[i] > steps[reference_place]:
            reference_place = i
        log_share = np.float32(np.float32(scale * np.float32(steps[i])) + lowest)
        if log_share > -_DEPTH:
            difference = np.float32(np.float32(log_share - model[i]) + log_total)
            divergence += np.float64(np.float32(np.exp(log_share) * difference))
    out.kld_nats = divergence
    out.nll_model_nats = np.float64(np.float32(log_total - model[token]))
    out.nll_reference_nats = -np.float64(np.float32(np.float32(scale * np.float32(steps[token])) + lowest))
    out.is_same_top = place == reference_place


@numba.njit(nogil=True, cache=True)
def _compare_rows(model: F32Array, reference: F32Array, tokens: npt.NDArray[np.int32], out: Positions) -> None:
    steps = np.empty(model.shape[1], np.uint16)
    for i in range(tokens.size):
        if out[i].is_finite_model and out[i].is_finite_reference:
            scale, lowest = _store_row(reference[i], steps)
            _compare_row(model[i], steps, scale, lowest, tokens[i], out[i])


def score_rows_like_llama(
    model: F32Array,
    reference: F32Array,
    tokens: npt.NDArray[np.int32],
    *,
    workers: Executor | None = None,
    n_workers: int = 1,
) -> Positions:
    """As `metrics.score_rows`, with divergence, losses and equal tops as llama-perplexity rounds them."""
    out = score_rows(model, reference, tokens, workers=workers, n_workers=n_workers)
    if workers is None or n_workers == 1:
        _compare_rows(model, reference, tokens, out)
        return out
    cuts = np.linspace(0, len(tokens), n_workers + 1).astype(int)
    shares = [slice(start, stop) for start, stop in pairwise(cuts.tolist()) if stop > start]
    list(workers.map(lambda share: _compare_rows(model[share], reference[share], tokens[share], out[share]), shares))
    return out

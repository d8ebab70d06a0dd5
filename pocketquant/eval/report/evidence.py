"""What a report keeps besides its numbers, so that a gate can compare it with another report later.

It keeps sums over the clusters that standard errors are taken over: two reports on the same tokens can then be
compared window by window, and what is common to both drops out. It keeps a digest of the tokens of each text, which
shows whether they are the same, and a digest of each metadata key. On request it keeps each tensor's format and its
distance from full precision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketquant.eval.bootstrap import MIN_CLUSTERS
from pocketquant.eval.metrics import Positions
from pocketquant.eval.weights import TensorError, weight_errors
from pocketquant.files.small import kind_of
from pocketquant.gguf_file.reading import is_gguf, read_header
from pocketquant.model import Model, Tensor

SHORT = 16
"""Hex digits of a digest that only has to tell two things apart."""

_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class TextSums:
    """One text's sums over clusters: its windows, or equal blocks of them where there are fewer than 20 windows.

    Attributes:
        stream: digest of the tokens of its windows; "" where it is not known.
        tokens: positions that count, those that are not finite left out.
        bytes: of the scored tokens' text.
        kld: nats.
        top1: positions with the same most likely token.
        top5: positions with the reference's among the model's five.
        tv: total variation.
        nll_model: nats.
        nll_reference: nats.
    """

    domain: str
    stream: str
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]
    kld: tuple[float, ...]
    top1: tuple[int, ...]
    top5: tuple[int, ...]
    tv: tuple[float, ...]
    nll_model: tuple[float, ...]
    nll_reference: tuple[float, ...]


@dataclass(frozen=True)
class TensorState:
    """One tensor of the judged file.

    Attributes:
        weights: how many numbers it has.
        sha256: first digits of the digest of its bytes.
        relative_rmse: as in `TensorError`; None where the reference's weights were not at hand.
        cosine: likewise.
        max_abs_error: likewise.
    """

    name: str
    role: str
    layer: int | None
    format: str
    weights: int
    sha256: str
    relative_rmse: float | None = None
    cosine: float | None = None
    max_abs_error: float | None = None


def sum_clusters(positions: Positions, domain: str, stream: str) -> TextSums:
    """Adds up one text's `POSITION`[n_window, n] by cluster; figures keep nine digits."""
    n_window, n_place = positions.shape
    n_block = 1 if n_window >= MIN_CLUSTERS else min(-(-MIN_CLUSTERS // max(n_window, 1)), max(n_place, 1))
    block = np.arange(n_place) * n_block // max(n_place, 1)
    cluster = (np.arange(n_window)[:, None] * n_block + block).ravel()
    flat = positions.ravel()
    counts = flat["is_finite_model"] & flat["is_finite_reference"]

    def total(values: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
        weights = np.where(counts, values.astype(np.float64), 0.0)
        return np.bincount(cluster, weights=weights, minlength=n_window * n_block).astype(np.float64)

    def whole(values: npt.NDArray[np.generic]) -> tuple[int, ...]:
        return tuple(total(values).astype(np.int64).tolist())

    def real(name: str) -> tuple[float, ...]:
        return tuple(float(f"{value:.9g}") for value in total(flat[name]))

    return TextSums(
        domain=domain,
        stream=stream,
        tokens=whole(counts),
        bytes=whole(flat["n_bytes"]),
        kld=real("kld_nats"),
        top1=whole(flat["is_same_top"]),
        top5=whole(flat["n_above_top"] < 5),
        tv=real("variation"),
        nll_model=real("nll_model_nats"),
        nll_reference=real("nll_reference_nats"),
    )


def digest_stream(windows: npt.NDArray[np.int32]) -> str:
    """Digest of tokens i32[n_window, context]: equal only for the same windows in the same order."""
    data = np.ascontiguousarray(windows.astype("<i4"))
    return hashlib.sha256(repr(data.shape).encode() + data.tobytes()).hexdigest()


def digest_metadata(path: Path) -> dict[str, str]:
    """Each metadata key of a GGUF with a short digest of its type and value; empty for anything else."""
    if kind_of(path) != "file" or not is_gguf(path):
        return {}
    return {
        key: hashlib.sha256(json.dumps([value.kind, value.value]).encode()).hexdigest()[:SHORT]
        for key, value in sorted(read_header(path).metadata.items())
    }


def describe_tensors(
    model: Model, reference: Model | None, *, progress: Callable[[int, int], None] | None = None
) -> tuple[TensorState, ...]:
    """Describes each tensor, and its distance from the reference's.

    Args:
        model: a GGUF, opened.
        reference: the same checkpoint in full precision; None if its weights are not at hand.
        progress: as for `weight_errors`.

    Raises:
        EvalError: the two do not have the same tensors in the same shapes.
        SourceError: a tensor cannot be read or is not finite.
    """
    errors: Sequence[TensorError | None] = [None] * len(model.tensors)
    if reference is not None:
        errors = weight_errors(model, reference, progress=progress)
    return tuple(_state(tensor, error) for tensor, error in zip(model.tensors, errors, strict=True))


def _state(tensor: Tensor, error: TensorError | None) -> TensorState:
    return TensorState(
        name=tensor.name,
        role=tensor.role.value,
        layer=tensor.layer,
        format=tensor.dtype,
        weights=tensor.n_rows * tensor.n_cols,
        sha256=_digest(tensor)[:SHORT],
        relative_rmse=None if error is None else error.relative_rmse,
        cosine=None if error is None else error.cosine,
        max_abs_error=None if error is None else error.max_abs_error,
    )


def _digest(tensor: Tensor) -> str:
    """Of the bytes as they are stored, or of the numbers as f32 where they are computed while being read."""
    digest = hashlib.sha256()
    step = max(_CHUNK_BYTES // (4 * tensor.n_cols), 1)
    for start in range(0, tensor.n_rows, step):
        stop = min(start + step, tensor.n_rows)
        stored = tensor.source.stored(start, stop)
        rows: npt.NDArray[np.generic] = tensor.rows(start, stop) if stored is None else stored
        digest.update(np.ascontiguousarray(rows).tobytes())
    return digest.hexdigest()

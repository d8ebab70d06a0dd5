"""Statistics of a model without running it: random numbers, others for every tensor, side, expert and group."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from zlib import crc32

import numpy as np

from pocketquant.calibration.statistics import (
    COUNT,
    EMBED_OUTPUT,
    HEAD,
    HEAD_ROUNDING,
    INPUT,
    OUTPUT,
    ROUNDING,
    fingerprint,
)
from pocketquant.calibration.statistics_writing import About, triangles, write_statistics
from pocketquant.formats import F32Array
from pocketquant.model import Model, Role
from pocketquant.texts.corpus import TextRecord

TOKENS = 99


def moment_of(k: int, name: str) -> F32Array:
    """A second moment f32[k, k] of correlated inputs of very different sizes."""
    rng = np.random.default_rng(crc32(name.encode()))
    inputs = (
        rng.standard_normal((k // 2, k // 4 + 1)) @ rng.standard_normal((k // 4 + 1, k)) * rng.lognormal(0.0, 1.0, k)
    )
    inputs += 0.2 * rng.standard_normal(inputs.shape) * rng.lognormal(0.0, 1.0, k)
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def rounding_of(k: int, name: str) -> F32Array:
    """Squared errors f32[2 k] of rounded inputs; smaller where a scale serves fewer columns."""
    rng = np.random.default_rng(crc32(name.encode()))
    coarse = 1e-4 * rng.lognormal(0.0, 1.0, k)
    return np.concatenate([coarse, coarse * rng.uniform(0.1, 0.9, k)]).astype(np.float32)


def make_statistics(
    model: Model,
    path: Path,
    *,
    outputs: Collection[str] = (),
    unseen: Collection[tuple[str, int]] = (),
    without: Collection[str] = (),
    n_group: int = 0,
    salt: str = "",
) -> Path:
    """Writes statistics of every matrix in the blocks.

    Args:
        model: whose they are.
        path: where to.
        outputs: names of tensors that get moments of their outputs, too; "embed/output" for the embedding's.
        unseen: tensors and their experts that no token came by.
        without: names of tensors that get none.
        n_group: groups of the vocabulary's rows; 0 for no statistics of it.
        salt: other numbers with another one.
    """
    arrays, pieces = {}, []

    def add(name: str, n_matrix: int, side: int, counts: list[int]) -> None:
        arrays[name], arrays[name + COUNT] = triangles(n_matrix, side), ("I64", (n_matrix,))
        pieces.append((name + COUNT, None, np.array(counts)))
        pieces.extend((name, i, moment_of(side, f"{salt}{name} {i}")) for i, count in enumerate(counts) if count)

    def add_rounding(name: str, k: int, counts: list[int]) -> None:
        arrays[name] = ("F32", (len(counts), 2 * k))
        pieces.extend((name, i, rounding_of(k, f"{salt}{name} {i}")) for i, count in enumerate(counts) if count)

    for tensor in model.tensors:
        if tensor.layer is None or tensor.keep_f32 or len(tensor.shape) < 2 or tensor.name in without:
            continue
        n_matrix = tensor.shape[0] if len(tensor.shape) == 3 else 1
        counts = [0 if (tensor.name, i) in unseen else TOKENS // (1 + i % 4) for i in range(n_matrix)]
        add(tensor.name + INPUT, n_matrix, tensor.n_cols, counts)
        add_rounding(tensor.name + ROUNDING, tensor.n_cols, counts)
        if tensor.name in outputs:
            add(tensor.name + OUTPUT, n_matrix, tensor.shape[-2], counts)
    if n_group:
        embedding = next(tensor for tensor in model.tensors if tensor.role is Role.EMBED)
        n_vocab, rng = embedding.n_rows, np.random.default_rng(5)
        kinds = {"I32": rng.permutation(n_vocab) % n_group, "F64": rng.random(n_vocab)}
        for name, dtype in zip(HEAD[:3], ("I32", "F64", "F64"), strict=True):
            arrays[name] = (dtype, (n_vocab,))
            pieces.append((name, None, kinds[dtype] / (kinds[dtype].sum() if name == HEAD[2] else 1)))
        add(HEAD[3], n_group, embedding.n_cols, [TOKENS] * n_group)
        add_rounding(HEAD_ROUNDING, embedding.n_cols, [TOKENS])
        if EMBED_OUTPUT in outputs:
            add(EMBED_OUTPUT, 1, embedding.n_cols, [TOKENS])
    text = TextRecord("made-up.txt", TOKENS, f"{crc32(salt.encode()):064}")
    write_statistics(path, About(TOKENS, fingerprint(model), (text,), {}), arrays, pieces)
    return path

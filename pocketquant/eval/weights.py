"""The difference of each tensor of a model from the reference's, without running either.

Both are read in chunks of the same rows, so memory does not depend on the size of a tensor. These numbers find a broken
tensor. They do not rank recipes, because an equal error costs far more in one tensor than in another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numba
import numpy as np

from pocketquant.errors import EvalError, listing
from pocketquant.formats import F32Array
from pocketquant.model import Model, Role, Tensor

CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class TensorError:
    """One tensor against the reference's.

    Attributes:
        format: how the model stores it: "Q4_K".
        cosine: of the angle between the two, as vectors; 1 if both are zero, 0 if one is.
        snr_db: sum of squares of the reference over that of the difference, in decibels; None if nothing was lost.
        relative_rmse: root of the inverse ratio; None if the reference is zero and the model is not.
        max_abs_error: largest difference of one weight.
    """

    name: str
    role: Role
    layer: int | None
    format: str
    cosine: float
    snr_db: float | None
    relative_rmse: float | None
    max_abs_error: float


def weight_errors(
    model: Model, reference: Model, *, progress: Callable[[int, int], None] | None = None
) -> list[TensorError]:
    """Compares the weights of two models, tensor by tensor.

    Args:
        model: the one to judge.
        reference: the same checkpoint in full precision.
        progress: called after each tensor with tensors done and tensors in all.

    Returns:
        One per tensor, in the model's order.

    Raises:
        EvalError: the two do not have the same tensors in the same shapes.
        SourceError: a tensor cannot be read or is not finite.
    """
    originals = {tensor.name: tensor for tensor in reference.tensors}
    _check_pairs(model, reference)
    errors = []
    for tensor in model.tensors:
        errors.append(_compare_tensor(tensor, originals[tensor.name]))
        if progress is not None:
            progress(len(errors), len(model.tensors))
    return errors


def _check_pairs(model: Model, reference: Model) -> None:
    ours = {tensor.name: tensor.shape for tensor in model.tensors}
    theirs = {tensor.name: tensor.shape for tensor in reference.tensors}
    offenders = [f"{name}: only in the model" for name in ours if name not in theirs]
    offenders += [f"{name}: only in the reference" for name in theirs if name not in ours]
    offenders += [
        f"{name}: shape {list(shape)}, in the reference {list(theirs[name])}"
        for name, shape in ours.items()
        if theirs.get(name, shape) != shape
    ]
    if offenders:
        raise EvalError(
            f"{len(offenders)} tensors have no counterpart; compare only files made from the same checkpoint\n"
            + listing(offenders)
        )


def _compare_tensor(tensor: Tensor, original: Tensor) -> TensorError:
    sums = np.zeros(4)
    largest = 0.0
    for start, stop in _row_chunks(tensor):
        ours, theirs = (np.ascontiguousarray(each.rows(start, stop)) for each in (tensor, original))
        *chunk_sums, chunk_largest = _accumulate(ours.reshape(-1), theirs.reshape(-1))
        sums += chunk_sums
        largest = max(largest, chunk_largest)
    product, ours_squared, theirs_squared, lost = (float(value) for value in sums)
    norms = float(np.sqrt(ours_squared) * np.sqrt(theirs_squared))
    both_zero = ours_squared == theirs_squared == 0
    return TensorError(
        name=tensor.name,
        role=tensor.role,
        layer=tensor.layer,
        format=tensor.dtype,
        cosine=min(max(product / norms, -1.0), 1.0) if norms else float(both_zero),
        snr_db=_decibels(theirs_squared, lost) if lost else None,
        relative_rmse=float(np.sqrt(lost / theirs_squared)) if theirs_squared else (0.0 if both_zero else None),
        max_abs_error=float(largest),
    )


def _decibels(signal: float, noise: float) -> float:
    """10 log10 of the ratio; -200 stands for no signal at all, which JSON could not write."""
    return 10 * float(np.log10(signal / noise)) if signal else -200.0


def _row_chunks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    step = max(CHUNK_WEIGHTS // tensor.n_cols, 1)
    for start in range(0, tensor.n_rows, step):
        yield start, min(start + step, tensor.n_rows)


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz", "nnan"})
def _accumulate(ours: F32Array, theirs: F32Array) -> tuple[float, float, float, float, float]:
    """Sums over pairs of finite weights: product, squares of both, squared difference; and the largest difference."""
    product = ours_squared = theirs_squared = lost = largest = 0.0
    for i in range(ours.size):
        a, b = np.float64(ours[i]), np.float64(theirs[i])
        product += a * b
        ours_squared += a * a
        theirs_squared += b * b
        difference = a - b
        lost += difference * difference
        largest = max(largest, abs(difference))
    return product, ours_squared, theirs_squared, lost, largest

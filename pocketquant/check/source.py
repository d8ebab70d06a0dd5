"""Compares a file's tensors with its source's: is the signal over error of each what its format allows?

Where a tensor is too far away, the usual mistakes are tried: value heads left in the checkpoint's order or reordered
twice, an adapter merged in the other order, a scale forgotten, a norm with 1 too many or too few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import log10

import numpy as np
import numpy.typing as npt

from pocketquant.architectures.table import TensorRule
from pocketquant.check.contents import Contents, Entry
from pocketquant.check.findings import ERROR, WARNING, Comparison, Finding
from pocketquant.check.structure import is_mtp, rules_by_name
from pocketquant.errors import WeightError
from pocketquant.formats import FORMATS, F32Array
from pocketquant.model import Role

Progress = Callable[[int, int], None]

_NEXT_TO_NOTHING_DB = 20.0  # so far above its limit, what was lost is a few odd numbers and says nothing
_MOVED_RATIO = 4.0  # how much more heads that change places may lose than those that stay
_CONVERT = "convert again with a tool that knows this architecture"


def compare_tensors(
    contents: Contents,
    source: Contents,
    comparisons: list[Comparison],
    notes: list[str],
    progress: Progress | None = None,
) -> Iterator[Finding]:
    """Cosine and signal over error of every tensor that both have; what is below its limit is explained if possible.

    Args:
        contents: the file.
        source: the checkpoint, in the order and with the transforms of GGUF.
        comparisons: one is added for each tensor.
        notes: what was not compared is added here.
        progress: called with tensors done and tensors in all.

    Raises:
        SourceError: either one cannot be read any more, or was changed meanwhile.
    """
    rules = rules_by_name(source, source.table) if source.table else {}
    for name in source.entries:
        if name not in contents.entries and name not in rules:
            yield Finding(ERROR, "tensor-missing", name, "in the source and not in the file", "convert again")
    if skipped := [name for name in contents.entries if name not in source.entries]:
        mtp = sum(is_mtp(contents, name) for name in skipped)
        notes.append(f"{len(skipped)} tensors are not in the opened source ({mtp} of MTP blocks): not compared")
    for i, (name, entry) in enumerate(contents.entries.items(), start=1):
        original = source.entries.get(name)
        if original is not None and original.shape == entry.shape:
            yield from _compare(entry, original, rules.get(name), source, comparisons)
        elif original is not None:
            message = f"{list(entry.shape)}, in the source {list(original.shape)}"
            yield Finding(ERROR, "shape", name, message, "give the checkpoint that the file was made from")
        if progress is not None:
            progress(i, len(contents.entries))


def _compare(
    entry: Entry, original: Entry, rule: TensorRule | None, source: Contents, comparisons: list[Comparison]
) -> Iterator[Finding]:
    order, by_rows = _order_of(rule, source)
    along_order = np.zeros((2, len(order)))  # signal and error of every row or column that has a place in the order
    sums, emptied = np.zeros(4), list[int]()
    try:
        for start, stop in entry.row_chunks():
            ours, theirs = _finite(entry.read(start, stop)[1]), original.read(start, stop)[1]
            lost = ours - theirs
            emptied += (start + np.flatnonzero(theirs.any(axis=1) & ~ours.any(axis=1))).tolist()
            sums += [_sum_of(*pair) for pair in ((ours, theirs), (ours, ours), (theirs, theirs), (lost, lost))]
            if not len(order):
                continue
            is_list = len(entry.shape) == 1
            where = slice(start, stop) if by_rows and not is_list else slice(None)
            to = "ij,ij->i" if by_rows and not is_list else "ij,ij->j"
            along_order[:, where] += [np.einsum(to, part, part) for part in (theirs, lost)]
    except WeightError as error:
        yield Finding(ERROR, "unreadable", entry.name, str(error), "mend the source")
        return
    if emptied and len(emptied) < entry.n_rows:
        message = f"{len(emptied)} rows are all zero, the first {emptied[0]}, and not so in the source"
        yield Finding(ERROR, "lost-rows", entry.name, message, "the data was not written there; make the file again")
    product, ours_squared, theirs_squared, lost_squared = (float(value) for value in sums)
    norms = (ours_squared * theirs_squared) ** 0.5
    cosine = min(max(product / norms, -1.0), 1.0) if norms else float(ours_squared == theirs_squared)
    snr = _decibels(theirs_squared, lost_squared)
    limit = FORMATS[entry.format].snr_db
    comparisons.append(Comparison(entry.name, entry.format, cosine, snr, limit))
    ratio = _moved_over_still(along_order, order)
    if snr is None or snr >= limit + _NEXT_TO_NOTHING_DB or (snr >= limit and ratio <= _MOVED_RATIO):
        return
    if snr >= limit:
        message = f"heads that change places lost {ratio:.3g} times as much as those that stay: an adapter was merged "
        message += "in the checkpoint's order of heads, or the source is not the one it was made from"
        yield Finding(WARNING, "head-order", entry.name, message, _CONVERT)
        return
    gain = product / theirs_squared if theirs_squared else 1.0
    code, reason, advice = _explain(entry, original, rule, order, by_rows, cosine, gain, limit, ratio)
    message = f"{snr:.1f} dB and cosine {cosine:.4f}; {entry.format} keeps {limit:g} dB or more: {reason}"
    yield Finding(ERROR, code, entry.name, message, advice)


def _order_of(rule: TensorRule | None, source: Contents) -> tuple[npt.NDArray[np.int64], bool]:
    """The order that the tensor's rows (True) or columns were put in, empty where they stand as in the checkpoint."""
    if rule is None or source.table is None or not (rule.rows or rule.cols):
        return np.zeros(0, np.int64), True
    order = (rule.rows or rule.cols)(source.table.sizes_from_gguf(source.metadata))  # type: ignore[misc]
    return (order if (order != np.arange(len(order))).any() else order[:0]), rule.rows is not None


def _moved_over_still(along_order: npt.NDArray[np.float64], order: npt.NDArray[np.int64]) -> float:
    """Relative error where the order moves something over that where it does not; 1 if that says nothing."""
    moved = order != np.arange(len(order))
    if not len(order) or moved.all():
        return 1.0
    (signal, error), (still_signal, still_error) = (along_order[:, part].sum(axis=1) for part in (moved, ~moved))
    if not error or not signal or not still_signal:
        return 1.0
    return float(error / signal / (still_error / still_signal)) if still_error else np.inf


def _finite(values: F32Array) -> F32Array:
    """The numbers with 0 for those that are none, which are a finding of their own."""
    return values if np.isfinite(values).all() else np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def _sum_of(first: F32Array, second: F32Array) -> float:
    """Sum of the products: of a row in f32, of the rows in f64; all in f64 where f32 cannot hold it."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(np.einsum("ij,ij->i", first, second).sum(dtype=np.float64))
    return total if np.isfinite(total) else float(np.vdot(first.astype(np.float64), second.astype(np.float64)))


def _decibels(signal: float, noise: float) -> float | None:
    if not noise:
        return None
    return 10 * log10(signal / noise) if signal else -200.0


def _explain(
    entry: Entry,
    original: Entry,
    rule: TensorRule | None,
    order: npt.NDArray[np.int64],
    by_rows: bool,
    cosine: float,
    gain: float,
    limit: float,
    ratio: float,
) -> tuple[str, str, str]:
    """Code, what went wrong, and what to do."""
    if len(order):
        mistake = _explain_order(_whole(entry), _whole(original), order, limit, by_rows=by_rows)
        if not mistake and ratio > _MOVED_RATIO:
            mistake = (
                "the loss is in heads that change places: an adapter was merged in the checkpoint's order of heads"
            )
        if mistake:
            return "head-order", mistake, _CONVERT
    if rule is not None and rule.role is Role.NORM:
        shift = float(np.mean(_whole(entry) - _whole(original)))
        if abs(abs(shift) - 1) < 0.01:
            return "norm-centre", f"1 was {'added once too often' if shift > 0 else 'not added'}", _CONVERT
    if cosine > 0.99 and abs(gain - 1) > 0.02:
        return (
            "far-off",
            f"every number is {gain:.4g} times the source's: a scale was left out or applied twice",
            _CONVERT,
        )
    if cosine < 0.1:
        advice = f"give the checkpoint that the file was made from, or {_CONVERT}"
        return "far-off", "these are other numbers altogether", advice
    return "far-off", "more was lost than rounding explains", "look for an adapter, a merge or an edit between the two"


def _whole(entry: Entry) -> F32Array:
    return _finite(entry.read(0, entry.n_rows)[1])


def _explain_order(
    ours: F32Array, theirs: F32Array, order: npt.NDArray[np.int64], limit: float, *, by_rows: bool
) -> str:
    """Whether the file's value heads stand as in the checkpoint, or went through the order twice."""
    axis = 0 if by_rows and len(ours) == len(order) else 1
    signal = float(np.square(theirs, dtype=np.float64).sum())
    for what, candidate in (
        ("value heads stand grouped by key head, as in the checkpoint, not tiled", np.argsort(order)),
        ("value heads were put in tiled order twice", order),
    ):
        error = float(np.square(ours - np.take(theirs, candidate, axis), dtype=np.float64).sum())
        snr = _decibels(signal, error)
        if snr is None or snr >= limit:
            return what
    return ""

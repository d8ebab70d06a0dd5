"""Checks the numbers: those not finite, all zero or far too large, tensors stored twice, norms around a wrong number.

Each tensor is read once, in row chunks. The limits are set where no real weights come near, so that a finding means
something. docs/explain/check.md lists them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import numpy as np

from pocketquant.architectures.hybrid import plus_one
from pocketquant.architectures.table import TensorRule
from pocketquant.check.contents import Contents, Entry
from pocketquant.check.findings import ERROR, WARNING, Finding
from pocketquant.check.structure import rules_by_name
from pocketquant.errors import WeightError
from pocketquant.formats import F32Array
from pocketquant.model import Role

OUTLIER_RATIO = 1024.0
"""A block's largest weight over the tensor's median of that: what a flipped bit in a scale makes, and no training."""
ZERO_RUN = 2048
"""Consecutive weights of zero: what a hole in a download makes."""
LEAST_NORM, MOST_NORM = 0.3, 1.7
_BLOCK = 32
_F16_LARGEST = 65504.0
_UNUSED = 5  # token type of padding

Progress = Callable[[int, int], None]


@dataclass
class _Scan:
    """What one pass over a tensor saw."""

    non_finite: int = 0
    non_finite_row: int = -1
    saturated: int = 0
    non_zero: int = 0
    zero_rows: list[int] = field(default_factory=list)
    zeros: int = 0
    zero_run: int = 0
    zero_run_row: int = -1
    largest_block: float = 0.0
    largest_block_row: int = -1
    median_block: float = 0.0
    digest: bytes = b""
    is_constant: bool = False


def check_weights(contents: Contents, progress: Progress | None = None) -> Iterator[Finding]:
    """Reads every tensor once; SourceError where one cannot be read any more."""
    rules = rules_by_name(contents, contents.table) if contents.table else {}
    same: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    norms: dict[str, dict[str, F32Array]] = {}
    unused = _unused_rows(contents)
    for i, (name, entry) in enumerate(contents.entries.items(), start=1):
        try:
            scan = _scan(entry)
        except WeightError as error:  # an opened checkpoint's rows refuse what is not finite
            advice = "save or download the checkpoint again"
            yield Finding(ERROR, "unreadable", name, str(error), advice)
            continue
        yield from _findings(entry, rules.get(name), scan, unused)
        if scan.non_zero and not scan.is_constant and not scan.non_finite:
            twin = same.setdefault((entry.format, entry.shape, scan.digest), name)
            if twin != name and {twin, name} != {"token_embd.weight", "output.weight"}:
                message = f"the very bytes of {twin}"
                yield Finding(WARNING, "duplicate", name, message, "one of the two was overwritten, or is not needed")
        rule = rules.get(name)
        if rule is not None and rule.role is Role.NORM and not scan.non_finite:
            norms.setdefault(re.sub(r"^blk\.\d+\.", "", name), {})[name] = entry.read(0, 1)[1].reshape(-1)
        if progress is not None:
            progress(i, len(contents.entries))
    yield from _check_head(contents)
    shifted = {rule.target for rule in rules.values() if rule.each is plus_one}
    if shifted:
        yield from _check_norms(norms, shifted)


def _scan(entry: Entry) -> _Scan:
    scan, digest, first, constant = _Scan(), hashlib.blake2b(digest_size=16), None, True
    medians: list[float] = []
    for start, stop in entry.row_chunks():
        raw, values = entry.read(start, stop)
        digest.update(np.ascontiguousarray(raw).data)
        finite = np.isfinite(values)
        if not finite.all():
            scan.non_finite += int(values.size - finite.sum())
            if scan.non_finite_row < 0:
                scan.non_finite_row = start + int(np.flatnonzero(~finite.all(axis=1))[0])
            values = np.where(finite, values, np.float32(0))
        sizes = np.abs(values)
        if entry.format == "F16":
            scan.saturated += int((sizes == _F16_LARGEST).sum())
        n_set = int(np.count_nonzero(sizes))
        scan.non_zero, scan.zeros = scan.non_zero + n_set, scan.zeros + sizes.size - n_set
        if n_set < sizes.size:
            scan.zero_rows += (start + np.flatnonzero(~sizes.any(axis=1))).tolist()
        first = values.flat[0] if first is None else first
        constant = constant and bool((values == first).all())
        _scan_blocks(scan, sizes, start, medians)
    scan.median_block = float(np.median(medians))
    scan.digest, scan.is_constant = digest.digest(), constant
    return scan


def _scan_blocks(scan: _Scan, sizes: F32Array, start: int, medians: list[float]) -> None:
    """Largest weight of every 32 consecutive ones (of a row, where rows are no multiple): outliers and runs of zero."""
    n_cols = sizes.shape[1]
    width = _BLOCK if n_cols % _BLOCK == 0 else n_cols
    blocks = sizes.reshape(-1, width).max(axis=1)
    medians.append(float(np.median(blocks)))
    at = int(blocks.argmax())
    if blocks[at] > scan.largest_block:
        scan.largest_block, scan.largest_block_row = float(blocks[at]), start + at * width // n_cols
    is_zero = np.concatenate([[False], blocks == 0, [False]])
    if is_zero.any():
        edges = np.flatnonzero(np.diff(is_zero.astype(np.int8)))
        lengths = (edges[1::2] - edges[::2]) * width
        longest = int(lengths.argmax())
        if lengths[longest] > scan.zero_run:
            scan.zero_run, scan.zero_run_row = int(lengths[longest]), start + int(edges[::2][longest]) * width // n_cols


def _unused_rows(contents: Contents) -> set[int]:
    """Rows of the embedding and the head that are of no token: padding, which may be anything."""
    types = contents.metadata.get("tokenizer.ggml.token_type")
    if types is None or not isinstance(types.value, list):
        return set()
    return {row for row, kind in enumerate(types.value) if kind == _UNUSED}


def _findings(entry: Entry, rule: TensorRule | None, scan: _Scan, unused: set[int]) -> Iterator[Finding]:
    name, is_matrix = entry.name, len(entry.shape) > 1
    role = rule.role if rule else None
    if scan.non_finite:
        message = f"{scan.non_finite} numbers are infinite or NaN, the first in row {scan.non_finite_row}"
        advice = "the file is damaged, or weights beyond 65504 were written as F16: convert again as BF16 or F32"
        yield Finding(ERROR, "non-finite", name, message, advice)
    elif not scan.non_zero:
        severity = ERROR if is_matrix or role is Role.NORM else WARNING
        yield Finding(
            severity, "all-zero", name, "every number is zero", "the data was never written; make the file again"
        )
        return
    if scan.saturated:
        message = f"{scan.saturated} numbers are exactly +-65504, the largest of F16: they were cut off"
        yield Finding(WARNING, "saturated", name, message, "convert as BF16 or F32")
    of_tokens = role in (Role.EMBED, Role.HEAD)
    empty = [row for row in scan.zero_rows if not (of_tokens and row in unused)] if is_matrix else []
    if empty and (of_tokens or scan.zero_run < ZERO_RUN):
        message = f"{len(empty)} rows are all zero, the first {empty[0]}"
        advice = "a hole in a download, or a pruned model; --source tells which"
        yield Finding(WARNING, "zero-rows", name, message, advice)
    if role is Role.NORM and not is_matrix and scan.zeros and not scan.non_finite:
        message = f"{scan.zeros} of {entry.n_cols} numbers are exactly zero, so these channels are switched off"
        yield Finding(WARNING, "zero-norm", name, message, "a hole in a download; no training makes it")
    if is_matrix and scan.zero_run >= ZERO_RUN and not of_tokens:
        message = f"{scan.zero_run} consecutive zeros from row {scan.zero_run_row} on"
        yield Finding(WARNING, "zero-run", name, message, "a hole in a download, or a pruned model")
    if is_matrix and scan.median_block and scan.largest_block > OUTLIER_RATIO * scan.median_block:
        message = (
            f"row {scan.largest_block_row} reaches {scan.largest_block:.4g}, "
            f"{scan.largest_block / scan.median_block:.3g} times the median block's largest {scan.median_block:.4g}"
        )
        advice = "a damaged scale: compare the file's checksum, or make it again"
        yield Finding(WARNING, "outlier", name, message, advice)


def _check_head(contents: Contents) -> Iterator[Finding]:
    """A head equal to the embedding, also where the two are rounded differently: a sample of rows tells."""
    head, embedding = contents.entries.get("output.weight"), contents.entries.get("token_embd.weight")
    if head is None or embedding is None or head.shape != embedding.shape or not contents.is_file:
        return
    rows = sorted({int(row) for row in np.linspace(0, head.n_rows - 1, 64)})
    pairs = [(head.read(row, row + 1)[1][0], embedding.read(row, row + 1)[1][0]) for row in rows]
    ours, theirs = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    norms = np.linalg.norm(ours) * np.linalg.norm(theirs)
    if np.isfinite(norms) and norms and ours @ theirs / norms > 0.98:
        message = f"holds the same numbers as token_embd.weight: {head.nbytes:,} bytes to no use"
        advice = "the checkpoint ties the two and saved both; leave output.weight out"
        yield Finding(WARNING, "duplicate-head", "output.weight", message, advice)


def _check_norms(norms: dict[str, dict[str, F32Array]], shifted: Collection[str]) -> Iterator[Finding]:
    """Norms by name. A checkpoint's are centred on 0, so + 1 makes them centred on 1, with some below and above.

    Those that are not `shifted`, such as DeltaNet's own, multiply by weight and not by 1 + weight.
    """
    centres = {name: float(np.median(np.concatenate([*parts.values()]))) for name, parts in norms.items()}
    for name, parts in norms.items():
        values, centre = np.concatenate([*parts.values()]), centres[name]
        plain = [place for place, numbers in parts.items() if (numbers == 1).all()]
        if name in shifted and plain and len(plain) < len(parts):
            message = (
                f"every number is 1, so the checkpoint's are zero; {len(parts) - len(plain)} other blocks' are not"
            )
            yield Finding(WARNING, "zero-norm", plain[0], message, "a hole in a download: compare its checksum")
        if name == "output_norm.weight" or not np.isfinite(centre):
            continue
        below_zero, above_one = float((values < 0).mean()), float((values > 1).mean())
        is_plain = name not in shifted
        if not is_plain and abs(centre) < LEAST_NORM and below_zero > 0.1:
            message = f"centred on {centre:.2f} with {100 * below_zero:.0f} % of the numbers below 0: 1 was not added"
            advice = "RMSNorm of this family multiplies by 1 + weight; convert with a tool that adds it"
            yield Finding(ERROR, "norm-centre", name, message, advice)
        elif MOST_NORM < centre < 2.3 and above_one > 0.99:
            twice = not is_plain and _agree(centres)
            message = f"centred on {centre:.2f} with next to nothing below 1: 1 was added " + (
                "to the one norm that does without" if is_plain else "twice"
            )
            advice = "checkpoints saved by MLX hold 1 + weight already; compare with the original by --source"
            yield Finding(ERROR if twice else WARNING, "norm-centre", name, message, advice)


def _agree(centres: dict[str, float]) -> bool:
    """Whether both norms of every block say so: one alone may be trained that far."""
    return all(MOST_NORM < centres.get(f"{name}.weight", 2.0) < 2.3 for name in ("attn_norm", "post_attention_norm"))

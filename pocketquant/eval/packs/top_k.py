"""The most likely tokens of a reference: a pack of a few megabytes, and what can be computed from it.

For each position the pack keeps the k most likely tokens with their log-probabilities, the probability of all other
tokens together, and that of the token that came next. A comparison spreads the probability of the others as the judged
model does. Every metric can then be computed as from whole rows. The divergence is that over k + 2 classes: the tokens
kept, the right one, and "another". Merging classes never raises a divergence (the log-sum inequality), so it is a lower
bound: a file that fails a limit on it fails the limit.

Log-probabilities are stored as u16 in steps of 1/2048 nat down to -32, which is a divergence of about 1e-8 nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from pocketquant.errors import EvalError
from pocketquant.formats import F32Array, U8Array

MIN_TOP, MAX_TOP = 8, 4096
_STEP = 2048.0

I32Array = npt.NDArray[np.int32]
F64Array = npt.NDArray[np.float64]


def row_dtype(n_vocab: int, top: int) -> np.dtype[Any]:
    """One scored position as it is stored; `next` is NaN where the reference's logits are not finite."""
    token = "<u2" if n_vocab <= 1 << 16 else "<u4"
    return np.dtype([("tokens", token, (top,)), ("logs", "<u2", (top,)), ("next", "<f4"), ("rest", "<f4")])


def check_top(top: int, n_vocab: int) -> None:
    """Raises EvalError for a number of tokens that no pack can keep."""
    if not MIN_TOP <= top <= min(MAX_TOP, n_vocab - 2):
        raise EvalError(f"--top-k {top}: keep from {MIN_TOP} to {min(MAX_TOP, n_vocab - 2)} tokens; 64 is usual")


def encode_top(logits: F32Array, next_tokens: I32Array, top: int) -> U8Array:
    """Logits f32[n, n_vocab] and the tokens that came next i32[n] -> u8[n, row_bytes]."""
    rows = np.zeros(len(logits), row_dtype(logits.shape[1], top))
    for row, values, token in zip(rows, logits, next_tokens.tolist(), strict=True):
        if not np.isfinite(values).all():
            row["next"] = np.nan
            continue
        wide = values.astype(np.float64)
        wide -= wide.max()
        wide -= np.log(np.exp(wide).sum())
        chosen = np.argpartition(-values, top)[:top]
        chosen = chosen[np.lexsort((chosen, -wide[chosen]))]
        others = np.exp(wide)
        others[chosen] = 0.0
        row["tokens"] = chosen
        row["logs"] = np.minimum(np.rint(-wide[chosen] * _STEP), 65535)
        row["next"] = wide[token]
        row["rest"] = np.log(max(others.sum(), 1e-30))
    return rows.view(np.uint8).reshape(len(rows), -1)


@dataclass(frozen=True)
class TopRows:
    """Stored positions, to be completed with the rows of a model.

    Attributes:
        rows: `row_dtype`[n].
        next_tokens: i32[n], the token that really came next.
    """

    rows: npt.NDArray[np.void]
    next_tokens: I32Array

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> TopRows:
        return TopRows(self.rows[part], self.next_tokens[part])

    def completed(self, model: F32Array) -> F32Array:
        """The reference's logits f32[n, n_vocab], what is not stored spread as in the model's f32[n, n_vocab].

        Where the model's row is not finite the result is zero, so that the model alone counts as broken.
        """
        out = np.array(model, np.float32, order="C")
        tokens, logs = self.rows["tokens"].astype(np.int64), self.rows["logs"].astype(np.float64) / -_STEP
        after, rest = self.rows["next"].astype(np.float64), self.rows["rest"].astype(np.float64)
        _complete(out, tokens, logs, self.next_tokens.astype(np.int64), after, rest)
        return out


def decode_top(data: U8Array, next_tokens: I32Array, n_vocab: int, top: int) -> TopRows:
    """Reads u8[n, row_bytes].

    Raises:
        EvalError: the rows hold what no reference says.
    """
    rows = np.ascontiguousarray(data).reshape(-1).view(row_dtype(n_vocab, top))
    known = rows[~np.isnan(rows["next"])]
    tokens = np.sort(known["tokens"].astype(np.int64), axis=1)
    mass = np.exp(known["logs"].astype(np.float64) / -_STEP).sum(axis=1)
    logs = np.stack([known["next"], known["rest"]]).astype(np.float64)
    is_sound = (
        (tokens < n_vocab).all()
        and (np.diff(tokens, axis=1) > 0).all()
        and bool(np.isfinite(logs).all() and (logs < 1e-3).all() and (logs > -1e4).all())
    )
    if not is_sound or (np.abs(mass + np.exp(logs[1]) - 1) > 0.01).any():
        raise EvalError("the reference pack holds impossible probabilities; make it again")
    return TopRows(rows, next_tokens)


@numba.njit(nogil=True, cache=True)
def _complete(
    out: F32Array,
    tokens: npt.NDArray[np.int64],
    logs: F64Array,
    next_tokens: npt.NDArray[np.int64],
    after: F64Array,
    rest: F64Array,
) -> None:
    n_vocab, top = out.shape[1], tokens.shape[1]
    for i in range(len(out)):
        row = out[i]
        largest, is_finite = -np.inf, True
        for j in range(n_vocab):
            is_finite &= bool(np.isfinite(row[j]))
            largest = max(largest, np.float64(row[j]))
        if np.isnan(after[i]) or not is_finite:
            row[:] = np.nan if np.isnan(after[i]) else 0.0
            continue
        is_kept = False
        for j in range(top):
            is_kept |= tokens[i, j] == next_tokens[i]
        # log of what the model gives to all tokens that are not stored
        for j in range(top):
            row[tokens[i, j]] = -np.inf
        if not is_kept:
            row[next_tokens[i]] = -np.inf
        total = 0.0
        for j in range(n_vocab):
            total += np.exp(np.float64(row[j]) - largest)
        log_model = largest + np.log(max(total, 1e-300))
        log_rest = rest[i]
        if not is_kept:
            log_rest = np.log(max(np.exp(rest[i]) - np.exp(after[i]), 1e-30))
        # the others keep the model's logits; those stored are put at their distance from them
        for j in range(top):
            row[tokens[i, j]] = np.float32(logs[i, j] - log_rest + log_model)
        if not is_kept:
            row[next_tokens[i]] = np.float32(after[i] - log_rest + log_model)

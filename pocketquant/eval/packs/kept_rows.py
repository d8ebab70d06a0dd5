"""The rows of a reference pack, one for each position: hidden states, or the most likely tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketquant.errors import EvalError
from pocketquant.eval.packs.pack import Floor
from pocketquant.eval.packs.pack_error import FloorMeter
from pocketquant.eval.packs.states import Head, codings_for, decode_states, encode_states, measure_codings, row_bytes
from pocketquant.eval.packs.top_k import check_top, decode_top, encode_top, row_dtype
from pocketquant.formats import F32Array, U8Array

MAX_SHARE = 0.02
"""The coding of a stored state takes at most this share of the logits in llama-perplexity's base file."""


class _Keeper:
    """Stores rows. `state` is plain data for JSON, from which another keeper can go on."""

    def __init__(self) -> None:
        self.meter = FloorMeter()
        self.coding = ""

    def state(self) -> dict[str, Any]:
        return {"coding": self.coding, "floor": self.meter.state()}

    def take_up(self, state: Mapping[str, Any]) -> None:
        self.coding = str(state.get("coding"))
        self.meter.take_up(state.get("floor", {}))

    def floor(self) -> Floor:
        return self.meter.floor()


class StateKeeper(_Keeper):
    """Stores hidden states, in the coding that reproduces the logits of the first group best."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self._head = head

    def take_up(self, state: Mapping[str, Any]) -> None:
        super().take_up(state)
        if self.coding not in codings_for(self._head.n_embd):
            raise EvalError(f"what was saved of the pack names no coding of its states ({self.coding!r}); begin anew")

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.coding, self._head.n_embd)

    def keep(self, states: F32Array | None, logits: F32Array, after: Any, *, is_measured: bool) -> U8Array:
        assert states is not None
        if not self.coding:
            means = measure_codings(self._head, states, logits)
            self.coding = min(fitting_codings(self._head.n_embd, self._head.n_vocab), key=lambda name: means[name])
        coded = encode_states(self.coding, states)
        if is_measured:
            given = self._head.logits(decode_states(self.coding, coded, self._head.n_embd))
            self.meter.add(logits, lambda _: given)
        return coded


class TopKeeper(_Keeper):
    """Stores the most likely tokens, and measures the share of a divergence that they show."""

    def __init__(self, n_vocab: int, top: int) -> None:
        super().__init__()
        check_top(top, n_vocab)
        self._n_vocab, self._top = n_vocab, top
        self.row_bytes = row_dtype(n_vocab, top).itemsize

    def keep(self, states: F32Array | None, logits: F32Array, after: Any, *, is_measured: bool) -> U8Array:
        coded = encode_top(logits, after, self._top)
        if is_measured:
            self.meter.add(logits, decode_top(coded, after, self._n_vocab, self._top).completed)
        return coded


def fitting_codings(n_embd: int, n_vocab: int) -> tuple[str, ...]:
    """The codings of a state within `MAX_SHARE`; all codings if none is, as with small vocabularies."""
    every = codings_for(n_embd)
    limit = MAX_SHARE * 2 * n_vocab
    return tuple(coding for coding in every if row_bytes(coding, n_embd) <= limit) or every

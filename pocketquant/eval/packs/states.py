"""Final hidden states: copied while llama.cpp computes, stored in few bytes, and turned into logits again.

A model's logits are its final hidden states times its output matrix. llama.cpp multiplies by an F32 matrix in F32, but
for a BF16, F16 or Q8_0 matrix it first rounds the states to that type. States stored in the same type therefore give
the same logits, up to the order of the sums. The type depends on the machine that computes, so it is measured
(`measure_codings`) and not assumed.

Source: ggml/src/ggml-cpu/ggml-cpu.c of llama.cpp (b10359), `type_traits_cpu` (`vec_dot_type`);
src/models/qwen35.cpp, "result_norm".
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from pocketquant.errors import EvalError
from pocketquant.eval.packs.pack import HeadIdentity
from pocketquant.eval.packs.pack_error import mean_divergence
from pocketquant.formats import FORMATS, F32Array, U8Array
from pocketquant.llama.ggml import ggml_function
from pocketquant.llama.library import require_runtime
from pocketquant.model import Tensor

CODINGS = ("f24", "bf16", "f16", "q8_0")
"""f24 is F32 without its last 8 bits, rounded to nearest; the others are GGML's types."""

CACHED_BYTES = 1 << 30
"""A decoded output matrix is kept in memory up to this size; a larger one is decoded anew for every group of rows."""

_FINAL_STATES = b"result_norm"
_NAN = {"f24": b"\0\xc0\x7f", "bf16": b"\xc0\x7f", "f16": b"\0\x7e", "q8_0": b"\0\x7e" + bytes([1]) * 32}
_HEAD_BYTES = 1 << 25


def row_bytes(coding: str, n_embd: int) -> int:
    """Bytes of one stored state."""
    return 3 * n_embd if coding == "f24" else FORMATS[coding.upper()].row_bytes(n_embd)


def codings_for(n_embd: int) -> tuple[str, ...]:
    """The codings that a state of this width can have."""
    return tuple(coding for coding in CODINGS if coding != "q8_0" or n_embd % 32 == 0)


def encode_states(coding: str, states: F32Array) -> U8Array:
    """f32[n, n_embd] -> u8[n, row_bytes]; a row that is not finite, or not in this coding, becomes NaN throughout."""
    is_finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(states).all(axis=1))
    clean = np.ascontiguousarray(np.where(is_finite[:, None], states, np.float32(0)), "<f4")
    if coding == "f24":
        bits = clean.view("<u4")
        rounded = bits + (np.uint32(0x7F) + ((bits >> np.uint32(8)) & np.uint32(1)))
        coded = np.ascontiguousarray(rounded).view(np.uint8).reshape(len(states), -1, 4)[:, :, 1:]
        coded = coded.reshape(len(states), -1)
    elif coding == "f16":
        with np.errstate(over="ignore"):
            coded = clean.astype("<f2").view(np.uint8)
    else:
        coded = FORMATS[coding.upper()].encode(clean)
    coded = np.array(coded)
    is_finite &= np.isfinite(decode_states(coding, coded, states.shape[1])).all(axis=1)
    coded[~is_finite] = np.frombuffer(_NAN[coding] * (coded.shape[1] // len(_NAN[coding])), np.uint8)
    return coded


def decode_states(coding: str, data: U8Array, n_embd: int) -> F32Array:
    """u8[n, row_bytes] -> f32[n, n_embd]."""
    if coding != "f24":
        return FORMATS[coding.upper()].decode(data, n_embd)
    words = np.zeros((len(data), n_embd, 4), np.uint8)
    words[:, :, 1:] = data.reshape(len(data), n_embd, 3)
    return words.reshape(len(data), -1).view("<f4")


class Head:
    """An output matrix, ready to multiply: `tensor` is [n_vocab, n_embd]."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.n_vocab, self.n_embd = tensor.n_rows, tensor.n_cols
        is_small = 4 * self.n_vocab * self.n_embd <= CACHED_BYTES
        self._cached = tensor.rows(0, self.n_vocab) if is_small else None
        self._step = max(_HEAD_BYTES // (4 * self.n_embd), 1)

    @property
    def stored_size(self) -> int:
        """Bytes of the matrix as its source stores it."""
        return self.n_vocab * FORMATS[self._tensor.dtype].row_bytes(self.n_embd)

    def stored_bytes(self) -> Iterator[U8Array]:
        """The matrix as its source stores it, in pieces."""
        for start, stop in self._pieces():
            stored = self._tensor.source.stored(start, stop)
            if stored is None:
                stored = FORMATS[self._tensor.dtype].encode(self._tensor.rows(start, stop))
            yield stored

    def identify(self) -> HeadIdentity:
        """Name, type, width and digest."""
        digest = hashlib.sha256()
        for piece in self.stored_bytes():
            digest.update(np.ascontiguousarray(piece).data)
        return HeadIdentity(self._tensor.name, self._tensor.dtype, self.n_embd, digest.hexdigest())

    def logits(self, states: F32Array) -> F32Array:
        """f32[n, n_embd] -> f32[n, n_vocab]."""
        if self._cached is not None:
            return np.ascontiguousarray(states @ self._cached.T)
        out = np.empty((len(states), self.n_vocab), np.float32)
        for start, stop in self._pieces():
            out[:, start:stop] = states @ self._tensor.rows(start, stop).T
        return out

    def _pieces(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.n_vocab, self._step):
            yield start, min(start + self._step, self.n_vocab)


def measure_codings(head: Head, states: F32Array, logits: F32Array) -> Mapping[str, float]:
    """Mean divergence of the logits that each coding gives back from the live ones, inf where some are lost."""
    means = {}
    for coding in codings_for(head.n_embd):
        given = decode_states(coding, encode_states(coding, states), head.n_embd)
        means[coding] = mean_divergence(logits, head.logits(given))
    return means


class StateCatcher:
    """Copies the final hidden states out of llama.cpp's graph; give `see` to `open_runtime` as `observe`."""

    def __init__(self) -> None:
        library = require_runtime()
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._name = ggml_function(library, "ggml_get_name", ctypes.c_char_p, pointer)
        self._nbytes = ggml_function(library, "ggml_nbytes", size, pointer)
        self._copy = ggml_function(library, "ggml_backend_tensor_get", None, pointer, pointer, size, size)
        self._caught: list[U8Array] = []

    def see(self, address: int, ask: bool) -> bool:
        """llama.cpp's question whether a node is wanted, and then its answer."""
        is_wanted = bool(self._name(address) == _FINAL_STATES)
        if is_wanted and not ask:
            data = np.empty(self._nbytes(address), np.uint8)
            self._copy(address, data.ctypes.data, 0, data.size)
            self._caught.append(data)
        return is_wanted or not ask

    def take(self, n_rows: int, n_embd: int) -> F32Array:
        """The states f32[n_rows, n_embd] caught since the last call.

        Raises:
            EvalError: llama.cpp's graph did not show them, or shows others.
        """
        caught, self._caught = self._caught, []
        found = [len(data) for data in caught if len(data)]
        if found != [4 * n_rows * n_embd]:
            raise EvalError(
                f"the installed llama-cpp-python shows {found} bytes of final hidden states, expected "
                f"{4 * n_rows * n_embd}; install the version that pocketquant asks for, or keep the most likely tokens "
                "only (--top-k)"
            )
        return next(data for data in caught if len(data)).view("<f4").reshape(n_rows, n_embd)

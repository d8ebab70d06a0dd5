"""Reads the inputs of weights from llama.cpp's memory while it computes a graph.

llama.cpp calls back before and after each node of its graph; a node is a `ggml_tensor`, a C structure that the binding
has no definition of. `_Node` is its layout, and `_check_layout` builds known tensors with the loaded library and
compares every field read here before any model is run, so that another layout is refused and never misread.

Source: ggml/include/ggml.h (`ggml_tensor`), ggml/src/ggml-backend.cpp (`ggml_backend_sched_compute_splits`) and
tools/imatrix/imatrix.cpp of llama.cpp (b10359): which multiplications count, and how their rows are summed.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any, Protocol

import numba
import numpy as np
import numpy.typing as npt

from pocketquant.errors import EvalError
from pocketquant.formats import F32Array
from pocketquant.llama.ggml import ggml_function
from pocketquant.llama.library import require_runtime

F64Array = npt.NDArray[np.float64]
I32Array = npt.NDArray[np.int32]
I64Array = npt.NDArray[np.int64]

_F32, _I32 = 0, 26
"""GGML_TYPE_F32 and GGML_TYPE_I32; types are never renumbered, because files hold them."""

_BEFORE_HEAD = b"result_norm"
"""llama.cpp's name for the hidden states that go into the output matrix; nothing after them is of interest."""

_BEFORE_DRAFT_HEAD = b"mtp_shared_head_norm"
"""The same in the graph of a multi-token-prediction block."""

_HIDDEN = b"h_nextn"
"""The hidden states of all tokens after the last norm, which a multi-token-prediction block starts from."""


class _Node(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
    )


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@dataclass(frozen=True)
class Matmul:
    """A matrix product with a weight that llama.cpp has just computed.

    Attributes:
        weight: name of the tensor.
        inner: matrices of the weight, inner and outer dimension; [n_expert, 1] where rows are routed.
        inputs: f32[a, b, n_token, n_cols], or f32[1, n_token, n_used or 1, n_cols] where rows are routed; a view into
            a buffer that the next matrix product overwrites.
        chosen: i32[n_token, n_used], the experts that each row is sent to; None for a plain matrix product.
    """

    weight: str
    inner: tuple[int, int]
    inputs: F32Array
    chosen: I32Array | None


class Accumulator(Protocol):
    """Takes the inputs of weights and sums them up."""

    def wants(self, weight: str) -> bool:
        """Whether the inputs of this weight are wanted."""
        ...

    def is_past(self, weight: str) -> bool:
        """Whether nothing from this weight on is wanted; the graph ends there."""
        ...

    def wants_hidden(self) -> bool:
        """Whether the inputs of the output matrix are wanted; otherwise the graph ends before it."""
        ...

    def add(self, matmul: Matmul) -> None:
        """Takes the inputs of a matrix product; raises EvalError where they are not finite or make no sense."""
        ...

    def add_hidden(self, hidden: F32Array) -> None:
        """Takes the inputs of the output matrix, f32[n_token, n_embd], a view as above."""
        ...


@dataclass
class InputSums:
    """Sums over the inputs of each weight of a block.

    Attributes:
        sums: weight -> f64[n_matrix, n_cols], squared inputs.
        counts: weight -> i64[1] inputs summed, or i64[n_expert] for experts.
        n_used: weight of experts -> experts that each token is sent to.
    """

    sums: dict[str, F64Array] = field(default_factory=dict)
    counts: dict[str, I64Array] = field(default_factory=dict)
    n_used: dict[str, int] = field(default_factory=dict)

    def copy(self) -> InputSums:
        """The sums as they are now."""
        sums = {name: array.copy() for name, array in self.sums.items()}
        return InputSums(sums, {name: array.copy() for name, array in self.counts.items()}, dict(self.n_used))

    def wants(self, weight: str) -> bool:
        return weight.startswith("blk.")

    def is_past(self, weight: str) -> bool:
        return False

    def wants_hidden(self) -> bool:
        return False

    def add_hidden(self, hidden: F32Array) -> None:
        raise NotImplementedError("is not asked for")

    def add(self, matmul: Matmul) -> None:
        name, inputs, (n_inner, n_outer) = matmul.weight, matmul.inputs, matmul.inner
        n_matrix, n_cols = n_inner * n_outer, inputs.shape[3]
        is_routed = matmul.chosen is not None
        if matmul.chosen is not None:
            self.n_used[name] = matmul.chosen.shape[1]
        sums = self.sums.setdefault(name, np.zeros((n_matrix, n_cols)))
        counts = self.counts.setdefault(name, np.zeros(n_matrix if is_routed else 1, np.int64))
        if sums.shape != (n_matrix, n_cols):
            raise EvalError(f"{name}: {n_cols} inputs at one place of the graph, {sums.shape[1]} at another")
        if is_routed:
            _add_routed(inputs[0], matmul.chosen, sums, counts)
        else:
            _add_squares(inputs, n_inner, n_outer, sums)
            counts += inputs.shape[0] * inputs.shape[1] * inputs.shape[2] // n_matrix
        if not np.isfinite(sums).all():
            raise not_finite(name)


def not_finite(name: str) -> EvalError:
    """The error for a weight whose inputs are not finite."""
    return EvalError(f"{name}: its input is not finite; the model is damaged, or overflows in this precision")


class Observer:
    """Passes the inputs of weights to an accumulator; give `see` to `open_runtime` as `observe`.

    Attributes:
        hidden: the trunk's hidden states after the last norm, f32[n_token, n_embd] of each batch; None to keep none.
    """

    def __init__(self, accumulator: Accumulator) -> None:
        library = require_runtime()
        self._accumulator = accumulator
        self.hidden: list[F32Array] | None = None
        self._ggml = _bind(library)
        self._multiply, self._multiply_experts = _check_layout(self._ggml)
        self._bytes = np.empty(0, np.uint8)

    def see(self, address: int, ask: bool) -> bool:
        """llama.cpp's question whether a node is wanted, and then its answer; False to an answer ends the graph."""
        node = _Node.from_address(address)
        if node.op == self._multiply or node.op == self._multiply_experts:
            name = weight_name(self._name(node.src[0]))
            if self._accumulator.is_past(name):
                return ask  # asked: yes, to be called again; then: no, to end the graph
            if not self._accumulator.wants(name):
                return False
            if not ask:
                self._add(name, node)
            return True
        label = self._ggml.ggml_get_name(address)
        if label == _HIDDEN and self.hidden is not None:
            if not ask:
                self.hidden.append(self._read(address, node, np.dtype("<f4"))[0, 0].copy())
            return True
        if label not in (_BEFORE_HEAD, _BEFORE_DRAFT_HEAD):
            return False
        # the product with the output matrix costs more than any other: stop before it unless it is wanted
        if not ask and self._accumulator.wants_hidden():
            self._accumulator.add_hidden(self._read(address, node, np.dtype("<f4"))[0, 0])
            return True
        return ask

    def _name(self, address: int) -> str:
        return bytes(self._ggml.ggml_get_name(address)).decode(errors="replace")

    def _add(self, name: str, node: _Node) -> None:
        weight, given = _Node.from_address(node.src[0]), _Node.from_address(node.src[1])
        if given.type != _F32 or given.nb[0] != 4:
            raise EvalError(f"{name}: llama.cpp multiplies it by numbers of GGML type {given.type}, expected plain F32")
        inputs = self._read(node.src[1], given, np.dtype("<f4"))
        n_matrix, chosen = weight.ne[2] * weight.ne[3], None
        if node.op == self._multiply_experts:
            chosen = self._read(node.src[2], _Node.from_address(node.src[2]), np.dtype("<i4"))[0, 0]
            if chosen.shape[0] != inputs.shape[1] or chosen.min() < 0 or chosen.max() >= n_matrix:
                raise EvalError(f"{name}: llama.cpp routes to experts that it does not have")
        self._accumulator.add(Matmul(name, (weight.ne[2], weight.ne[3]), inputs, chosen))

    def _read(self, address: int, node: _Node, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A tensor's numbers, wherever its buffer is, with its strides; a view until the next call of its size."""
        nbytes = self._ggml.ggml_nbytes(address)
        if dtype.kind == "i" and node.type != _I32:
            raise EvalError(f"llama.cpp routes by numbers of GGML type {node.type}, expected I32")
        data = np.empty(nbytes, np.uint8) if dtype.kind == "i" else self._buffer(nbytes)
        self._ggml.ggml_backend_tensor_get(address, data.ctypes.data, 0, nbytes)
        return np.ndarray(tuple(node.ne)[::-1], dtype, data.data, 0, tuple(node.nb)[::-1])

    def _buffer(self, nbytes: int) -> npt.NDArray[np.uint8]:
        if self._bytes.size < nbytes:
            self._bytes = np.empty(nbytes, np.uint8)
        return self._bytes[:nbytes]


def weight_name(name: str) -> str:
    """The weight's own name from that of its copy on another device: `CUDA0#blk.0.attn_k.weight#0`."""
    parts = name.split("#")
    return parts[1] if len(parts) > 1 else name


@numba.njit(nogil=True, cache=True)
def _add_squares(inputs: F32Array, n_inner: int, n_outer: int, sums: F64Array) -> None:
    for i in range(inputs.shape[0]):
        for j in range(inputs.shape[1]):
            total = sums[(i % n_outer) * n_inner + j % n_inner]
            for row in range(inputs.shape[2]):
                for column in range(inputs.shape[3]):
                    total[column] += np.float64(inputs[i, j, row, column]) ** 2


@numba.njit(nogil=True, cache=True)
def _add_routed(inputs: F32Array, chosen: I32Array, sums: F64Array, counts: I64Array) -> None:
    # inputs [n_token, n_used or 1, n_cols], chosen [n_token, n_used]
    for token in range(chosen.shape[0]):
        for place in range(chosen.shape[1]):
            expert = chosen[token, place]
            row = inputs[token, place % inputs.shape[1]]
            counts[expert] += 1
            for column in range(row.shape[0]):
                sums[expert, column] += np.float64(row[column]) ** 2


def _bind(library: Any) -> Any:
    """ggml's functions in the very library that computes; looked up through llama.cpp's, which depends on it."""
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_get_name": (ctypes.c_char_p, [pointer]),
        "ggml_nbytes": (size, [pointer]),
        "ggml_backend_tensor_get": (None, [pointer, pointer, size, size]),
        "ggml_init": (pointer, [_InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor_2d": (pointer, [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
        "ggml_new_tensor_3d": (pointer, [pointer, ctypes.c_int, *[ctypes.c_int64] * 3]),
        "ggml_view_2d": (pointer, [pointer, pointer, ctypes.c_int64, ctypes.c_int64, size, size]),
        "ggml_set_name": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_mul_mat": (pointer, [pointer] * 3),
        "ggml_mul_mat_id": (pointer, [pointer] * 4),
        "ggml_op_name": (ctypes.c_char_p, [ctypes.c_int]),
    }

    class Ggml:
        pass

    bound: Any = Ggml()
    for name, (result, arguments) in signatures.items():
        try:
            setattr(bound, name, ggml_function(library, name, result, *arguments))
        except EvalError as error:
            raise _unknown_layout(f"the library shows no {name}") from error
    return bound


def _check_layout(ggml: Any) -> tuple[int, int]:
    """The numbers of MUL_MAT and MUL_MAT_ID, once tensors of known content read back as `_Node` says.

    Raises:
        EvalError: the loaded library lays its tensors out in another way.
    """
    context = ggml.ggml_init(_InitParams(1 << 16, None, True))
    if not context:
        raise _unknown_layout("it cannot make a tensor")
    try:
        experts = ggml.ggml_new_tensor_3d(context, _F32, 96, 7, 5)
        rows = ggml.ggml_new_tensor_3d(context, _F32, 96, 3, 11)
        chosen = ggml.ggml_view_2d(context, ggml.ggml_new_tensor_2d(context, _I32, 5, 11), 3, 11, 20, 0)
        matrix, columns = (ggml.ggml_new_tensor_2d(context, _F32, 96, n) for n in (7, 13))
        ggml.ggml_set_name(matrix, b"blk.0.known.weight")
        products = {
            b"MUL_MAT": (ggml.ggml_mul_mat(context, matrix, columns), (matrix, columns, None), (7, 13, 1, 1)),
            b"MUL_MAT_ID": (
                ggml.ggml_mul_mat_id(context, experts, rows, chosen),
                (experts, rows, chosen),
                (7, 3, 11, 1),
            ),
        }
        shapes = {
            experts: (_F32, (96, 7, 5, 1), (4, 384, 2688, 13440)),
            rows: (_F32, (96, 3, 11, 1), (4, 384, 1152, 12672)),
            chosen: (_I32, (3, 11, 1, 1), (4, 20, 220, 220)),
            matrix: (_F32, (96, 7, 1, 1), (4, 384, 2688, 2688)),
        }
        for address, expected in shapes.items():
            node = _Node.from_address(address)
            found = (node.type, tuple(node.ne), tuple(node.nb))
            if found != expected:
                raise _unknown_layout(f"a tensor of {expected} reads as {found}")
        if ggml.ggml_get_name(matrix) != b"blk.0.known.weight":
            raise _unknown_layout("a tensor does not keep its name")
        for name, (address, sources, shape) in products.items():
            node = _Node.from_address(address)
            if tuple(node.src[:3]) != sources or tuple(node.ne) != shape or ggml.ggml_op_name(node.op) != name:
                raise _unknown_layout(f"a {name.decode()} does not read as one")
        return tuple(_Node.from_address(address).op for address, _, _ in products.values())  # type: ignore[return-value]
    finally:
        ggml.ggml_free(context)


def _unknown_layout(what: str) -> EvalError:
    return EvalError(
        f"the installed llama-cpp-python keeps its tensors in a way that is not known here ({what}); install the "
        "version that pocketquant asks for, or make the importance matrix with llama.cpp's llama-imatrix"
    )

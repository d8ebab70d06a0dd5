"""bitsandbytes: 4-bit codes of a table (NF4, FP4) with a scale for each block, and LLM.int8().

    4 bits   weight U8[n / 2, 1] (high half first, rows one after another), weight.quant_map F32[16],
             weight.absmax F32[blocks], weight.quant_state.bitsandbytes__nf4 U8: JSON with blocksize, dtype, shape
    nested   weight.absmax U8[blocks], weight.nested_absmax F32, weight.nested_quant_map F32[256], nested_offset in JSON
    8 bits   weight I8[r, c], SCB F32[r]: weight * SCB / 127

4-bit results have the type the JSON names, 8-bit ones are F32. Source: bitsandbytes 0.50.2 functional.py
`QuantState`, backends/default/ops.py `_dequantize_4bit_compute`, _ops.py `int8_vectorwise_dequant`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import numpy as np

from pocketquant.convert.quantized.numbers import floats, nibbles
from pocketquant.convert.quantized.tensor import DequantizedTensor, Reads, check_shape, part
from pocketquant.convert.safetensors import StoredTensor
from pocketquant.errors import SourceError
from pocketquant.files.small import parse_json
from pocketquant.formats import F32Array

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_MAX_STATE_BYTES = 1 << 16
_STATE = ".quant_state.bitsandbytes__"
_INV_127 = np.float32(7.874015718698502e-3)


@dataclass(frozen=True)
class Nested:
    """Scales that are quantized themselves: table[absmax] * scale of their block + offset."""

    absmax: StoredTensor
    table: StoredTensor
    block_len: int
    offset: float


@dataclass(frozen=True)
class BlockRows:
    """table[code] * absmax of the block; f32 arithmetic. Blocks run through the rows."""

    codes: StoredTensor
    table: StoredTensor
    absmax: StoredTensor
    nested: Nested | None
    block_len: int
    n_cols: int
    reads: Reads

    def values(self, start: int, stop: int) -> F32Array:
        first, last = start * self.n_cols, stop * self.n_cols
        packed = self.codes.file.read(self.codes.offset + first // 2, -(-last // 2) - first // 2)
        codes = nibbles(packed, high_first=True)[first % 2 :][: last - first]
        values = self.reads.floats(self.table)[codes]
        block = np.arange(first, last) // self.block_len
        scale = self._absmax(int(block[0]), int(block[-1]) + 1)[block - block[0]]
        return (values * scale).reshape(stop - start, self.n_cols)

    def _absmax(self, start: int, stop: int) -> F32Array:
        if self.nested is None:
            return floats(self.reads.words(self.absmax).reshape(-1)[start:stop], self.absmax.dtype)
        codes = self.reads.words(self.absmax).reshape(-1)[start:stop]
        outer = self.reads.floats(self.nested.absmax).reshape(-1)[np.arange(start, stop) // self.nested.block_len]
        return self.reads.floats(self.nested.table)[codes] * outer + np.float32(self.nested.offset)


@dataclass(frozen=True)
class Int8Rows:
    """weight * SCB * (1 / 127) in this order; f32 arithmetic."""

    weight: StoredTensor
    scale: StoredTensor
    reads: Reads

    def values(self, start: int, stop: int) -> F32Array:
        values = self.weight.words(start, stop).view(np.int8).astype(np.float32)
        return values * self.reads.floats(self.scale).reshape(-1, 1)[start:stop] * _INV_127


def four_bit_tensor(name: str, stored: Mapping[str, StoredTensor], reads: Reads) -> tuple[DequantizedTensor, set[str]]:
    """The tensor `name`, and the names of its parts. Reads the JSON of its state.

    Raises:
        SourceError: parts missing, of other shapes, or a state that contradicts them.
    """
    states = [f"{name}{_STATE}{kind}" for kind in ("nf4", "fp4") if f"{name}{_STATE}{kind}" in stored]
    if len(states) != 1:
        raise SourceError(
            f"{len(states)} quantization states ({_STATE}nf4, fp4), expected one; save the checkpoint again"
        )
    codes, state = stored[name], _read_state(part(stored, states[0], ("U8",)), reads)
    shape, block_len = state.get("shape"), state.get("blocksize")
    dtype = _DTYPES.get(str(state.get("dtype")))
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int or n < 1 for n in shape):
        raise SourceError(f"{states[0]}: shape {shape!r} is no matrix")
    if type(block_len) is not int or block_len < 1 or dtype is None:
        raise SourceError(f"{states[0]}: blocksize {block_len!r}, dtype {state.get('dtype')!r} are unknown")
    n_weights = prod(shape)
    if prod(codes.shape) != -(-n_weights // 2):
        raise SourceError(f"{name} holds {prod(codes.shape)} bytes, {shape} takes {-(-n_weights // 2)}")
    n_blocks = -(-n_weights // block_len)
    table = part(stored, f"{name}.quant_map", ("F32",))
    check_shape(table, (16,))
    nested = _nested(name, stored, state, n_blocks)
    absmax = part(stored, f"{name}.absmax", ("U8",) if nested else ("F32",))
    check_shape(absmax, (n_blocks,))
    decoder = BlockRows(codes, table, absmax, nested, block_len, shape[1], reads)
    names = {name, states[0]} | ({f"{name}.{suffix}" for suffix in _PARTS} & stored.keys())
    kind = f"bitsandbytes {states[0].removeprefix(name + _STATE).upper()}{', nested' if nested else ''}"
    return DequantizedTensor(name, codes.file, dtype, (shape[0], shape[1]), kind, decoder), names


def eight_bit_tensor(name: str, stored: Mapping[str, StoredTensor], reads: Reads) -> tuple[DequantizedTensor, set[str]]:
    """The tensor `name` with its module's SCB, and the names of its parts; SourceError as above."""
    module = name.removesuffix(".weight")
    weight, scale = stored[name], part(stored, f"{module}.SCB", ("F32", "F16", "BF16"))
    if len(weight.shape) != 2:
        raise SourceError(f"I8 {list(weight.shape)}, expected a matrix")
    check_shape(scale, (weight.shape[0],))
    names = {name, scale.name}
    layout = stored.get(f"{module}.weight_format")
    if layout is not None:  # 0 is row by row; others are tiles of one kind of GPU
        if prod(layout.shape) != 1 or reads.words(layout).any():
            raise SourceError(f"{layout.name}: stored in the tiles of a GPU; save it with bitsandbytes 0.45 or later")
        names.add(layout.name)
    decoder = Int8Rows(weight, scale, reads)
    return DequantizedTensor(name, weight.file, "F32", weight.shape, "bitsandbytes 8-bit", decoder), names


def _read_state(tensor: StoredTensor, reads: Reads) -> dict[str, Any]:
    if prod(tensor.shape) > _MAX_STATE_BYTES:
        raise SourceError(f"{tensor.name}: {prod(tensor.shape)} bytes are too many for a quantization state")
    state = parse_json(reads.words(tensor).tobytes(), tensor.name)
    if not isinstance(state, dict):
        raise SourceError(f"{tensor.name}: no JSON object")
    return state


def _nested(name: str, stored: Mapping[str, StoredTensor], state: dict[str, Any], n_blocks: int) -> Nested | None:
    if f"{name}.nested_absmax" not in stored:
        return None
    block_len, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(block_len) is not int or block_len < 1 or not isinstance(offset, (int, float)) or not isfinite(offset):
        raise SourceError(f"{name}: nested_blocksize {block_len!r}, nested_offset {offset!r} are unknown")
    outer, table = part(stored, f"{name}.nested_absmax", ("F32",)), part(stored, f"{name}.nested_quant_map", ("F32",))
    check_shape(outer, (-(-n_blocks // block_len),))
    check_shape(table, (256,))
    return Nested(outer, table, block_len, float(offset))

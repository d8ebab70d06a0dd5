"""compressed-tensors' "pack-quantized": integers of 1 to 8 bits, dense in 32-bit words along a row.

    weight_packed      I32[r, ceil(c * bits / 32)], lowest bits first, each code + 2^(bits - 1)
    weight_scale       [r, groups]; [r] or [1] too
    weight_zero_point  I32[ceil(r * bits / 32), groups], packed down the rows in the same way; absent if symmetric
    weight_shape       I64[2] (or I32): r, c
    weight_g_idx       I32[c]: the group of each column, where columns were ordered by activation; absent or -1 if not

The result has the scales' type. Source: compressed-tensors 0.20 compressors/pack_quantized and
quantization/lifecycle/forward_helpers.py `_dequantize`; for weight_g_idx, version 0.9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from pocketquant.convert.quantized.numbers import bit_fields, floats
from pocketquant.convert.quantized.tensor import DequantizedTensor, Reads, check_shape, part, result_dtype
from pocketquant.convert.safetensors import StoredTensor
from pocketquant.errors import SourceError, WeightError
from pocketquant.formats import F32Array

_PARTS = ("packed", "scale", "shape", "zero_point", "g_idx")


@dataclass(frozen=True)
class PackedIntRows:
    """(code - zero) * scale; f32 arithmetic.

    Attributes:
        n_groups: scales in a row.
        group_of: I32[c], or None where groups are runs of columns.
    """

    packed: StoredTensor
    scale: StoredTensor
    zero: StoredTensor | None
    group_of: StoredTensor | None
    bits: int
    n_groups: int
    shape: tuple[int, int]
    reads: Reads

    def values(self, start: int, stop: int) -> F32Array:
        n_cols = self.shape[1]
        words = self.packed.words(start, stop).astype(np.uint32, copy=False)
        values = bit_fields(words, self.bits, n_cols).astype(np.float32)
        columns = np.arange(n_cols) // (n_cols // self.n_groups)
        if self.group_of is not None:
            given = self.reads.words(self.group_of).view("<i4")
            if (given >= 0).all():
                columns = given.astype(np.intp)
                if columns.max() >= self.n_groups:
                    raise WeightError(f"{self.group_of.file}: {self.group_of.name}: names a group beyond the scales")
        if self.zero is None:
            values -= np.float32(1 << (self.bits - 1))
        else:
            values -= self._zeros(self.zero, start, stop)[:, columns]
        scale = self.reads.words(self.scale).reshape(-1, self.n_groups)
        return values * floats(scale if len(scale) == 1 else scale[start:stop], self.scale.dtype)[:, columns]

    def _zeros(self, zero: StoredTensor, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Zero points of rows [start, stop), u8[n, n_groups]; only their words are unpacked."""
        first = start // 32 * 32  # 32 fields fill whole words, whatever their width
        words = self.reads.words(zero)[first * self.bits // 32 : -(-stop * self.bits // 32)]
        fields = bit_fields(np.ascontiguousarray(words.T).view("<u4"), self.bits, stop - first)
        return fields[:, start - first :].T


def packed_int_tensor(
    name: str, stored: Mapping[str, StoredTensor], reads: Reads
) -> tuple[DequantizedTensor, set[str]]:
    """The tensor of `{base}_packed`, and the names of its parts. Reads the few numbers of `weight_shape`.

    Raises:
        SourceError: parts missing or of other shapes.
    """
    base = name.removesuffix("_packed")
    packed, scale = stored[name], part(stored, f"{base}_scale", ("F32", "F16", "BF16"))
    shape = tuple(int(n) for n in _integers(part(stored, f"{base}_shape", ("I64", "I32")), reads))
    if len(shape) != 2 or len(packed.shape) != 2 or packed.shape[0] != shape[0] or min(shape) < 1:
        raise SourceError(f"{name} is {list(packed.shape)}, {base}_shape says {list(shape)}: only matrices are read")
    n_rows, n_cols = shape
    possible = [bits for bits in range(1, 9) if -(-n_cols * bits // 32) == packed.shape[1]]
    if len(possible) != 1:
        raise SourceError(
            f"{n_cols} columns in {packed.shape[1]} words are "
            + (
                f"of {' or '.join(map(str, possible))} bits each, which one cannot be told"
                if possible
                else "packed "
                "otherwise than by compressed-tensors 0.10 and later; save the checkpoint again with a newer version"
            )
        )
    n_groups = scale.shape[-1] if len(scale.shape) == 2 else 1
    if prod(scale.shape) not in (1, n_rows * n_groups) or n_groups < 1 or n_cols % n_groups:
        raise SourceError(f"{scale.name} is {list(scale.shape)}, no even groups of {list(shape)}")
    zero = stored.get(f"{base}_zero_point")
    if zero is not None:
        zero = part(stored, zero.name, ("I32",))
        check_shape(zero, (-(-n_rows * possible[0] // 32), n_groups))
    group_of = stored.get(f"{base}_g_idx")
    if group_of is not None:
        group_of = part(stored, group_of.name, ("I32",))
        check_shape(group_of, (n_cols,))
    decoder = PackedIntRows(packed, scale, zero, group_of, possible[0], n_groups, (n_rows, n_cols), reads)
    names = {f"{base}_{suffix}" for suffix in _PARTS} & stored.keys()
    kind = f"compressed-tensors {possible[0]}-bit"
    return DequantizedTensor(base, packed.file, result_dtype(scale), shape, kind, decoder), names


def _integers(tensor: StoredTensor, reads: Reads) -> list[int]:
    if prod(tensor.shape) > 8:
        raise SourceError(f"{tensor.name} is {list(tensor.shape)}, expected the two numbers of a shape")
    return [int(n) for n in reads.words(tensor).view("<i8" if tensor.dtype == "I64" else "<i4").reshape(-1)]

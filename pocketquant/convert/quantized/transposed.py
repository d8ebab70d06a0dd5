"""GPTQ and AWQ: integers with zero points, stored as [in, out], the transpose of a weight [out, in].

    GPTQ  qweight I32[in * bits / 32, out], packed down the columns; bits 2, 3, 4, 8
    AWQ   qweight I32[in, out / 8], packed along the rows, 8 codes of 4 bits in the order 0 2 4 6 1 3 5 7
    both  qzeros I32[groups, out * bits / 32], packed like AWQ's or GPTQ's own; scales [groups, out]
    GPTQ  g_idx I32[in]: the group of each input, in any order with desc_act

GPTQ's first format stores zero - 1 in `bits` bits, "gptq_v2" the zero itself. The result, (code - zero) * scale, has
the scales' type. As one output lies all over the tensor, its packed codes are read whole and kept while its chunks
are wanted (see `Reads`).

Sources: GPTQModel 7.7 nn_modules/qlinear/__init__.py `dequantize_weight` and utils/model_dequant.py
`_shift_gptq_qzeros`; AutoAWQ 0.2.9 utils/packing_utils.py `dequantize_gemm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pocketquant.convert.quantized.numbers import bit_fields, floats
from pocketquant.convert.quantized.tensor import DequantizedTensor, Reads, check_shape, part, result_dtype
from pocketquant.convert.safetensors import StoredTensor
from pocketquant.errors import SourceError, WeightError
from pocketquant.formats import F32Array

_AWQ_PLACE = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Where in its word each of eight neighbouring columns lies."""
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class TransposedRows:
    """(code - zero) * scale; f32 arithmetic.

    Attributes:
        group_of: I32[in]; None for even runs.
        is_awq: packed along outputs, in AWQ's order.
        zero_offset: 1 where zeros are stored less one.
    """

    codes: StoredTensor
    zeros: StoredTensor | None
    scales: StoredTensor
    group_of: StoredTensor | None
    bits: int
    is_awq: bool
    zero_offset: int
    shape: tuple[int, int]
    reads: Reads

    def values(self, start: int, stop: int) -> F32Array:
        scales = floats(self.reads.words(self.scales)[:, start:stop].T, self.scales.dtype)
        groups = self._groups(scales.shape[1])
        codes = self.reads.words(self.codes)
        if self.is_awq:
            values = self._columns(codes, start, stop).T.astype(np.float32)
        else:
            words = np.ascontiguousarray(codes[:, start:stop].T)
            values = bit_fields(words, self.bits, self.shape[1]).astype(np.float32)
        if self.zeros is None:
            values -= np.float32(1 << (self.bits - 1))
        else:
            zeros = self._columns(self.reads.words(self.zeros), start, stop)
            zeros = zeros + np.uint8(self.zero_offset) & np.uint8((1 << self.bits) - 1)
            values -= zeros.T[:, groups]
        return values * scales[:, groups]

    def _groups(self, n_groups: int) -> npt.NDArray[np.intp]:
        n_in = self.shape[1]
        if self.group_of is None:
            return np.arange(n_in) // (n_in // n_groups)
        groups = self.reads.words(self.group_of).view("<i4").astype(np.intp)
        if groups.min() < 0 or groups.max() >= n_groups:
            raise WeightError(f"{self.group_of.file}: {self.group_of.name}: names a group beyond the {n_groups} scales")
        return groups

    def _columns(self, words: npt.NDArray[np.generic], start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Columns [start, stop) of fields packed along rows, u8[n, stop - start]; only their words are unpacked."""
        first = start // 32 * 32  # 32 fields fill whole words, whatever their width
        wanted = np.ascontiguousarray(words[:, first * self.bits // 32 : -(-stop * self.bits // 32)]).view("<u4")
        if self.is_awq:
            fields = bit_fields(wanted, self.bits, wanted.shape[1] * 8).reshape(len(words), -1, 8)[:, :, _AWQ_PLACE]
            return fields.reshape(len(words), -1)[:, start - first : stop - first]
        return bit_fields(wanted, self.bits, stop - first)[:, start - first :]


def transposed_tensor(
    name: str, stored: Mapping[str, StoredTensor], *, is_awq: bool, zero_offset: int, reads: Reads
) -> tuple[DequantizedTensor, set[str]]:
    """The weight of `{module}.qweight`, and the names of its parts. The shapes tell the number of bits.

    Args:
        is_awq: AWQ's packing, else GPTQ's.
        zero_offset: 1 for GPTQ's first format, 0 for gptq_v2 and AWQ.

    Raises:
        SourceError: parts missing or of other shapes.
    """
    module = name.removesuffix(".qweight")
    codes, scales = part(stored, name, ("I32",)), part(stored, f"{module}.scales", ("F16", "BF16", "F32"))
    if len(codes.shape) != 2 or len(scales.shape) != 2 or min(*codes.shape, *scales.shape) < 1:
        raise SourceError(f"{name} {list(codes.shape)}, {scales.name} {list(scales.shape)}: expected two matrices")
    n_groups, n_out = scales.shape
    zeros = stored.get(f"{module}.qzeros")
    if is_awq:
        bits, n_in = 4, codes.shape[0]
        check_shape(codes, (n_in, n_out // 8))
    else:
        zeros = part(stored, f"{module}.qzeros", ("I32",))
        bits = 32 * zeros.shape[-1] // n_out if zeros.shape else 0
        n_in = 32 * codes.shape[0] // bits if bits else 0
        if bits not in (2, 3, 4, 8) or codes.shape != (n_in * bits // 32, n_out):
            raise SourceError(f"{name} {list(codes.shape)} with {zeros.name} {list(zeros.shape)}: no 2, 3, 4 or 8 bits")
    if zeros is not None:
        check_shape(part(stored, zeros.name, ("I32",)), (n_groups, n_out * bits // 32))
    group_of = None if is_awq else stored.get(f"{module}.g_idx")
    if group_of is not None:
        check_shape(part(stored, group_of.name, ("I32",)), (n_in,))
    elif n_in % n_groups:
        raise SourceError(
            f"{scales.name} is {list(scales.shape)}, no even groups of {n_in} inputs, and there is no g_idx"
        )
    decoder = TransposedRows(codes, zeros, scales, group_of, bits, is_awq, zero_offset, (n_out, n_in), reads)
    names = {f"{module}.{suffix}" for suffix in _PARTS} & stored.keys()
    kind = f"{'AWQ' if is_awq else 'GPTQ'} {bits}-bit"
    tensor = DequantizedTensor(f"{module}.weight", codes.file, result_dtype(scales), (n_out, n_in), kind, decoder)
    return tensor, names

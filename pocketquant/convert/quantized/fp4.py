"""FP4 (E2M1) weights, two a byte, low half first, times a scale for each group of columns.

    NVFP4, compressed-tensors   weight_packed U8[r, c/2], weight_scale F8_E4M3[r, c/16], weight_global_scale F32[1]
    NVFP4, ModelOpt             weight U8[r, c/2], weight_scale F8_E4M3[r, c/16], weight_scale_2 F32
    MXFP4, compressed-tensors   weight_packed U8[r, c/2], weight_scale U8[r, c/32] (E8M0)
    MXFP4, OpenAI's             x_blocks U8[.., r, c/32, 16], x_scales U8[.., r, c/32]

compressed-tensors *divides* the scale by the global one, ModelOpt multiplies them. The result is BF16 where
compressed-tensors and transformers give BF16, and F32 for ModelOpt, whose arithmetic is f32.

Sources: compressed-tensors 0.20 compressors/nvfp4, compressors/mxfp4; nvidia-modelopt 0.47
torch/quantization/qtensor/nvfp4_tensor.py; transformers 5.23 integrations/mxfp4.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from pocketquant.convert.quantized.numbers import E2M1, floats, nibbles
from pocketquant.convert.quantized.tensor import DequantizedTensor, Reads, check_shape, part
from pocketquant.convert.safetensors import StoredTensor
from pocketquant.errors import SourceError
from pocketquant.formats import F32Array


@dataclass(frozen=True)
class Fp4Rows:
    """E2M1 codes times scales; f32 arithmetic.

    Attributes:
        codes: U8, two codes a byte.
        scale: F8_E4M3, or U8 for E8M0.
        factor: one F32 for the whole tensor, or None.
        is_divisor: whether scales are divided by `factor`.
        n_cols: columns of a row.
    """

    codes: StoredTensor
    scale: StoredTensor
    factor: StoredTensor | None
    is_divisor: bool
    n_cols: int
    reads: Reads

    def values(self, start: int, stop: int) -> F32Array:
        n_bytes, n_groups = self.n_cols // 2, prod(self.scale.shape) * self.n_cols // (2 * prod(self.codes.shape))
        packed = self.codes.file.read(self.codes.offset + start * n_bytes, (stop - start) * n_bytes)
        raw = self.scale.file.read(self.scale.offset + start * n_groups, (stop - start) * n_groups)
        scale = floats(raw, "F8_E8M0" if self.scale.dtype == "U8" else self.scale.dtype)
        if self.factor is not None:
            factor = self.reads.floats(self.factor).reshape(())
            scale = scale / factor if self.is_divisor else scale * factor
        values = E2M1[nibbles(packed)].reshape(stop - start, n_groups, -1)
        return (values * scale.reshape(stop - start, n_groups, 1)).reshape(stop - start, self.n_cols)


def packed_fp4_tensor(
    name: str, stored: Mapping[str, StoredTensor], reads: Reads
) -> tuple[DequantizedTensor, set[str]]:
    """The tensor of `{base}_packed` (compressed-tensors), or of a U8 `{base}` (ModelOpt), and the names of its parts.

    Raises:
        SourceError: parts missing or of other shapes.
    """
    base = name.removesuffix("_packed")
    codes, scale = stored[name], part(stored, f"{base}_scale", ("F8_E4M3", "U8", "F8_E8M0"))
    if len(codes.shape) < 2 or min(codes.shape) < 1:
        raise SourceError(f"{name} is {list(codes.shape)}, expected a matrix")
    shape = (*codes.shape[:-1], codes.shape[-1] * 2)
    group, is_compressed = (16 if scale.dtype == "F8_E4M3" else 32), name != base
    if shape[-1] % group:
        raise SourceError(f"{shape[-1]} columns are no multiple of {group}")
    check_shape(scale, (*shape[:-1], shape[-1] // group))
    names, factor = {name, scale.name}, None
    if group == 16:
        factor = part(stored, f"{base}_global_scale" if is_compressed else f"{base}_scale_2", ("F32",))
        if prod(factor.shape) != 1:
            raise SourceError(f"{factor.name} is {list(factor.shape)}, expected one number")
        names.add(factor.name)
    decoder = Fp4Rows(codes, scale, factor, is_compressed, shape[-1], reads)
    dtype = "BF16" if is_compressed or group == 32 else "F32"
    return DequantizedTensor(base, codes.file, dtype, shape, "NVFP4" if factor else "MXFP4", decoder), names


def blocked_fp4_tensor(
    name: str, stored: Mapping[str, StoredTensor], reads: Reads
) -> tuple[DequantizedTensor, set[str]]:
    """The tensor of `{base}_blocks` and `{base}_scales`, rows and columns as stored; SourceError as above."""
    base = name.removesuffix("_blocks")
    blocks, scale = part(stored, name, ("U8",)), part(stored, f"{base}_scales", ("U8", "F8_E8M0"))
    if len(blocks.shape) < 3 or blocks.shape[-1] != 16 or min(blocks.shape) < 1:
        raise SourceError(f"{name} is {list(blocks.shape)}, expected [.., rows, cols / 32, 16]")
    check_shape(scale, blocks.shape[:-1])
    shape = (*blocks.shape[:-2], blocks.shape[-2] * 32)
    decoder = Fp4Rows(blocks, scale, None, False, shape[-1], reads)
    return DequantizedTensor(base, blocks.file, "BF16", shape, "MXFP4", decoder), {name, scale.name}

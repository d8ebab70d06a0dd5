"""Quantizes one matrix by every scheme, and says what it must be read as.

Packing is written here as loops over codes, apart from the package's own unpacking; the expected numbers come from
the codes before they were packed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketquant.formats.plain import decode_bf16, encode_bf16

WORDS = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8"}
Stored = tuple[str, np.ndarray]
"""A safetensors type and the array of words of that size."""
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def write_tensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """A safetensors file of any types."""
    header, at = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def stored_as(values: np.ndarray, dtype: str) -> Stored:
    """f32 -> a stored tensor, rounded to its type."""
    values = np.asarray(values, np.float32)
    if dtype == "BF16":
        return dtype, encode_bf16(values.reshape(1, -1)).view("<u2").reshape(values.shape)
    return dtype, values.astype(WORDS[dtype])


def as_floats(stored: Stored) -> np.ndarray:
    """The f32 that a BF16, F16 or F32 tensor means."""
    dtype, array = stored
    if dtype == "BF16":
        return decode_bf16(array.reshape(1, -1).view(np.uint8), 0).reshape(array.shape)
    return array.astype(np.float32)


def e4m3_value(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([np.nan if code & 127 == 127 else e4m3_value(code) for code in range(256)], np.float32)


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Index of the nearest entry of a table."""
    order = np.argsort(np.nan_to_num(table, nan=np.inf), kind="stable")
    ordered = table[order][: np.isfinite(table).sum()]
    middle = (ordered[1:] + ordered[:-1]) / 2
    return order[np.searchsorted(middle, values)].astype(np.uint8)


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis, one long number a row, cut into 32-bit words."""
    rows = codes.reshape(-1, codes.shape[-1])
    n_words = -(-codes.shape[-1] * bits // 32)
    out = np.zeros((len(rows), n_words), "<u4")
    for i, row in enumerate(rows):
        number = sum(int(code) << (bits * j) for j, code in enumerate(row))
        out[i] = np.frombuffer(number.to_bytes(4 * n_words, "little"), "<u4")
    return out.reshape(*codes.shape[:-1], n_words).view("<i4")


@dataclass
class Quantized:
    """The parts of one quantized matrix by suffix, and the tensor it must be read as."""

    parts: dict[str, Stored]
    expected: Stored


def _spread(grid: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    return grid[np.arange(shape[0]) // block[0]][:, np.arange(shape[1]) // block[1]]


def _scales(shape: tuple[int, ...], rng: np.random.Generator, dtype: str) -> Stored:
    return stored_as(rng.uniform(0.001, 0.01, shape), dtype)


def scaled(
    weight: np.ndarray,
    rng: np.random.Generator,
    *,
    block: tuple[int, int],
    suffix: str = "_scale_inv",
    dtype: str = "F32",
    codes: str = "F8_E4M3",
    zero: bool = False,
    squeeze: bool = False,
) -> Quantized:
    """FP8 or INT8 in blocks."""
    grid = tuple(-(-n // b) for n, b in zip(weight.shape, block, strict=True))
    scale = _scales(grid, rng, dtype)
    spread = _spread(as_floats(scale), block, weight.shape)
    parts: dict[str, Stored] = {}
    if codes == "I8":
        low = 0
        if zero:
            zeros = rng.integers(-20, 20, grid).astype("i1")
            parts["weight_zero_point"] = "I8", zeros
            low = _spread(zeros, block, weight.shape).astype(np.int64)
        quantized = np.clip(np.rint(weight / spread) + low, -128, 127).astype("i1")
        values = (quantized.astype(np.int64) - low).astype(np.float32)
    else:
        quantized = nearest(weight / spread, E4M3)
        values = E4M3[quantized]
    parts["weight"] = codes, quantized
    parts["weight" + suffix] = (scale[0], scale[1].reshape(-1) if squeeze else scale[1])
    return Quantized(parts, stored_as(values * spread, dtype))


def packed_int(
    weight: np.ndarray,
    rng: np.random.Generator,
    *,
    bits: int,
    group: int | None,
    dtype: str = "BF16",
    asymmetric: bool = False,
    ordered: bool = False,
) -> Quantized:
    """compressed-tensors' pack-quantized."""
    n_rows, n_cols = weight.shape
    groups = np.zeros(n_cols, np.int64) if group is None else np.arange(n_cols) // group
    if ordered:
        groups = rng.permutation(groups)
    scale = _scales((n_rows, groups.max() + 1), rng, dtype)
    spread, half = as_floats(scale)[:, groups], 1 << (bits - 1)
    zeros = rng.integers(-half, half, scale[1].shape) if asymmetric else np.zeros(scale[1].shape, np.int64)
    codes = np.clip(np.rint(weight / spread) + zeros[:, groups], -half, half - 1).astype(np.int64)
    parts = {
        "weight_packed": ("I32", pack_bits(codes + half, bits)),
        "weight_scale": scale,
        "weight_shape": ("I64", np.array(weight.shape, "<i8")),
    }
    if asymmetric:
        parts["weight_zero_point"] = "I32", np.ascontiguousarray(pack_bits((zeros + half).T, bits).T)
    if ordered:
        parts["weight_g_idx"] = "I32", groups.astype("<i4")
    values = (codes - zeros[:, groups]).astype(np.float32)
    return Quantized(parts, stored_as(values * spread, dtype))


def gptq(
    weight: np.ndarray,
    rng: np.random.Generator,
    *,
    bits: int = 4,
    group: int = 64,
    less_one: bool = True,
    desc_act: bool = False,
    g_idx: bool = True,
    lowest_zero: int = 0,
) -> Quantized:
    """GPTQ, first format (zeros less one) or second."""
    n_out, n_in = weight.shape
    groups = np.arange(n_in) // group
    if desc_act:
        groups = rng.permutation(groups)
    n_groups, top = groups.max() + 1, (1 << bits) - 1
    scale, zeros = _scales((n_groups, n_out), rng, "F16"), rng.integers(lowest_zero, top + 1, (n_groups, n_out))
    spread = as_floats(scale)[groups]
    codes = np.clip(np.rint(weight.T / spread) + zeros[groups], 0, top).astype(np.int64)
    parts = {
        "qweight": ("I32", np.ascontiguousarray(pack_bits(np.ascontiguousarray(codes.T), bits).T)),
        "qzeros": ("I32", pack_bits(zeros - 1 & top if less_one else zeros, bits)),
        "scales": scale,
    }
    if g_idx:
        parts["g_idx"] = "I32", groups.astype("<i4")
    return Quantized(parts, stored_as(((codes - zeros[groups]) * spread).T, "F16"))


def awq(weight: np.ndarray, rng: np.random.Generator, *, group: int = 64, zeros: bool = True) -> Quantized:
    """AWQ's gemm layout."""
    n_out, n_in = weight.shape
    groups = np.arange(n_in) // group
    scale = _scales((groups.max() + 1, n_out), rng, "F16")
    zero = rng.integers(0, 16, scale[1].shape) if zeros else np.full(scale[1].shape, 8)
    spread = as_floats(scale)[groups]
    codes = np.clip(np.rint(weight.T / spread) + zero[groups], 0, 15).astype(np.int64)
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def pack(matrix: np.ndarray) -> np.ndarray:
        words = np.zeros((len(matrix), matrix.shape[1] // 8), "<u4")
        for word in range(words.shape[1]):
            for field_number, column in enumerate(order):
                words[:, word] |= (matrix[:, 8 * word + column] << (4 * field_number)).astype("<u4")
        return words.view("<i4")

    parts = {"qweight": ("I32", pack(codes)), "scales": scale}
    if zeros:
        parts["qzeros"] = "I32", pack(zero)
    return Quantized(parts, stored_as(((codes - zero[groups]) * spread).T, "F16"))


def nvfp4(weight: np.ndarray, rng: np.random.Generator, *, modelopt: bool) -> Quantized:
    """NVFP4: scales in FP8 that are divided (compressed-tensors) or multiplied (ModelOpt) by one number."""
    n_rows = len(weight)
    factor = np.float32(1 / 300.0 if modelopt else 300.0)
    wanted = np.abs(weight.reshape(n_rows, -1, 16)).max(-1) / 6
    scale_codes = nearest(np.minimum(wanted / factor if modelopt else wanted * factor, 448), E4M3)
    scale = E4M3[scale_codes] * factor if modelopt else E4M3[scale_codes] / factor
    spread = np.repeat(scale, 16, 1)
    codes = nearest(weight / np.maximum(spread, 1e-9), E2M1)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    values = E2M1[codes] * spread
    if modelopt:
        parts = {
            "weight": ("U8", packed),
            "weight_scale": ("F8_E4M3", scale_codes),
            "weight_scale_2": ("F32", np.array(factor, "<f4")),
            "input_scale": ("F32", np.array(0.5, "<f4")),
        }
        return Quantized(parts, stored_as(values, "F32"))
    parts = {
        "weight_packed": ("U8", packed),
        "weight_scale": ("F8_E4M3", scale_codes),
        "weight_global_scale": ("F32", np.array([factor], "<f4")),
        "input_global_scale": ("F32", np.array([7.0], "<f4")),
    }
    return Quantized(parts, stored_as(values, "BF16"))


def mxfp4(weight: np.ndarray, rng: np.random.Generator, *, blocks: bool) -> Quantized:
    """MXFP4 as compressed-tensors packs it, or as OpenAI's blocks."""
    n_rows, n_cols = weight.shape
    exponent = rng.integers(118, 126, (n_rows, n_cols // 32)).astype(np.uint8)
    spread = np.repeat(2.0 ** (exponent.astype(np.float32) - 127), 32, 1)
    codes = nearest(weight / spread, E2M1)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    expected = stored_as(E2M1[codes] * spread, "BF16")
    if blocks:
        shaped = packed.reshape(n_rows, -1, 16)
        return Quantized({"weight_blocks": ("U8", shaped), "weight_scales": ("U8", exponent)}, expected)
    return Quantized({"weight_packed": ("U8", packed), "weight_scale": ("U8", exponent)}, expected)


def mxfp8(weight: np.ndarray, rng: np.random.Generator) -> Quantized:
    """FP8 in groups of 32 with power-of-two scales."""
    exponent = rng.integers(115, 124, (len(weight), weight.shape[1] // 32)).astype(np.uint8)
    spread = np.repeat(2.0 ** (exponent.astype(np.float32) - 127), 32, 1)
    codes = nearest(weight / spread, E4M3)
    parts = {"weight": ("F8_E4M3", codes), "weight_scale": ("U8", exponent)}
    return Quantized(parts, stored_as(E4M3[codes] * spread, "BF16"))


def bnb_4bit(
    weight: np.ndarray,
    rng: np.random.Generator,
    *,
    kind: str = "nf4",
    nested: bool = False,
    block: int = 64,
    dtype: str = "bfloat16",
) -> Quantized:
    """bitsandbytes' 4 bits, with a table of its own so that nothing can be built in."""
    table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
    flat = weight.reshape(-1)
    n_blocks = -(-flat.size // block)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": list(weight.shape)}
    parts: dict[str, Stored] = {"weight.quant_map": ("F32", table)}
    if nested:
        codes = rng.integers(0, 256, n_blocks).astype(np.uint8)
        outer_table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        outer = rng.uniform(0.01, 0.02, -(-n_blocks // 256)).astype(np.float32)
        absmax = outer_table[codes] * np.repeat(outer, 256)[:n_blocks] + np.float32(0.05)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(np.float32(0.05))}
        parts |= {
            "weight.absmax": ("U8", codes),
            "weight.nested_absmax": ("F32", outer),
            "weight.nested_quant_map": ("F32", outer_table),
        }
    else:
        absmax = rng.uniform(0.05, 0.2, n_blocks).astype(np.float32)
        parts["weight.absmax"] = "F32", absmax
    spread = np.repeat(absmax, block)[: flat.size]
    codes = nearest(flat / spread, table)
    even = np.append(codes, np.zeros(flat.size % 2, np.uint8))
    parts["weight"] = "U8", (even[0::2] << 4 | even[1::2]).reshape(-1, 1)
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = "U8", np.frombuffer(json.dumps(state).encode(), np.uint8)
    ours = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    return Quantized(parts, stored_as((table[codes] * spread).reshape(weight.shape), ours))


def bnb_8bit(weight: np.ndarray, rng: np.random.Generator) -> Quantized:
    """LLM.int8()."""
    scale = np.abs(weight).max(1).astype(np.float32)
    codes = np.rint(weight / scale[:, None] * 127).astype("i1")
    values = codes.astype(np.float32) * scale[:, None] * np.float32(7.874015718698502e-3)
    parts: dict[str, Stored] = {
        "weight": ("I8", codes),
        "SCB": ("F32", scale),
        "weight_format": ("U8", np.zeros((), "u1")),
    }
    return Quantized(parts, stored_as(values, "F32"))

"""The GGML number formats: how big each one is, and which functions encode and decode it.

A format's name is its name in GGML (`Q4_K`, `BF16`). Every format encodes each row on its own, in blocks of
`block_len` weights that take `block_bytes` bytes, so any range of rows can be encoded apart from the others.
The table is data and cheap to import; the kernels behind it are imported when first used.

Source for the sizes and the block layouts: ggml/src/ggml-common.h of llama.cpp.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pocketquant.errors import RecipeError

F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class QuantFormat:
    """One GGML type.

    Attributes:
        name: GGML's name, upper case.
        ggml_id: the type's number in a GGUF file.
        block_len: weights in a block.
        block_bytes: bytes of a block.
        module: submodule of `pocketquant.formats` with `encode_<name>` and `decode_<name>`; "" if none.
        fallback: the format llama.cpp takes when a row is no multiple of `block_len`; "" if none.
        written: False for formats that are only read, because files that people have hold them.
    """

    name: str
    ggml_id: int
    block_len: int
    block_bytes: int
    module: str = ""
    fallback: str = ""
    written: bool = True

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.block_bytes / self.block_len

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of one row of `n_cols` weights; `n_cols` must be a multiple of `block_len`."""
        if n_cols % self.block_len:
            raise ValueError(f"{self.name}: {n_cols} columns are no multiple of {self.block_len}")
        return n_cols // self.block_len * self.block_bytes

    def encode(self, rows: F32Array, importance: F32Array | None = None) -> U8Array:
        """Encodes finite f32 rows.

        Args:
            rows: f32[n, k], C-contiguous, k a multiple of `block_len`, all finite.
            importance: f32[k], not negative: the weight of each column's squared error; None for equal weights.

        Returns:
            u8[n, row_bytes(k)].

        Raises:
            RecipeError: the format is only read.
        """
        if not self.written:
            raise RecipeError(f"{self.name} can be read but not written; {unwritten_advice()}")
        return self._function("encode")(rows, importance)  # type: ignore[no-any-return]

    def decode(self, data: U8Array, n_cols: int) -> F32Array:
        """Decodes u8[n, row_bytes(n_cols)] to f32[n, n_cols]."""
        return self._function("decode")(data, n_cols)  # type: ignore[no-any-return]

    def _function(self, verb: str):  # type: ignore[no-untyped-def]
        if not self.module:
            raise NotImplementedError(f"{self.name} cannot be {verb}d")
        module = importlib.import_module(f"pocketquant.formats.{self.module}")
        return getattr(module, f"{verb}_{self.name.lower()}")


_TABLE = (
    QuantFormat("F32", 0, 1, 4, "plain"),
    QuantFormat("F16", 1, 1, 2, "plain"),
    QuantFormat("BF16", 30, 1, 2, "plain"),
    QuantFormat("Q4_0", 2, 32, 18, "legacy", "F16"),
    QuantFormat("Q4_1", 3, 32, 20, "legacy", "F16"),
    QuantFormat("Q5_0", 6, 32, 22, "legacy", "F16"),
    QuantFormat("Q5_1", 7, 32, 24, "legacy", "F16"),
    QuantFormat("Q8_0", 8, 32, 34, "legacy", "F16"),
    QuantFormat("Q2_K", 10, 256, 84, "q2_k", "Q4_0"),
    QuantFormat("Q3_K", 11, 256, 110, "q3_k", "Q4_0"),
    QuantFormat("Q4_K", 12, 256, 144, "q4_k", "Q5_0"),
    QuantFormat("Q5_K", 13, 256, 176, "q5_k", "Q5_1"),
    QuantFormat("Q6_K", 14, 256, 210, "q6_k", "Q8_0"),
    QuantFormat("IQ4_NL", 20, 32, 18, "iq4", "F16"),
    QuantFormat("IQ4_XS", 23, 256, 136, "iq4", "IQ4_NL"),
    QuantFormat("IQ1_S", 19, 256, 50, "iq1", "IQ4_NL", written=False),
    QuantFormat("IQ1_M", 29, 256, 56, "iq1", "IQ4_NL", written=False),
    QuantFormat("IQ2_XXS", 16, 256, 66, "iq2", "IQ4_NL", written=False),
    QuantFormat("IQ2_XS", 17, 256, 74, "iq2", "IQ4_NL", written=False),
    QuantFormat("IQ2_S", 22, 256, 82, "iq2", "IQ4_NL", written=False),
    QuantFormat("IQ3_XXS", 18, 256, 98, "iq3", "IQ4_NL", written=False),
    QuantFormat("IQ3_S", 21, 256, 110, "iq3", "IQ4_NL", written=False),
    QuantFormat("TQ1_0", 34, 256, 54, "ternary", "Q4_0", written=False),
    QuantFormat("TQ2_0", 35, 256, 66, "ternary", "Q4_0", written=False),
    QuantFormat("Q1_0", 41, 128, 18, "ternary", "F16", written=False),
    QuantFormat("MXFP4", 39, 32, 17, "fp4", "F16", written=False),
    QuantFormat("NVFP4", 40, 64, 36, "fp4", "F16", written=False),
)

FORMATS: dict[str, QuantFormat] = {format.name: format for format in _TABLE}
BY_GGML_ID: dict[int, QuantFormat] = {format.ggml_id: format for format in _TABLE}


def unwritten_advice() -> str:
    """What to do where a format that is only read is asked for."""
    smallest = min((item for item in _TABLE if item.written), key=lambda item: item.bits_per_weight)
    return (
        f"choose one of {' '.join(item.name for item in _TABLE if item.written)} "
        f"(the smallest is {smallest.name}, {smallest.bits_per_weight:g} bits a weight), or make the file with "
        "llama.cpp's llama-quantize"
    )

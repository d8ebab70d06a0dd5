"""The GGML number formats: all that is true of one stands in its row of the table, and in the file of its kernels.

A format's name is its name in GGML (`Q4_K`, `BF16`). Every format encodes each row on its own, in blocks of
`block_len` weights that take `block_bytes` bytes, so any range of rows can be encoded apart from the others.
The table is data and cheap to import; the kernels behind it (`formats/q4_k.py` encodes Q4_K) are imported when first
used. docs/add-a-format.md adds one.

Sources, in llama.cpp: ggml/src/ggml-common.h (sizes and block layouts), include/llama.h (`llama_ftype`),
ggml/src/ggml-cpu/ggml-cpu.c (`type_traits_cpu`: what activations are rounded to), ggml/src/ggml-cpu/repack.cpp and
ggml/src/ggml-hexagon/ggml-hexagon.cpp (`ggml_hexagon_supported_mul_mat`: where a format is fast).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pocketquant.errors import RecipeError

if TYPE_CHECKING:
    from pocketquant.formats.layout import Layout

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
        module: submodule of `pocketquant.formats` with `encode_<name>` and `decode_<name>`, and `LAYOUT_<NAME>` where
            codes and scales can be told apart.
        fallback: the format llama.cpp takes when a row is no multiple of `block_len`; "" if none.
        file_type: the number of llama.cpp's `llama_ftype` that is written into a file mostly of this format.
        main_in: numbers of `llama_ftype` whose files hold more weights in this format than in any other.
        activation_block: columns of a layer's inputs that share a scale where llama.cpp's CPU kernels round them to 8
            bits beside this format; 0 where the kernels do not round them.
        snr_db: the least signal over error, in decibels, that the format keeps of a tensor of weights: two or more
            below the worst of eight distributions (normal to Student's t with 2 degrees of freedom, outlying columns),
            rounded with and without importance.
        fast_on: where llama.cpp has kernels made for this format: "arm" (a CPU, for whose matrix instructions the
            weights are packed anew) and "hexagon" (an NPU). Other devices are not described here.
        written: False for formats that are only read, because files that people have hold them.
        offered: how a target size, if it may choose this format, knows what it loses: "measured" (`sensitivity` runs
            the whole model in it), "predicted" (from statistics only), "exact" (nothing that counts); "" if it may not.
        convolves: whether the runtimes convolve with weights in this format, as a vision tower's patches need.
    """

    name: str
    ggml_id: int
    block_len: int
    block_bytes: int
    module: str
    fallback: str = ""
    file_type: int = 0
    main_in: tuple[int, ...] = ()
    activation_block: int = 0
    snr_db: float = 3.0
    fast_on: tuple[str, ...] = ()
    written: bool = True
    offered: str = ""
    convolves: bool = False

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.block_bytes / self.block_len

    @property
    def is_plain(self) -> bool:
        """Whether every weight is a floating-point number of its own, without blocks."""
        return self.block_len == 1

    def fits(self, n_cols: int) -> bool:
        """Whether a row of `n_cols` weights is a whole number of blocks."""
        return n_cols % self.block_len == 0

    def fitting(self, n_cols: int) -> QuantFormat:
        """This format if rows of `n_cols` weights fit it, else the first of its fallbacks that they do fit."""
        return self if self.fits(n_cols) else FORMATS[self.fallback].fitting(n_cols)

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of one row of `n_cols` weights; `n_cols` must be a multiple of `block_len`."""
        if not self.fits(n_cols):
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

    @property
    def layout(self) -> Layout | None:
        """Where a block keeps its codes and scales, for code that moves them; None where the kernels' file has none."""
        return getattr(self._kernels(), f"LAYOUT_{self.name}", None)

    def _function(self, verb: str):  # type: ignore[no-untyped-def]
        return getattr(self._kernels(), f"{verb}_{self.name.lower()}")

    def _kernels(self) -> ModuleType:
        return importlib.import_module(f"pocketquant.formats.{self.module}")


_ARM, _NPU, _BOTH = ("arm",), ("hexagon",), ("arm", "hexagon")
# fmt: off
_TABLE = (
    # name, id, weights and bytes of a block, file of the kernels, fallback,
    # file type, main in, activation block, least dB, fast on
    QuantFormat("F32",      0,   1,   4, "plain",   "",        0, (0,),           0, 60, (),    convolves=True),
    QuantFormat("F16",      1,   1,   2, "plain",   "",        1, (1,),           0, 50, _BOTH, offered="exact",
                convolves=True),
    QuantFormat("BF16",    30,   1,   2, "plain",   "",       32, (32,),          0, 45, ()),
    QuantFormat("Q4_0",     2,  32,  18, "legacy",  "F16",     2, (2,),          32, 12, _BOTH),
    QuantFormat("Q4_1",     3,  32,  20, "legacy",  "F16",     3, (3,),          32, 14, _NPU,  offered="predicted"),
    QuantFormat("Q5_0",     6,  32,  22, "legacy",  "F16",     8, (8,),          32, 15, (),    offered="predicted"),
    QuantFormat("Q5_1",     7,  32,  24, "legacy",  "F16",     9, (9,),          32, 21, (),    offered="predicted"),
    QuantFormat("Q8_0",     8,  32,  34, "legacy",  "F16",     7, (7,),          32, 34, _BOTH, offered="measured"),
    QuantFormat("Q2_K",    10, 256,  84, "q2_k",    "Q4_0",   10, (),           256,  6, ()),
    QuantFormat("Q3_K",    11, 256, 110, "q3_k",    "Q4_0",   12, (11, 12, 13), 256,  9, (),    offered="measured"),
    QuantFormat("Q4_K",    12, 256, 144, "q4_k",    "Q5_0",   15, (14, 15),     256, 14, _ARM,  offered="measured"),
    QuantFormat("Q5_K",    13, 256, 176, "q5_k",    "Q5_1",   17, (16, 17),     256, 21, _ARM,  offered="measured"),
    QuantFormat("Q6_K",    14, 256, 210, "q6_k",    "Q8_0",   18, (18,),        256, 25, _ARM,  offered="measured"),
    QuantFormat("IQ4_NL",  20,  32,  18, "iq4",     "F16",    25, (25,),         32, 13, _BOTH, offered="measured"),
    QuantFormat("IQ4_XS",  23, 256, 136, "iq4",     "IQ4_NL", 30, (30,),        256, 13, (),    offered="measured"),
    QuantFormat("IQ1_S",   19, 256,  50, "iq1",     "IQ4_NL", 24, (),           256,  3, (),    written=False),
    QuantFormat("IQ1_M",   29, 256,  56, "iq1",     "IQ4_NL", 31, (),           256,  3, (),    written=False),
    QuantFormat("IQ2_XXS", 16, 256,  66, "iq2",     "IQ4_NL", 19, (),           256,  3, (),    written=False),
    QuantFormat("IQ2_XS",  17, 256,  74, "iq2",     "IQ4_NL", 20, (),           256,  3, (),    written=False),
    QuantFormat("IQ2_S",   22, 256,  82, "iq2",     "IQ4_NL", 28, (),           256,  3, (),    written=False),
    QuantFormat("IQ3_XXS", 18, 256,  98, "iq3",     "IQ4_NL", 23, (),           256,  3, (),    written=False),
    QuantFormat("IQ3_S",   21, 256, 110, "iq3",     "IQ4_NL", 26, (),           256,  3, (),    written=False),
    QuantFormat("TQ1_0",   34, 256,  54, "ternary", "Q4_0",   36, (),           256,  3, (),    written=False),
    QuantFormat("TQ2_0",   35, 256,  66, "ternary", "Q4_0",   37, (),           256,  3, (),    written=False),
    QuantFormat("Q1_0",    41, 128,  18, "ternary", "F16",    40, (),            32,  3, (),    written=False),
    QuantFormat("MXFP4",   39,  32,  17, "fp4",     "F16",    38, (),            32,  3, _BOTH, written=False),
    QuantFormat("NVFP4",   40,  64,  36, "fp4",     "F16",    39, (),            32,  3, (),    written=False),
)
# fmt: on

FORMATS: dict[str, QuantFormat] = {format.name: format for format in _TABLE}
BY_GGML_ID: dict[int, QuantFormat] = {format.ggml_id: format for format in _TABLE}


def offered_formats() -> tuple[QuantFormat, ...]:
    """The formats that a target size may choose from, by ascending size, of one size those of smaller blocks first."""
    return tuple(
        sorted((item for item in _TABLE if item.offered), key=lambda item: (item.bits_per_weight, item.block_len))
    )


def unwritten_advice() -> str:
    """What to do where a format that is only read is asked for."""
    smallest = min((item for item in _TABLE if item.written), key=lambda item: item.bits_per_weight)
    return (
        f"choose one of {' '.join(item.name for item in _TABLE if item.written)} "
        f"(the smallest is {smallest.name}, {smallest.bits_per_weight:g} bits a weight), or make the file with "
        "llama.cpp's llama-quantize"
    )

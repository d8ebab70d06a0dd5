"""A tensor that is computed from several stored ones while it is read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pocketquant.convert.quantized.numbers import FLOATS, floats, rounded_words
from pocketquant.convert.safetensors import ITEM_BYTES, RangeFile, StoredTensor
from pocketquant.errors import SourceError
from pocketquant.formats import F32Array

KEPT_BYTES = 256 << 20
"""What `Reads` keeps of whole tensors, unless a single one is larger."""


class Decoder(Protocol):
    """The arithmetic of one quantized matrix. Holds references, not data, and can be pickled."""

    def values(self, start: int, stop: int) -> F32Array:
        """Rows [start, stop) as f32[n, k], before rounding to the tensor's data type."""
        ...


@dataclass(frozen=True)
class DequantizedTensor:
    """Stands for a `StoredTensor`: the same attributes, numbers computed in row chunks.

    Attributes:
        dtype: F32, BF16 or F16: the type that the scheme's own library gives its result in.
        scheme: what it was, for people: "GPTQ 4-bit".
        decoder: the arithmetic.
    """

    name: str
    file: RangeFile
    dtype: str
    shape: tuple[int, ...]
    scheme: str
    decoder: Decoder

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def words(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Rows [start, stop) of the tensor seen as [rows, cols]: `<u2` for F16 and BF16, `<u4` for F32."""
        with np.errstate(over="ignore", invalid="ignore"):  # whoever reads rows looks for what is not finite
            return rounded_words(self.decoder.values(start, stop), self.dtype)


@dataclass(frozen=True)
class Reads:
    """Reads whole tensors of one checkpoint and keeps the last ones, `KEPT_BYTES` in all or one if that is larger.

    Scales are small and wanted again by the next chunk. GPTQ and AWQ store a matrix transposed, so that any row of it
    lies all over the tensor: there the packed codes (4 bits a weight, say) are read whole, once.
    """

    _kept: OrderedDict[str, npt.NDArray[np.generic]] = field(default_factory=OrderedDict)
    _lock: Any = field(default_factory=threading.Lock)

    def words(self, tensor: StoredTensor) -> npt.NDArray[np.generic]:
        """All of a tensor in its shape, as unsigned words; not to be written to."""
        with self._lock:
            words = self._kept.pop(tensor.name, None)
            if words is None:
                raw = tensor.file.read(tensor.offset, tensor.nbytes)
                words = raw.view(f"<u{ITEM_BYTES[tensor.dtype]}").reshape(tensor.shape)
            self._kept[tensor.name] = words
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
            return words

    def floats(self, tensor: StoredTensor) -> F32Array:
        """All of a tensor in its shape as f32."""
        return floats(self.words(tensor), tensor.dtype)

    def __reduce__(self) -> tuple[type[Reads], tuple[()]]:
        return Reads, ()

    def __hash__(self) -> int:
        return id(self)


def part(stored: Mapping[str, StoredTensor], name: str, dtypes: tuple[str, ...] = FLOATS) -> StoredTensor:
    """A tensor that a scheme cannot do without; SourceError if it is missing or of another type."""
    tensor = stored.get(name)
    if tensor is None:
        raise SourceError(f"its {name} is missing; the checkpoint is incomplete: download or save it again")
    if tensor.dtype not in dtypes:
        raise SourceError(f"its {name} is {tensor.dtype}, expected {' or '.join(dtypes)}")
    return tensor


def check_shape(tensor: StoredTensor, expected: tuple[int, ...]) -> None:
    """SourceError unless the shape is the one the other parts imply."""
    if tensor.shape != expected:
        raise SourceError(f"{tensor.name} is {list(tensor.shape)}, its other parts imply {list(expected)}")


def result_dtype(scales: StoredTensor) -> str:
    """The type of numbers multiplied by these scales: their own, or BF16 where they are of one byte."""
    return scales.dtype if scales.dtype in ("F32", "F16", "BF16") else "BF16"

"""Times and errors of the K-quant kernels beside ggml's, in one process on one core.

    python benchmarks/kernels_kquants.py [Q4_K ...]

Prints, for each format and row width, with importance and without: millions of weights a second of either, the ratio
of the medians, and the ratio of the importance-weighted squared errors (below 1: ours is smaller).
"""

from __future__ import annotations

import ctypes
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pocketquant.formats import FORMATS, F32Array, U8Array

NAMES = ("Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K")
REPEATS = 9


def load_ggml() -> ctypes.CDLL:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise SystemExit("llama-cpp-python is not installed; `pip install pocketquant[eval]` brings it")
    library = ctypes.CDLL(str(next((Path(spec.origin).parent / "lib").glob("*ggml-base.*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


def ggml_encoder(library: ctypes.CDLL, name: str) -> Callable[[F32Array, F32Array | None], U8Array]:
    def encode(rows: F32Array, importance: F32Array | None) -> U8Array:
        n_rows, n_cols = rows.shape
        data = np.empty((n_rows, FORMATS[name].row_bytes(n_cols)), np.uint8)
        given = None if importance is None else importance.ctypes.data
        library.ggml_quantize_chunk(FORMATS[name].ggml_id, rows.ctypes.data, data.ctypes.data, 0, n_rows, n_cols, given)
        return data

    return encode


def main() -> None:
    library = load_ggml()
    random = np.random.default_rng(0)
    print("format  columns  importance  ggml Mw/s  ours Mw/s  times as fast  error ratio")
    for name in sys.argv[1:] or NAMES:
        encoders = (ggml_encoder(library, name), FORMATS[name].encode)
        for n_cols in (2560, 9216):
            rows = (random.standard_t(4, (2**18 // n_cols, n_cols)) * 0.02).astype(np.float32)
            for importance in (random.lognormal(0, 1.5, n_cols).astype(np.float32), None):
                errors, seconds = [], []
                for encode in encoders:  # the first call also compiles
                    missed = np.square(FORMATS[name].decode(encode(rows, importance), n_cols) - rows).sum(axis=0)
                    errors.append(float(np.average(missed, weights=importance)))
                for _ in range(REPEATS):
                    for encode in encoders:
                        start = time.thread_time()
                        encode(rows, importance)
                        seconds.append(time.thread_time() - start)
                slow, fast = statistics.median(seconds[0::2]), statistics.median(seconds[1::2])
                given = "none" if importance is None else "lognormal"
                rates = f"{rows.size / slow / 1e6:9.1f}  {rows.size / fast / 1e6:9.1f}"
                print(f"{name:6}  {n_cols:7}  {given:10}  {rates}  {slow / fast:13.2f}  {errors[1] / errors[0]:11.4f}")


if __name__ == "__main__":
    main()

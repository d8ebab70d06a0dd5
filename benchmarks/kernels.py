"""Speed and error of every encoder against ggml's own, one core, same process, same rows.

    python benchmarks/kernels.py [FORMAT...]

Rows are as wide as the 4B model's (2,560 and 9,216 columns), gaussian and heavy-tailed (Student's t of 4 degrees),
with and without importance. Times are medians of the thread's own CPU time, the two taken in turn; error is the
squared error under the same importance, ours as a share of ggml's. Needs llama-cpp-python for ggml's library.
"""

from __future__ import annotations

import ctypes
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from processes import Row

from pocketquant.formats import FORMATS, F32Array, U8Array

NAMES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
REPEATS = 7
Encode = Callable[[F32Array, "F32Array | None"], U8Array]


def load_ggml() -> ctypes.CDLL:
    """The ggml library that llama-cpp-python brings."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise SystemExit("llama-cpp-python is not installed; `pip install 'pocketquant[eval]'` brings it")
    library = ctypes.CDLL(str(next((Path(spec.origin).parent / "lib").glob("*ggml-base.*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


def ggml_encoder(library: ctypes.CDLL, name: str) -> Encode:
    """`ggml_quantize_chunk` with the arguments of `QuantFormat.encode`."""

    def encode(rows: F32Array, importance: F32Array | None) -> U8Array:
        n_rows, n_cols = rows.shape
        data = np.empty((n_rows, FORMATS[name].row_bytes(n_cols)), np.uint8)
        given = None if importance is None else importance.ctypes.data
        library.ggml_quantize_chunk(FORMATS[name].ggml_id, rows.ctypes.data, data.ctypes.data, 0, n_rows, n_cols, given)
        return data

    return encode


def data_sets() -> Iterator[tuple[str, F32Array, F32Array]]:
    """Name, rows, importance."""
    random = np.random.default_rng(0)
    for n_cols in (2560, 9216):
        shape = (2**18 // n_cols, n_cols)
        importance = random.lognormal(0, 1.5, n_cols).astype(np.float32)
        yield f"gaussian {n_cols}", (random.standard_normal(shape) * 0.02).astype(np.float32), importance
        yield f"heavy-tailed {n_cols}", (random.standard_t(4, shape) * 0.02).astype(np.float32), importance


def measure(name: str, library: ctypes.CDLL, rows: F32Array, importance: F32Array | None) -> tuple[float, float, float]:
    """(times as fast as ggml, our million weights a second, our error as a share of ggml's)."""
    encoders = (ggml_encoder(library, name), FORMATS[name].encode)
    errors, seconds = [], []
    for encode in encoders:  # the first call also compiles
        missed = np.square(FORMATS[name].decode(encode(rows, importance), rows.shape[1]) - rows).sum(axis=0)
        errors.append(float(np.average(missed, weights=importance)))
    for _ in range(REPEATS):
        for encode in encoders:
            start = time.thread_time()
            encode(rows, importance)
            seconds.append(time.thread_time() - start)
    theirs, ours = statistics.median(seconds[0::2]), statistics.median(seconds[1::2])
    return theirs / ours, rows.size / ours / 1e6, errors[1] / errors[0]


def measure_formats(names: Sequence[str]) -> Iterator[Row]:
    """A row for each format: geometric means over the data sets, with importance and, of the speed, without."""
    library = load_ggml()
    for name in names:
        weighted = [measure(name, library, rows, importance) for _, rows, importance in data_sets()]
        plain = [measure(name, library, rows, None)[0] for _, rows, _ in data_sets()]
        fast, rate, error = (statistics.geometric_mean(numbers) for numbers in zip(*weighted, strict=True))
        ours = f"{rate:.0f} M weights/s, {error:.3f} of its squared error; {statistics.geometric_mean(plain):.1f}x "
        yield Row(f"{name}, one core", "ggml, same rows", cpu=fast, ours=f"{ours}without importance")


def main(names: list[str]) -> None:
    library = load_ggml()
    print("| format | rows | times as fast, importance | error | times as fast, none | error | ours, M weights/s |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name in names or NAMES:
        for label, rows, importance in data_sets():
            fast, rate, error = measure(name, library, rows, importance)
            plain_fast, _, plain_error = measure(name, library, rows, None)
            cells = f"{fast:.1f} | {error:.3f} | {plain_fast:.1f} | {plain_error:.3f} | {rate:.0f}"
            print(f"| {name} | {label} | {cells} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Speed and error of the formats of 32 weights and of IQ4 against ggml's own kernels, on one core.

    python benchmarks/kernels_legacy.py [rows]

Each line is one format, with and without importance: ggml's and our time per block of 32 weights (median of the
thread's own CPU time, the two taken in turn), their ratio, and our weighted squared error as a share of ggml's.
Needs llama-cpp-python for ggml's library.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketquant.formats import FORMATS

NAMES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS")
N_COLS = 2560
REPEATS = 15
Encode = Callable[[str, npt.NDArray[np.float32], npt.NDArray[np.float32] | None], npt.NDArray[np.uint8]]


def open_ggml() -> Encode:
    """ggml's `ggml_quantize_chunk` with the arguments of `QuantFormat.encode`."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise SystemExit("no ggml library: pip install llama-cpp-python")
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("lib/libggml-base.*"))))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def encode(
        name: str, rows: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None
    ) -> npt.NDArray[np.uint8]:
        n_rows, n_cols = rows.shape
        data = np.zeros((n_rows, FORMATS[name].row_bytes(n_cols)), dtype=np.uint8)
        weights = None if importance is None else importance.ctypes.data
        quantize(FORMATS[name].ggml_id, rows.ctypes.data, data.ctypes.data, 0, n_rows, n_cols, weights)
        return data

    return encode


def main() -> None:
    n_rows = int(sys.argv[1]) if len(sys.argv) > 1 else 128
    theirs = open_ggml()
    rng = np.random.default_rng(0)
    rows = (rng.standard_t(4, (n_rows, N_COLS)) * 0.02).astype(np.float32)
    n_blocks = rows.size // 32
    print(f"{'format':8}{'importance':>11}{'ggml ns':>9}{'ours ns':>9}{'speed':>8}{'error':>8}")
    for name in NAMES:
        for importance in (rng.lognormal(0, 1, N_COLS).astype(np.float32), None):
            FORMATS[name].encode(rows[:1], importance)  # compiles
            seconds = np.empty((REPEATS, 2))
            for i in range(REPEATS):
                started = time.thread_time()
                reference = theirs(name, rows, importance)
                between = time.thread_time()
                data = FORMATS[name].encode(rows, importance)
                seconds[i] = between - started, time.thread_time() - between
            weights = np.ones(N_COLS) if importance is None else importance.astype(np.float64)
            error, their_error = (
                float((weights * (FORMATS[name].decode(each, N_COLS) - rows.astype(np.float64)) ** 2).sum())
                for each in (data, reference)
            )
            slow, fast = np.median(seconds, axis=0) / n_blocks * 1e9
            given = "no" if importance is None else "yes"
            print(f"{name:8}{given:>11}{slow:9.0f}{fast:9.0f}{slow / fast:7.1f}x{error / their_error:8.4f}")


if __name__ == "__main__":
    main()

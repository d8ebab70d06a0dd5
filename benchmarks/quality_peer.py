"""The other side of `quality.py`: llama.cpp's own quantizer in this process, with an importance matrix."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from pocketquant.calibration.importance import Importance
from pocketquant.calibration.statistics import Statistics

SIZES = {"Q3_K_M": 12, "IQ4_XS": 30, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
"""llama.cpp's file types (include/llama.h) that are compared with."""


def importance_of(statistics: Statistics) -> Importance:
    """What llama-imatrix makes of the same text: the mean squared inputs of the blocks' weights, the diagonal of H."""
    weights = {}
    for name in statistics.shared:
        if name.startswith("blk."):
            n_expert = statistics.entries[statistics.shared[name] + "/input"].shape[0]
            found = [statistics.input(name, expert if n_expert > 1 else None) for expert in range(n_expert)]
            side = next(len(moment) for moment in found if moment is not None)
            rows = [np.ones(side) if moment is None else moment.diagonal() for moment in found]
            weights[name] = np.ascontiguousarray(np.squeeze(np.stack(rows)), np.float32)
    return Importance(weights, "calibration", tuple(text.name for text in statistics.texts))


def quantize_peer(reference: Path, importance: Importance, file_type: int, out: Path, threads: int) -> None:
    """llama.cpp's own file of a type (a number of `SIZES`), with the importance matrix."""
    import llama_cpp.llama_cpp as llama

    llama.llama_log_set(_silent(llama), ctypes.c_void_p(0))
    weights = importance.weights
    entries = (llama.llama_model_imatrix_data * (len(weights) + 1))()
    for entry, (name, values) in zip(entries, weights.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.imatrix = file_type, threads, entries
    source, target = str(reference).encode(), str(out).encode()
    if llama.llama_model_quantize(source, target, ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not quantize to file type {file_type}")


_kept: list[Any] = []


def _silent(llama: Any) -> Any:
    if not _kept:
        _kept.append(llama.llama_log_callback(lambda level, text, data: None))
    return _kept[0]

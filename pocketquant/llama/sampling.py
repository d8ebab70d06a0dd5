"""Samples the continuations of many texts, several at a time.

A step of one sequence reads all weights for one token; a step of 64 sequences side by side reads them once for 64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketquant.llama.library import require_runtime
from pocketquant.llama.runtime import LlamaRuntime, LlamaSettings
from pocketquant.machine import usable_threads

I32Array = npt.NDArray[np.int32]
Progress = Callable[[int, int], None]
"""Called with texts written and texts in all."""

_SIDE_BY_SIDE = 64


def sample_on(
    path: str | Path,
    beginnings: I32Array,
    context: int,
    *,
    threads: int | None = None,
    gpu_layers: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> I32Array:
    """Texts with the given beginnings, continued by the model token by token at temperature 1.

    Args:
        path: a GGUF; the first one if it is split.
        beginnings: i32[n, start], at least one token each.
        context: tokens of a whole text, more than `start`.
        threads: threads that compute; None for all that this process may use.
        gpu_layers: layers computed on a GPU, -1 for all.
        seed: of the tokens drawn.
        progress: told after each group of texts.

    Returns:
        i32[n, context].

    Raises:
        EvalError: llama-cpp-python is absent, llama.cpp cannot load the file or run so long a text.
    """
    n_texts, start = beginnings.shape
    if not 0 < start < context:
        raise ValueError(f"beginnings of {start} tokens for texts of {context}")
    library = require_runtime()
    texts = np.empty((n_texts, context), np.int32)
    texts[:, :start] = beginnings
    side_by_side, threads = min(n_texts, _SIDE_BY_SIDE, context), threads or usable_threads()
    settings = LlamaSettings(context, threads, gpu_layers, rows=side_by_side)
    with LlamaRuntime(library, Path(path), settings, sequences=side_by_side, apart=True) as runtime:
        for first in range(0, n_texts, side_by_side):
            _write(runtime, texts[first : first + side_by_side], start, np.random.default_rng([seed, first]))
            if progress is not None:
                progress(min(first + side_by_side, n_texts), n_texts)
    return texts


def _write(runtime: LlamaRuntime, texts: I32Array, start: int, rng: np.random.Generator) -> None:
    """Samples the tokens of texts i32[n, context] from position `start` on."""
    library, n_texts = runtime._library, len(texts)
    library.llama_memory_clear(library.llama_get_memory(runtime._context), True)
    width = max(1, runtime._batch_tokens // n_texts)
    for column in range(0, start, width):
        stop = min(column + width, start)
        items = [(int(texts[i, c]), c, i, c == start - 1) for i in range(n_texts) for c in range(column, stop)]
        rows = runtime.decode_items(items)
    for column in range(start, texts.shape[1]):
        texts[:, column] = [runtime.draw(row, rng) for row in rows]
        if column < texts.shape[1] - 1:
            rows = runtime.decode_items([(int(texts[i, column]), column, i, True) for i in range(n_texts)])

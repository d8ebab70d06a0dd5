"""The process that tries llama.cpp's kernels: `python -m pocketquant.llama.trying`. It may crash.

Each tiny model is run with ggml's plain kernels and then with the extra ones (AMX, repacked weights), and the results
of every node of the graph are compared. Lines of JSON tell the parent process how far it came: {"stage": "loaded"},
then {"stage": "plain"} and {"stage": "extra"} for each model.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pocketquant.formats import F32Array
from pocketquant.llama.buffers import BufferNames
from pocketquant.llama.ggml import ggml_function

TOKENS = 64
"""In the first batch; a second one has a single token, for which llama.cpp has other kernels."""

_THREADS = 1
_LOG_ERROR = 4


def main() -> None:
    """Tries the models of every architecture that has words."""
    _leave_no_core()
    os.environ["GGML_NO_BACKTRACE"] = "1"  # would start a debugger
    import llama_cpp

    from pocketquant.architectures import ARCHITECTURES
    from pocketquant.llama.tiny import tiny_gguf

    names = BufferNames()

    @llama_cpp.llama_log_callback
    def read(level: int, text: bytes, _data: Any) -> None:
        names.read(text)
        if level == _LOG_ERROR:
            os.write(2, text)

    llama_cpp.llama_log_set(read, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    _say(stage="loaded")
    with tempfile.TemporaryDirectory(prefix="pocketquant-trial-") as folder:
        for architecture in ARCHITECTURES:
            if architecture.trial_config is None:  # a vision tower runs beside a text model, on the same kernels
                continue
            path = Path(folder, f"{architecture.name}.gguf")
            path.write_bytes(tiny_gguf(architecture))
            plain = _run(llama_cpp, path, use_extra=False)
            _say(stage="plain", model=architecture.name)
            names.clear()
            extra = _run(llama_cpp, path, use_extra=True)
            difference, where = _compare(plain, extra)
            _say(stage="extra", model=architecture.name, kernels=names.found(), difference=difference, where=where)


def _say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


def _leave_no_core() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _run(library: Any, path: Path, *, use_extra: bool) -> list[tuple[str, F32Array]]:
    """Name and numbers of every node of the graph, in the order in which they are computed."""
    found: list[tuple[str, F32Array]] = []
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    name = ggml_function(library, "ggml_get_name", ctypes.c_char_p, pointer)
    nbytes = ggml_function(library, "ggml_nbytes", size, pointer)
    count_numbers = ggml_function(library, "ggml_nelements", ctypes.c_int64, pointer)
    copy = ggml_function(library, "ggml_backend_tensor_get", None, pointer, pointer, size, size)

    @library.ggml_backend_sched_eval_callback
    def see(node: int, ask: bool, _data: Any) -> bool:
        if not ask and nbytes(node) == 4 * count_numbers(node):
            numbers = np.empty(count_numbers(node), np.float32)
            copy(node, numbers.ctypes.data, 0, numbers.nbytes)
            found.append((name(node).decode(errors="replace"), numbers))
        return True

    model_params = library.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model_params.use_extra_bufts = use_extra
    model = library.llama_model_load_from_file(os.fsencode(path), model_params)
    if not model:
        raise SystemExit("llama.cpp cannot load the tiny model")
    for observe in (see, None):  # together, as models are run, nodes may be computed by other kernels
        params = library.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = 2 * TOKENS, _THREADS, _THREADS
        if observe is not None:
            params.cb_eval = observe
        context = library.llama_init_from_model(model, params)
        if not context:
            raise SystemExit("llama.cpp cannot set up a context for the tiny model")
        batch = library.llama_batch_init(TOKENS, 0, 1)
        for start, count in ((0, TOKENS), (TOKENS, 1)):
            batch.n_tokens = count
            for i in range(count):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = start + i, start + i, 1, True
                batch.seq_id[i][0] = 0
            if library.llama_decode(context, batch):
                raise SystemExit("llama.cpp cannot run the tiny model")
        library.llama_batch_free(batch)
        library.llama_free(context)
    library.llama_model_free(model)
    return found


def _compare(plain: list[tuple[str, F32Array]], extra: list[tuple[str, F32Array]]) -> tuple[float, str]:
    """The largest relative RMS difference of a node, and the node's name; nodes that are all zero are passed over."""
    if [name for name, _ in plain] != [name for name, _ in extra]:
        return float("inf"), "the order of the graph"
    worst, where = 0.0, ""
    for (name, ours), (_, theirs) in zip(plain, extra, strict=True):
        scale = float(np.sqrt(np.mean(np.square(ours, dtype=np.float64)))) if ours.size else 0.0
        if not np.isfinite(scale) or scale < np.finfo(np.float32).tiny:  # masks, and numbers that are integers
            continue
        distance = float(np.sqrt(np.mean(np.square(ours - theirs, dtype=np.float64)))) / scale
        if not distance <= worst:  # not finite counts as worse
            worst, where = distance, name
    return (worst, where) if np.isfinite(worst) else (1e30, where)


if __name__ == "__main__":
    main()

"""Opens llama.cpp's library and loads models with it: kernels are tried first, files checked, crashes explained.

llama.cpp ends the process when it meets something unexpected. So a file that is known to end it is refused before it is
loaded, the current activity is told to whoever watches the process (`pocketquant.activity`), and the message of a
failed assertion is kept.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from pathlib import Path
from typing import Any

from pocketquant.activity import doing, say_last
from pocketquant.errors import EvalError, SourceError, listing
from pocketquant.extras import install_command
from pocketquant.files.small import refuse_other
from pocketquant.gguf_file.reading import OTHER_KINDS, GgufHeader, read_shards
from pocketquant.llama import trial
from pocketquant.llama.buffers import BufferNames
from pocketquant.llama.callbacks import Callback, calling, load_progress
from pocketquant.model import Value

_LOG_LINES = 8
_KEPT_LEVELS = (3, 4)
"""GGML_LOG_LEVEL_WARN and GGML_LOG_LEVEL_ERROR of ggml.h."""

_NO_TEXT_MODEL = {**OTHER_KINDS, "mmproj": "a vision tower", "vocab": "a vocabulary"}

log_lines: deque[str] = deque(maxlen=_LOG_LINES)
"""The last warnings and errors of llama.cpp."""

_buffers = BufferNames()
_callbacks: list[Callback] = []  # ctypes does not keep them alive


def require_runtime() -> Any:
    """The binding, after its kernels were tried on this machine; llama.cpp's log is kept as its last few errors.

    Raises:
        EvalError: it is not installed, cannot be loaded, or dies on this machine.
    """
    if trial.library_files():
        trial.trusted()
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # it would start a debugger on this process
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise EvalError(
            f"running a GGUF needs llama-cpp-python, which cannot be imported here ({error}); {install_command('eval')}"
        ) from error
    if not _callbacks:
        llama_cpp.llama_backend_init()
        _listen(llama_cpp)
    llama_cpp.llama_log_set(log_callback(), ctypes.c_void_p(0))
    return llama_cpp


def log_callback() -> Any:
    """The callback for llama.cpp's log, for parts of it with a log of their own; call `require_runtime` first."""
    return _callbacks[0].pointer


def load_model(library: Any, path: Path, *, gpu_layers: int, has_mtp: bool = False) -> tuple[Any, tuple[str, ...]]:
    """Loads a model.

    Args:
        library: from `require_runtime`.
        path: a GGUF; the first file if it is split.
        gpu_layers: layers computed on a GPU, -1 for all.
        has_mtp: load a multi-token-prediction block to run it, not the trunk.

    Returns:
        llama.cpp's model, to be freed by the caller, and the buffers its weights lie in: AMX, CPU, CPU_REPACK, CUDA0.

    Raises:
        EvalError: no such file, or one that llama.cpp cannot load; its own words are in the message.
    """
    check_loadable(path, has_mtp=has_mtp)
    params = library.llama_model_default_params()
    params.n_gpu_layers = gpu_layers
    params.use_extra_bufts = trial.trusted().use_extra
    if has_mtp:
        if not hasattr(params, "load_mtp"):
            raise EvalError(
                "the installed llama-cpp-python runs no multi-token-prediction blocks; "
                f"{install_command('eval')} --upgrade"
            )
        params.load_mtp = True
    log_lines.clear()
    _buffers.clear()
    progress = load_progress(library)
    params.progress_callback = progress.pointer
    with doing(f"llama.cpp was loading {path}"), calling(progress):
        model = library.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise EvalError(with_log(f"{path}: llama.cpp cannot load it; `pocketquant check` says what is wrong with it"))
    return model, tuple(_buffers.found())


def with_log(message: str) -> str:
    """A message with llama.cpp's last warnings and errors below it."""
    return message + "".join(f"\n  llama.cpp: {line}" for line in log_lines)


def check_loadable(path: Path, *, has_mtp: bool = False) -> None:
    """Refuses files that would end llama.cpp, and this process with it.

    Raises:
        EvalError: there is no such file, it is not a text model, or it is a multi-token-prediction block alone.
        SourceError: the file is broken, or its vocabulary has a token twice.
    """
    refuse_other(path, EvalError)
    if not path.is_file():
        raise EvalError(f"{path}: no such file; give the path of a GGUF")
    shards = read_shards(path)
    header = shards[0][1]
    kind = str(header.metadata.get("general.type", Value("str", "")).value)
    if kind in _NO_TEXT_MODEL:
        raise EvalError(f"{path}: {_NO_TEXT_MODEL[kind]}, which is not run by itself; give the text model")
    names = {tensor.name for _, shard in shards for tensor in shard.tensors}
    if not has_mtp and is_sidecar(header, names):
        raise EvalError(
            f"{path}: only a multi-token-prediction block, which is not run by itself; give the model it stands beside"
        )
    tokens = header.metadata.get("tokenizer.ggml.tokens", Value("str[]", [])).value
    if isinstance(tokens, list) and len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = [token for token in tokens if token in seen or seen.add(token)]  # type: ignore[func-returns-value]
        raise SourceError(
            f"{path}: {len(twice)} tokens stand twice in its vocabulary, which llama.cpp cannot load; convert the "
            f"checkpoint again:\n{listing(repr(token)[:80] for token in twice)}"
        )


def is_sidecar(header: GgufHeader, names: set[str]) -> bool:
    """Whether a file holds a multi-token-prediction block and no trunk."""
    architecture = header.metadata.get("general.architecture", Value("str", "")).value
    n_mtp = header.metadata.get(f"{architecture}.nextn_predict_layers", Value("u32", 0)).value
    return bool(n_mtp) and not any(name.startswith("blk.0.") for name in names)


def _listen(library: Any) -> None:
    def keep_line(level: int, text: bytes, _data: Any) -> None:
        _buffers.read(text)
        if level in _KEPT_LEVELS and text.strip():
            log_lines.append(text.decode(errors="replace").strip())

    _callbacks.append(Callback(library.llama_log_callback, keep_line, None))
    _keep_last_words(library)


def _keep_last_words(library: Any) -> None:
    """Registers a callback for ggml's message before it ends the process; older versions print it themselves.

    Source: `ggml_set_abort_callback` of ggml/include/ggml.h, llama.cpp (b10359).
    """
    from pocketquant.llama.ggml import ggml_function

    kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    try:
        register = ggml_function(library, "ggml_set_abort_callback", ctypes.c_void_p, kind)
    except EvalError:
        return
    callback = Callback(kind, lambda words: say_last((words or b"").decode(errors="replace")), None)
    register(callback.pointer)
    _callbacks.append(callback)

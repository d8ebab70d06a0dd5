"""Runs a multi-token-prediction block over a text, so that the inputs of its weights can be summed.

The block predicts the token after next. Its input at a position is the token's embedding, joined with the trunk's
hidden state (after the last norm) at the position before. llama.cpp runs it in a special kind of context, whether the
file holds the whole model or the block alone. It runs on the CPU, because it is one block of many.

Source: include/llama.h (LLAMA_CONTEXT_TYPE_MTP, load_mtp), common/speculative.cpp (`draft_mtp::process`: which hidden
state goes with which token) and src/models/qwen35.cpp (`graph_mtp`) of llama.cpp b10359.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketquant.errors import EvalError
from pocketquant.formats import F32Array
from pocketquant.gguf_file.reading import read_shards
from pocketquant.llama.callbacks import abort_function, calling
from pocketquant.llama.library import load_model, require_runtime
from pocketquant.llama.runtime import Observe, describe_status, observing
from pocketquant.machine import usable_threads

RunBlock = Callable[[npt.NDArray[np.int32], F32Array], None]
"""Runs the block from empty memory: i32[n] tokens, and f32[n, n_embd] with the hidden state before each."""

_CONTEXT_TYPE_MTP = 1
_MAX_BATCH = 512
_JOIN = re.compile(r"blk\.(\d{1,5})\.nextn\.eh_proj\.weight")


@dataclass(frozen=True)
class Block:
    """A file's multi-token-prediction block.

    Attributes:
        path: the file, or its first shard.
        layer: its number, which is the number of blocks of the trunk.
        n_embd: width of a hidden state.
    """

    path: Path
    layer: int
    n_embd: int


def find_block(path: Path | str) -> Block | None:
    """The multi-token-prediction block of a GGUF, None if it has none.

    Raises:
        SourceError: a broken file.
    """
    for _, header in read_shards(path):
        for tensor in header.tensors:
            if match := _JOIN.fullmatch(tensor.name):
                return Block(Path(path), int(match[1]), tensor.shape[0])
    return None


def block_beside(model: Path, sidecar: Path) -> Block:
    """The block of a sidecar, for the trunk in another file.

    Raises:
        EvalError: the sidecar has no block, or one of another model.
        SourceError: a broken file.
    """
    block = find_block(sidecar)
    if block is None:
        raise EvalError(f"{sidecar}: holds no multi-token-prediction block; give the model's mtp- file")
    if find_block(model) is not None:
        raise EvalError(f"{model}: holds a multi-token-prediction block itself; leave out {sidecar.name}")
    tensors = {tensor.name: tensor.shape for _, header in read_shards(model) for tensor in header.tensors}
    n_layer = 1 + max((int(m[1]) for name in tensors if (m := re.match(r"blk\.(\d{1,5})\.", name))), default=-1)
    n_embd = tensors.get("token_embd.weight", (0, 0))[-1]
    if (n_layer, n_embd) != (block.layer, block.n_embd):
        raise EvalError(
            f"{sidecar}: its block follows {block.layer} blocks of width {block.n_embd}, but {model.name} has "
            f"{n_layer} of width {n_embd}; give the mtp- file of this model"
        )
    return block


@contextmanager
def open_block(block: Block, *, context: int, threads: int | None, observe: Observe) -> Iterator[RunBlock]:
    """Loads a block into llama.cpp.

    Args:
        block: from `find_block`.
        context: most tokens at a time.
        threads: threads that compute; None for all that this process may use.
        observe: as in `open_runtime`.

    Raises:
        EvalError: llama-cpp-python is absent, or llama.cpp cannot load or run the block.
    """
    library = require_runtime()
    callback = observing(library, observe)
    model, _ = load_model(library, block.path, gpu_layers=0, has_mtp=True)
    try:
        params, n_batch = library.llama_context_default_params(), min(_MAX_BATCH, context)
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = context, n_batch, n_batch, 1
        params.n_outputs_max = 1
        params.n_threads = params.n_threads_batch = threads or usable_threads()
        params.ctx_type, params.no_perf, params.cb_eval = _CONTEXT_TYPE_MTP, True, callback.pointer
        params.abort_callback, params.abort_callback_data = abort_function(library)
        with calling():
            opened = library.llama_init_from_model(model, params)
        if not opened:
            raise EvalError(f"{block.path}: llama.cpp cannot set up a context of {context} tokens for its block")
        batch = library.llama_batch_init(n_batch, 0, 1)
        for i in range(n_batch):  # one sequence, always the same
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0

        def run(tokens: npt.NDArray[np.int32], hidden: F32Array) -> None:
            library.llama_memory_clear(library.llama_get_memory(opened), True)
            hidden = np.ascontiguousarray(hidden, np.float32)
            for start in range(0, len(tokens), n_batch):
                piece = hidden[start : start + n_batch]
                count = batch.n_tokens = len(piece)
                np.ctypeslib.as_array(batch.token, shape=(count,))[:] = tokens[start : start + count]
                np.ctypeslib.as_array(batch.pos, shape=(count,))[:] = np.arange(start, start + count)
                # one row of logits at a time, which nobody reads: without any, nothing would be computed
                np.ctypeslib.as_array(batch.logits, shape=(count,))[:] = np.arange(count) == count - 1
                batch.embd = piece.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
                try:
                    with calling(callback):
                        status = library.llama_decode(opened, batch)
                finally:
                    batch.embd = None  # numpy's, not to be freed with the batch
                if status:
                    raise EvalError(
                        f"{block.path}: llama.cpp cannot run its multi-token-prediction block "
                        f"({describe_status(status)})"
                    )

        try:
            yield run
        finally:
            library.llama_batch_free(batch)
            library.llama_free(opened)
    finally:
        library.llama_model_free(model)

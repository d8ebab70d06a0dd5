"""Runs a GGUF with llama.cpp and hands out logits, a few rows at a time.

A `Runtime` is anything that tokenizes and gives logits; `open_runtime` opens the real one. With a vocabulary of 248,320
one row of logits is 1 MB, so rows are computed and handed out in groups of at most `rows` and are gone at the next
step: sum them up, do not keep them.

Source: include/llama.h and `llama_context::decode` of llama.cpp (b10359 and after) for what a batch without outputs
costs and how large the buffer of outputs becomes; llama-cpp-python 0.3.36 for the binding.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from pocketquant.activity import begin_doing, doing, end_doing
from pocketquant.errors import EvalError
from pocketquant.formats import F32Array
from pocketquant.llama.callbacks import Callback, abort_function, calling
from pocketquant.llama.library import load_model, require_runtime, with_log
from pocketquant.llama.normalization import as_trained
from pocketquant.llama.trial import trusted
from pocketquant.machine import usable_threads

_LOGIT_BYTES = 64 << 20
_MAX_BATCH = 512
_ROW_GROUP = 64
"""DeltaNet is computed in chunks of 64 tokens; a cut elsewhere would change the order of its sums."""

_ABORTED = 2
"""What `llama_decode` returns if the abort callback ended it."""

Observe = Callable[[int, bool], bool]
"""llama.cpp's callback for a node of its graph: (address of the ggml_tensor, True for "is it wanted?")."""

Item = tuple[int, int, int, bool]
"""An entry of a batch: token, position, sequence, and whether its logits are wanted."""


class LoadedModel(Protocol):
    """What is known of a model that is open to be run, whatever runs it.

    Attributes:
        n_vocab: columns of the logits.
        n_ctx: the most tokens of one run.
        bos: the token that every run begins with; None if the file asks for none.
        vocabulary: digest of all tokens and their kinds; equal digests mean comparable logits.
        versions: names and versions of the software that computes the logits.
    """

    @property
    def n_vocab(self) -> int: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def vocabulary(self) -> str: ...
    @property
    def versions(self) -> Mapping[str, str]: ...

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Tokens of `text` as the model's own tokenizer gives them, without BOS.

        The names of special tokens count as text unless `special`.
        """
        ...


class Runtime(LoadedModel, Protocol):
    """A model that evaluation can run, window by window."""

    def logits(self, tokens: Sequence[int], *, first: int = 0) -> Iterator[tuple[int, F32Array]]:
        """Logits after each token from position `first` on, memory empty at the start.

        Yields:
            (position of the first row, f32[b, n_vocab]); the array is a view that the next step overwrites.
        """
        ...


@runtime_checkable
class TextRuntime(Runtime, Protocol):
    """A runtime that also knows how long its tokens are as text, and that can be opened twice."""

    def token_bytes(self, tokens: Sequence[int]) -> list[int]:
        """Bytes of the text that each token stands for; a special token's are those of its name."""
        ...

    def twin(self, *, threads: int) -> AbstractContextManager[TextRuntime]:
        """A second runtime over the same weights, for use at the same time; it must be closed before the first."""
        ...


class Sampler(Protocol):
    """A model that writes text of its own."""

    @property
    def bos(self) -> int | None: ...

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """As `Runtime.tokenize`."""
        ...

    def sample(self, tokens: Sequence[int], count: int, *, seed: int) -> list[int]:
        """`count` tokens drawn one after the other, temperature 1, as they would follow `tokens`."""
        ...


def open_runtime(
    path: str | Path,
    *,
    context: int,
    threads: int | None = None,
    gpu_layers: int = 0,
    rows: int | None = None,
    observe: Observe | None = None,
    flash_attention: bool = False,
) -> AbstractContextManager[TextRuntime]:
    """Loads a GGUF into llama.cpp.

    Args:
        path: the file; the first one if it is split.
        context: tokens in the longest window.
        threads: threads that compute; None for all that this process may use.
        gpu_layers: layers computed on a GPU, -1 for all.
        rows: most rows of logits at a time; None for about 64 MB of them, in multiples of 64.
        observe: is called before and after each node of the graph is computed. An exception in it ends the computation
            and is raised again.
        flash_attention: whether llama.cpp may use flash attention, as its own tools do. Logits then depend on how a
            window is cut into batches, by up to 0.003 nats in F32 and 0.1 in Q4_0.

    Returns:
        A context manager that gives a `TextRuntime` and frees the model at its end.

    Raises:
        EvalError: llama-cpp-python is absent, or llama.cpp cannot load the file.
    """
    library = require_runtime()
    settings = LlamaSettings(context, threads or usable_threads(), gpu_layers, rows, flash_attention)
    return LlamaRuntime(library, Path(path), settings, observe=observe)


def open_sampler(
    path: str | Path, *, context: int, threads: int | None = None, gpu_layers: int = 0
) -> AbstractContextManager[Sampler]:
    """Loads a GGUF to sample from; arguments and errors are those of `open_runtime`."""
    library = require_runtime()
    return LlamaRuntime(library, Path(path), LlamaSettings(context, threads or usable_threads(), gpu_layers))


@dataclass(frozen=True)
class LlamaSettings:
    """How llama.cpp runs a model; the fields are the arguments of `open_runtime`."""

    context: int
    threads: int
    gpu_layers: int = 0
    rows: int | None = None
    flash_attention: bool = False


class LlamaRuntime:
    """A model and one context of llama.cpp, with memory for one sequence or for several.

    Several sequences share `context` tokens, or have `context` tokens each where they are `apart`.
    """

    def __init__(
        self,
        library: Any,
        path: Path,
        settings: LlamaSettings,
        *,
        observe: Observe | None = None,
        sequences: int = 1,
        apart: bool = False,
    ) -> None:
        context = settings.context
        self._library = library
        self._path = path
        self._model: Any = None
        self._context: Any = None
        self._owns_model = True
        self._sequences, self._apart = sequences, apart
        self._gpu_layers, self._flash_attention = settings.gpu_layers, settings.flash_attention
        self._callbacks = [observing(library, observe)] if observe is not None else []
        self.n_ctx = context
        self._model, self._buffers = load_model(library, path, gpu_layers=settings.gpu_layers)
        self._activity = f"llama.cpp was running {path}"
        trained = library.llama_model_n_ctx_train(self._model)
        if context > trained:
            self.close()
            raise EvalError(
                f"{path}: a context of {context} tokens was asked for, the model is made for {trained}; "
                f"use a context of at most {trained}"
            )
        self._vocab = library.llama_model_get_vocab(self._model)
        self.n_vocab: int = library.llama_vocab_n_tokens(self._vocab)
        self.bos: int | None = (
            library.llama_vocab_bos(self._vocab) if library.llama_vocab_get_add_bos(self._vocab) else None
        )
        self.vocabulary = _digest_vocabulary(library, self._vocab, self.n_vocab)
        self.rows = min(settings.rows or default_rows(self.n_vocab), context)
        self._batch_tokens = min(max(_MAX_BATCH, self.rows), context * sequences if apart else context)
        self._open_context(settings.threads)

    def _open_context(self, threads: int) -> None:
        library = self._library
        params = library.llama_context_default_params()
        if self._apart:
            params.n_ctx = self.n_ctx * self._sequences
        else:
            # sequences share their prefix; what they do not share must fit beside it
            params.n_ctx = self.n_ctx + (self._batch_tokens if self._sequences > 1 else 0)
        params.n_batch = params.n_ubatch = self._batch_tokens
        params.n_seq_max = self._sequences
        if not self._flash_attention:
            params.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if self._sequences > 1:
            params.kv_unified = not self._apart  # a copied prefix is then kept once
            params.type_k = params.type_v = library.GGML_TYPE_F32
        # bounds the graph's own copy of the logits too; without it room for a whole batch of rows is set aside
        params.n_outputs_max = self.rows
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        params.abort_callback, params.abort_callback_data = abort_function(library)
        for callback in self._callbacks:
            params.cb_eval = callback.pointer
        with doing(f"llama.cpp was setting up {self.n_ctx} tokens of context for {self._path}"), calling():
            self._context = library.llama_init_from_model(self._model, params)
        if not self._context:
            error = self._failure(
                f"llama.cpp cannot set up a context of {self.n_ctx} tokens", "use a smaller context or fewer GPU layers"
            )
            self.close()
            raise error
        begin_doing(self._activity)
        self._batch = library.llama_batch_init(self._batch_tokens, 0, 1)
        for i in range(self._batch_tokens):  # one sequence, always the same
            self._batch.n_seq_id[i] = 1
            self._batch.seq_id[i][0] = 0

    @property
    def versions(self) -> Mapping[str, str]:
        return library_versions(self._library) | {
            "llama_cpp_kernels": " ".join(self._buffers),
            "llama_cpp_batch": f"{self._batch_tokens}",
            "llama_cpp_flash_attention": "auto" if self._flash_attention else "off",
        }

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        data = as_trained(self._library, self._model, self._vocab, text, special=special).encode()
        # a text has no more tokens than bytes, except for a prefix space
        buffer = (self._library.llama_token * (len(data) + 8))()
        count = self._library.llama_tokenize(self._vocab, data, len(data), buffer, len(buffer), False, special)
        if count < 0:
            raise self._failure("llama.cpp cannot tokenize the text with it", "convert the file again")
        return np.frombuffer(buffer, dtype=np.int32, count=count).tolist() if count else []

    def token_bytes(self, tokens: Sequence[int]) -> list[int]:
        # into no room at all: the answer is minus the length
        return [-self._library.llama_token_to_piece(self._vocab, token, None, 0, 0, True) for token in tokens]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, names of special tokens included; bytes that are not UTF-8 become U+FFFD."""
        pieces = []
        for token, nbytes in zip(tokens, self.token_bytes(tokens), strict=True):
            buffer = (ctypes.c_char * max(nbytes, 1))()
            self._library.llama_token_to_piece(self._vocab, token, buffer, nbytes, 0, True)
            pieces.append(bytes(buffer)[:nbytes])
        return b"".join(pieces).decode(errors="replace")

    def twin(self, *, threads: int) -> LlamaRuntime:
        other = copy.copy(self)
        other._context, other._owns_model = None, False
        other._open_context(threads)
        return other

    def logits(self, tokens: Sequence[int], *, first: int = 0) -> Iterator[tuple[int, F32Array]]:
        if not 0 <= first < len(tokens) <= self.n_ctx:
            raise ValueError(f"{len(tokens)} tokens, scored from {first}, do not fit a window of {self.n_ctx}")
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        for start, stop in batch_bounds(len(tokens), first, self._batch_tokens, self.rows):
            self._decode(tokens, start, stop, first)
            scored = max(start, first)
            if scored < stop:
                pointer = self._library.llama_get_logits(self._context)
                yield scored, np.ctypeslib.as_array(pointer, shape=(stop - scored, self.n_vocab))

    def sample(self, tokens: Sequence[int], count: int, *, seed: int) -> list[int]:
        if not 0 < len(tokens) <= len(tokens) + count <= self.n_ctx:
            raise ValueError(f"{len(tokens)} tokens and {count} more do not fit a window of {self.n_ctx}")
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        written, start, rng = list(tokens), 0, np.random.default_rng(seed)
        for _ in range(count):
            for begin, end in batch_bounds(len(written) - start, len(written) - start - 1, self._batch_tokens, 1):
                self._decode(written, start + begin, start + end, len(written) - 1)
            start = len(written)
            pointer = self._library.llama_get_logits(self._context)
            written.append(self.draw(np.ctypeslib.as_array(pointer, shape=(self.n_vocab,)), rng))
        return written[len(tokens) :]

    def draw(self, logits: F32Array, rng: np.random.Generator) -> int:
        """A token at temperature 1."""
        weights = np.cumsum(np.exp(logits.astype(np.float64) - logits.max()))
        if not np.isfinite(weights[-1]):
            raise self._failure("its logits are not finite", "convert the checkpoint again; the file is damaged")
        return int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))

    def decode_items(self, items: Sequence[Item]) -> F32Array:
        """Decodes one batch over several sequences; returns the rows of logits that it asks for, as a view."""
        batch, count = self._batch, len(items)
        batch.n_tokens = count
        tokens, positions, sequences, wanted = zip(*items, strict=True)
        np.ctypeslib.as_array(batch.token, shape=(count,))[:] = tokens
        np.ctypeslib.as_array(batch.pos, shape=(count,))[:] = positions
        np.ctypeslib.as_array(batch.logits, shape=(count,))[:] = wanted
        for i, sequence in enumerate(sequences):
            batch.seq_id[i][0] = sequence
        self._compute(f"{count} tokens", "use a smaller context")
        n_rows = sum(wanted)
        if not n_rows:
            return np.zeros((0, self.n_vocab), np.float32)
        pointer = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(n_rows, self.n_vocab))

    def _decode(self, tokens: Sequence[int], start: int, stop: int, first: int) -> None:
        batch, count = self._batch, stop - start
        positions = np.arange(start, stop)
        batch.n_tokens = count
        np.ctypeslib.as_array(batch.token, shape=(count,))[:] = tokens[start:stop]
        np.ctypeslib.as_array(batch.pos, shape=(count,))[:] = positions
        np.ctypeslib.as_array(batch.logits, shape=(count,))[:] = positions >= first
        self._compute(f"tokens {start} to {stop - 1}", "use a smaller context or fewer GPU layers")

    def _compute(self, what: str, advice: str) -> None:
        """Decodes the batch; raises what a callback raised, and EvalError if llama.cpp says that it failed."""
        with calling(*self._callbacks):
            status = self._library.llama_decode(self._context, self._batch)
        if status:
            raise self._failure(f"llama.cpp cannot decode {what} ({describe_status(status)})", advice)

    def _failure(self, what: str, advice: str) -> EvalError:
        return EvalError(with_log(f"{self._path}: {what}; {advice}"))

    def close(self) -> None:
        """Frees the context and the model; a second call does nothing."""
        if self._context:
            self._library.llama_batch_free(self._batch)
            self._library.llama_free(self._context)
            self._context = None
            end_doing(self._activity)
        if self._model and self._owns_model:
            self._library.llama_model_free(self._model)
        self._model = None

    def __enter__(self) -> LlamaRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def observing(library: Any, observe: Observe) -> Callback:
    """`observe` as llama.cpp's `cb_eval`."""
    return Callback(library.ggml_backend_sched_eval_callback, lambda node, ask, _: observe(node, ask), False)


def describe_status(status: int) -> str:
    """The result of `llama_decode` in words."""
    return "a signal stopped it" if status == _ABORTED else f"status {status}"


def library_versions(library: Any) -> dict[str, str]:
    """Version of the binding, what its kernels were compiled for, as llama.cpp says it, and whether all may be used."""
    features = library.llama_print_system_info().decode()
    return {
        "llama_cpp": metadata.version("llama_cpp_python"),
        "llama_cpp_features": features.strip(" |"),
        "llama_cpp_extra_kernels": "used" if trusted().use_extra else "not used",
    }


def default_rows(n_vocab: int) -> int:
    """Rows of logits that take about 64 MB, in multiples of 64."""
    return max(_LOGIT_BYTES // (4 * n_vocab) // _ROW_GROUP, 1) * _ROW_GROUP


def batch_bounds(n_tokens: int, first: int, batch_tokens: int, rows: int) -> Iterator[tuple[int, int]]:
    """Cuts a window into [start, stop) so that none has over `batch_tokens` tokens or `rows` scored ones.

    Positions from `first` on are scored. The unscored beginning goes in as few, large pieces as possible.
    """
    start = 0
    while start < n_tokens:
        stop = min(max(start, first) + rows, start + batch_tokens, n_tokens)
        yield start, stop
        start = stop


def _digest_vocabulary(library: Any, vocab: Any, n_vocab: int) -> str:
    digest = hashlib.sha256()
    for token in range(n_vocab):
        text = library.llama_vocab_get_text(vocab, token)
        digest.update(b"%d:%d:%b\n" % (library.llama_vocab_get_attr(vocab, token), len(text), text))
    return digest.hexdigest()

"""Runs several continuations of a prompt whose prefix is decoded once: the answers to a question, or a text of its own.

The prefix is decoded once and its state copied. In llama.cpp a copied sequence of a hybrid model shares the keys and
values of attention, and DeltaNet's state is copied when one of the two sequences goes on. So each answer to a question
costs only its own tokens, and so does a question that follows the same examples as the one before it.

Source: `llama_memory_seq_cp` of include/llama.h, src/llama-memory-hybrid.cpp and src/llama-memory-recurrent.cpp of
llama.cpp (b10359 and after).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from pocketquant.errors import EvalError
from pocketquant.formats import F32Array
from pocketquant.llama.library import require_runtime
from pocketquant.llama.runtime import LlamaRuntime, LlamaSettings, LoadedModel
from pocketquant.machine import usable_threads

CHUNK = 64
"""A kept prefix ends where a chunk of DeltaNet ends, so that keeping it does not change the order of sums."""

_PREFIX, _PROMPT, _CONTINUATION, _SEQUENCES = 0, 1, 2, 3
"""The sequences: the prefix that is kept for the next prompt, the prompt, and one continuation of it.

Several continuations side by side would be faster, but their numbers would differ: how a kernel rounds activations
depends on the number of tokens that it gets, and in a quantized file that moves a token by up to 0.1 nats.
"""

IsOver = Callable[[Sequence[int]], bool]


class SharedPrefixRuntime(LoadedModel, Protocol):
    """A model that scores several continuations of a prompt, or writes one; `n_ctx` is for both together.

    Attributes:
        first: the token that stands for "nothing before": `bos`, or else the one that ends a text.
    """

    @property
    def first(self) -> int: ...

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens stand for, names of special tokens included."""
        ...

    def continuations(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]], *, keep: int = 0
    ) -> Iterator[tuple[int | None, int, F32Array]]:
        """Logits at every token of every continuation of a prompt.

        Args:
            prompt: at least one token.
            continuations: each of at least one token, and with the prompt at most `n_ctx`.
            keep: tokens of the prompt with which the next prompt begins too; rounded down to a multiple of 64.

        Yields:
            First (None, 0, f32[1, n_vocab]), which predicts the first token of each continuation. Then (continuation,
            i, f32[b, n_vocab]) that predict its tokens i to i + b - 1. The array is a view that the next step
            overwrites.
        """
        ...

    def write(self, prompt: Sequence[int], count: int, is_over: IsOver, *, keep: int = 0) -> list[int]:
        """Greedy decoding: at most `count` tokens, until the model ends its turn or `is_over(written)` holds.

        The token that ends the turn is returned too.
        """
        ...

    def is_end(self, token: int) -> bool:
        """Whether the token ends the model's turn."""
        ...


def open_shared_prefix(
    path: str | Path, *, context: int, threads: int | None = None, gpu_layers: int = 0
) -> AbstractContextManager[SharedPrefixRuntime]:
    """Loads a GGUF to run continuations; arguments and errors are those of `open_runtime`."""
    library = require_runtime()
    settings = LlamaSettings(context, threads or usable_threads(), gpu_layers)
    text = LlamaRuntime(library, Path(path), settings, sequences=_SEQUENCES)
    return _SharedPrefix(text)


class _SharedPrefix:
    def __init__(self, text: LlamaRuntime) -> None:
        self._text, self._library = text, text._library
        self._memory: Any = self._library.llama_get_memory(text._context)
        self._prefix: list[int] = []
        self.n_vocab, self.n_ctx, self.bos, self.vocabulary = text.n_vocab, text.n_ctx, text.bos, text.vocabulary
        vocab = text._vocab
        ends = (self._library.llama_vocab_eos(vocab), self._library.llama_vocab_bos(vocab))
        known = [token for token in (text.bos, *ends) if token is not None and token >= 0]
        if not known:
            text.close()
            raise EvalError(f"{text._path}: names no token that begins or ends a text; convert it again")
        self.first: int = known[0]

    @property
    def versions(self) -> Mapping[str, str]:
        return self._text.versions

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        return self._text.tokenize(text, special=special)

    def text(self, tokens: Sequence[int]) -> str:
        return self._text.text(tokens)

    def is_end(self, token: int) -> bool:
        return bool(self._library.llama_vocab_is_eog(self._text._vocab, token))

    def continuations(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]], *, keep: int = 0
    ) -> Iterator[tuple[int | None, int, F32Array]]:
        longest = max(map(len, continuations), default=0)
        if not all(continuations) or not longest or not 0 < len(prompt) <= self.n_ctx - longest:
            raise ValueError(f"{len(prompt)} tokens and {longest} more do not fit a window of {self.n_ctx}")
        yield None, 0, self._begin(prompt, keep)
        for i, tokens in enumerate(continuations):
            for at, rows in self._continue(len(prompt), tokens):
                yield i, at, rows

    def write(self, prompt: Sequence[int], count: int, is_over: IsOver, *, keep: int = 0) -> list[int]:
        if not 0 < len(prompt) <= len(prompt) + count <= self.n_ctx:
            raise ValueError(f"{len(prompt)} tokens and {count} more do not fit a window of {self.n_ctx}")
        written: list[int] = []
        row = self._begin(prompt, keep)
        while len(written) < count:
            if not np.isfinite(row).all():
                raise self._text._failure("its logits are not finite", "convert the checkpoint again")
            written.append(int(row.argmax()))
            if self.is_end(written[-1]) or is_over(written) or len(written) == count:
                break
            row = self._text.decode_items([(written[-1], len(prompt) + len(written) - 1, _PROMPT, True)])
        return written

    def _begin(self, prompt: Sequence[int], keep: int) -> F32Array:
        """Decodes the prompt, and keeps the prefix that the next prompt needs; returns the last row of logits."""
        prompt, memory, library = list(prompt), self._memory, self._library
        keep = min(keep, len(prompt) - 1) // CHUNK * CHUNK
        if len(self._prefix) >= len(prompt) or self._prefix != prompt[: len(self._prefix)]:
            library.llama_memory_seq_rm(memory, _PREFIX, -1, -1)
            self._prefix = []
        for sequence in (_PROMPT, _CONTINUATION):
            library.llama_memory_seq_rm(memory, sequence, -1, -1)
        if keep > len(self._prefix):
            self._extend(prompt, len(self._prefix), keep, _PREFIX, last=False)
            self._prefix = prompt[:keep]
        if self._prefix:
            library.llama_memory_seq_cp(memory, _PREFIX, _PROMPT, -1, -1)
        return self._extend(prompt, len(self._prefix), len(prompt), _PROMPT, last=True)

    def _extend(self, tokens: Sequence[int], start: int, stop: int, sequence: int, *, last: bool) -> F32Array:
        """Decodes tokens [start, stop), in pieces that end at multiples of 64; returns the logits of the last one."""
        row = np.zeros((0, self.n_vocab), np.float32)
        piece = max(self._text._batch_tokens // CHUNK * CHUNK, 1)
        for begin in range(start, stop, piece):
            end = min(begin + piece, stop)
            row = self._text.decode_items([(tokens[i], i, sequence, last and i == stop - 1) for i in range(begin, end)])
        return row

    def _continue(self, start: int, tokens: Sequence[int]) -> Iterator[tuple[int, F32Array]]:
        """Decodes one continuation, as many rows at a time as there is room for."""
        last = len(tokens) - 1  # is predicted only
        if not last:
            return
        self._library.llama_memory_seq_cp(self._memory, _PROMPT, _CONTINUATION, -1, -1)
        for begin in range(0, last, self._text.rows):
            stop = min(begin + self._text.rows, last)
            rows = self._text.decode_items([(tokens[i], start + i, _CONTINUATION, True) for i in range(begin, stop)])
            yield begin + 1, rows  # the logits after token i predict token i + 1
        self._library.llama_memory_seq_rm(self._memory, _CONTINUATION, -1, -1)

    def close(self) -> None:
        """Frees the context and the model; a second call does nothing."""
        self._text.close()

    def __enter__(self) -> _SharedPrefix:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

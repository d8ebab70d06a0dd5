"""A text file as windows of tokens, for calibration and for evaluation alike.

The text, without one final newline, is tokenized as a whole and cut into windows of `context` tokens; a rest at the end
is dropped. Where the model wants BOS, it leads the text and replaces the first token of each window. llama-perplexity
and llama-imatrix cut a text in the same way. Evaluation scores the positions from the middle of a window on, so that
each has some text before it.

A file of conversations (`.jsonl`) becomes the text that the model's chat template makes of it, and there the names of
special tokens are special tokens. In a plain text they are text, as they are for llama-perplexity.

Source: tools/perplexity/perplexity.cpp (`perplexity`, `kl_divergence`) and tools/imatrix/imatrix.cpp of llama.cpp.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketquant.errors import EvalError
from pocketquant.files.small import read_text as read_utf8
from pocketquant.llama.runtime import Runtime

MIN_CONTEXT = 8
CHAT_SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Text:
    """A text to score and what kind of text it is.

    Attributes:
        domain: its name in reports: "prose", "code", "german".
        path: UTF-8 text, or conversations in `.jsonl`.
    """

    domain: str
    path: Path

    @property
    def is_chat(self) -> bool:
        return self.path.suffix == CHAT_SUFFIX


@dataclass(frozen=True)
class TextRecord:
    """What a file says about a text that it was made from.

    Attributes:
        name: the text's file name, or "self" for one that the model wrote.
        tokens: tokens of all its windows.
        sha256: `digest_of_tokens` of its windows.
    """

    name: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """A tokenized text, in windows.

    Attributes:
        windows: i32[n_window, context].
        text_tokens: tokens of the whole text, BOS included.
        first: the first position in a window whose prediction is scored; None for the middle.
        name: the name of the text's file.
    """

    windows: npt.NDArray[np.int32]
    text_tokens: int
    first: int | None = None
    name: str = ""

    @property
    def context(self) -> int:
        return self.windows.shape[1]

    @property
    def first_scored(self) -> int:
        """The first position in a window whose prediction is scored; the last one is context - 2."""
        return self.context // 2 if self.first is None else self.first

    @property
    def scored_per_window(self) -> int:
        return self.context - 1 - self.first_scored

    @property
    def sha256(self) -> str:
        """`digest_of_tokens` of the windows."""
        return digest_of_tokens(self.windows)

    @property
    def record(self) -> TextRecord:
        """What a file made from this text says about it."""
        return TextRecord(self.name, self.windows.size, self.sha256)


def digest_of_tokens(windows: npt.NDArray[np.int32]) -> str:
    """SHA-256 of the tokens i32[n_window, context], in hexadecimal digits."""
    return hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()


def check_size(context: int, chunks: int | None) -> None:
    """Raises EvalError for a context or a number of windows that cannot be scored."""
    if context < MIN_CONTEXT:
        raise EvalError(f"context {context} is too short to score; use at least {MIN_CONTEXT} tokens (512 is usual)")
    if chunks is not None and chunks < 1:
        raise EvalError(f"{chunks} chunks cannot be scored; use at least 1, or leave it out for the whole text")


def read_text(path: str | Path) -> str:
    """The text of a file, line ends as they are, without one final newline.

    Raises:
        EvalError: the file cannot be read, is not UTF-8, or is larger than 256 MiB.
    """
    return read_utf8(path, error=EvalError).removesuffix("\n")


def cut_corpus(
    path: str | Path,
    runtime: Runtime,
    *,
    context: int,
    chunks: int | None = None,
    first: int | None = None,
    chat: str | None = None,
) -> Corpus:
    """Reads, tokenizes and cuts a text.

    Args:
        path: a UTF-8 text.
        runtime: the model whose tokenizer is used.
        context: tokens in a window.
        chunks: the most windows to take, from the beginning; None for all.
        first: as in `Corpus`.
        chat: what the chat template made of the file, which is tokenized in its place; None for a plain text.

    Raises:
        EvalError: the text cannot be read, or is too short for one window.
    """
    check_size(context, chunks)
    lead = [] if runtime.bos is None else [runtime.bos]
    text_tokens = runtime.tokenize(read_text(path)) if chat is None else runtime.tokenize(chat, special=True)
    tokens = np.array(lead + text_tokens, dtype=np.int32)
    n_window = min(len(tokens) // context, chunks or len(tokens))
    if n_window == 0:
        raise EvalError(
            f"{path}: {len(tokens)} tokens are too few for one window of {context}; "
            f"give a longer text or a context of at most {len(tokens)}"
        )
    windows = tokens[: n_window * context].reshape(n_window, context)
    if runtime.bos is not None:
        windows[:, 0] = runtime.bos
    return Corpus(windows, len(tokens), first, Path(path).name)

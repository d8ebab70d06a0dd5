"""The texts that a model is calibrated or tuned on: files, and text that the model samples itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketquant.errors import EvalError
from pocketquant.llama.runtime import open_runtime, open_sampler
from pocketquant.texts.corpus import Corpus, TextRecord, cut_corpus

SELF = "self"
"""In place of a text's path: the model writes the text."""

SELF_CHUNKS = 16
"""Windows that a model writes unless told otherwise; it is slow, because it writes one token at a time."""

MIN_CONTEXT = 16

_STARTS = ("<|endoftext|>", "<|im_end|>", "\n")
"""What a sampled window begins with if the model has no BOS: the first of these that is a single token."""


def check_windows(context: int, chunks: int | None) -> None:
    """Raises EvalError for windows that are too short to calibrate on, or for none."""
    if context < MIN_CONTEXT or (chunks is not None and chunks < 1):
        raise EvalError(
            f"context {context}, chunks {chunks}: use windows of at least {MIN_CONTEXT} tokens, and at least one"
        )


def sample_corpus(
    gguf: str | Path, context: int, chunks: int | None, threads: int | None, gpu_layers: int, seed: int
) -> Corpus:
    """Windows that the model itself writes, token by token at temperature 1; `SELF_CHUNKS` unless told otherwise."""
    with open_sampler(gguf, context=context, threads=threads, gpu_layers=gpu_layers) as sampler:
        starts = [sampler.tokenize(start, special=True) for start in _STARTS]
        start = [sampler.bos] if sampler.bos is not None else next((s for s in starts if len(s) == 1), starts[-1])
        count = context - len(start)
        sampled = [start + sampler.sample(start, count, seed=seed + i) for i in range(chunks or SELF_CHUNKS)]
    windows = np.array(sampled, dtype=np.int32)
    return Corpus(windows, windows.size, name=SELF)


def cut_texts(
    gguf: str | Path,
    texts: Sequence[str | Path],
    context: int,
    chunks: int | None,
    threads: int | None,
    gpu_layers: int,
    seed: int,
) -> tuple[npt.NDArray[np.int32], tuple[TextRecord, ...]]:
    """The windows i32[n_window, context] of all texts, one text after the other, and a record of each text.

    Args:
        gguf: the model, whose tokenizer is used.
        texts: paths of UTF-8 texts, or `SELF` to sample one from the model.
        context: tokens in a window.
        chunks: the most windows of each text; None for the whole text, or `SELF_CHUNKS` sampled ones.
        threads: threads that compute; None for all that this process may use.
        gpu_layers: layers computed on a GPU, -1 for all.
        seed: of the sampling.

    Raises:
        EvalError: model or text cannot be read, a text is too short, or one text was given twice.
    """
    cut = []
    with open_runtime(gguf, context=context, threads=threads, gpu_layers=gpu_layers) as runtime:
        for text in texts:
            if str(text) == SELF:
                cut.append(sample_corpus(gguf, context, chunks, threads, gpu_layers, seed))
            else:
                cut.append(cut_corpus(text, runtime, context=context, chunks=chunks))
    records = tuple(corpus.record for corpus in cut)
    if len({record.sha256 for record in records}) < len(records):
        raise EvalError("the same text was given twice; it would count twice")
    return np.concatenate([corpus.windows for corpus in cut]), records

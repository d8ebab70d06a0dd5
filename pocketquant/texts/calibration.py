"""The texts that a model is calibrated or tuned on: files, and text that the model samples itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pocketquant.errors import EvalError
from pocketquant.llama.runtime import open_runtime, open_sampler
from pocketquant.texts.corpus import Corpus, TextRecord, cut_corpus, read_text

SELF = "self"
"""In place of a text's path: the model writes the text."""

SELF_CHUNKS = 16
"""Windows that a model writes unless told otherwise; it is slow, because it writes one token at a time."""

MIN_CONTEXT = 16

_STARTS = ("<|endoftext|>", "<|im_end|>", "\n")
"""What a sampled window begins with if the model has no BOS: the first of these that is a single token."""


@dataclass(frozen=True)
class CalibrationSettings:
    """How a model is run over calibration texts.

    Attributes:
        context: tokens in a window.
        chunks: the most windows of each text; None for the whole text, or `SELF_CHUNKS` sampled ones.
        threads: threads that compute; None for all that this process may use.
        gpu_layers: layers computed on a GPU, -1 for all.
        seed: of the sampling.
        save_seconds: least time between two savings of unfinished work.
    """

    context: int = 512
    chunks: int | None = None
    threads: int | None = None
    gpu_layers: int = 0
    seed: int = 0
    save_seconds: float = 60.0


DEFAULT = CalibrationSettings()


class TokenizedTexts(NamedTuple):
    """The windows of several texts, one text after the other.

    Attributes:
        windows: i32[n_window, context].
        records: what files say about each text.
        versions: names and versions of the software that computes with the model.
    """

    windows: npt.NDArray[np.int32]
    records: tuple[TextRecord, ...]
    versions: Mapping[str, str]


def check_texts(texts: Sequence[str | Path], settings: CalibrationSettings) -> None:
    """Checks before a model is loaded that the windows are long enough and every text can be read.

    Raises:
        EvalError: a text cannot be read, or the settings ask for too short windows or for none.
    """
    context, chunks = settings.context, settings.chunks
    if context < MIN_CONTEXT or (chunks is not None and chunks < 1):
        raise EvalError(
            f"context {context}, chunks {chunks}: use windows of at least {MIN_CONTEXT} tokens, and at least one"
        )
    for text in texts:
        if str(text) != SELF:
            read_text(text)


def sample_corpus(gguf: str | Path, settings: CalibrationSettings) -> Corpus:
    """Windows that the model itself writes, token by token at temperature 1."""
    context, count = settings.context, settings.chunks or SELF_CHUNKS
    with open_sampler(gguf, context=context, threads=settings.threads, gpu_layers=settings.gpu_layers) as sampler:
        starts = [sampler.tokenize(start, special=True) for start in _STARTS]
        start = [sampler.bos] if sampler.bos is not None else next((s for s in starts if len(s) == 1), starts[-1])
        sampled = [start + sampler.sample(start, context - len(start), seed=settings.seed + i) for i in range(count)]
    windows = np.array(sampled, dtype=np.int32)
    return Corpus(windows, windows.size, name=SELF)


def cut_texts(gguf: str | Path, texts: Sequence[str | Path], settings: CalibrationSettings) -> TokenizedTexts:
    """The windows of all texts.

    Args:
        gguf: the model, whose tokenizer is used.
        texts: paths of UTF-8 texts, or `SELF` to sample one from the model.
        settings: how the texts are cut.

    Raises:
        EvalError: model or text cannot be read, a text is too short, or one text was given twice.
    """
    cut = []
    with open_runtime(
        gguf, context=settings.context, threads=settings.threads, gpu_layers=settings.gpu_layers
    ) as runtime:
        for text in texts:
            if str(text) == SELF:
                cut.append(sample_corpus(gguf, settings))
            else:
                cut.append(cut_corpus(text, runtime, context=settings.context, chunks=settings.chunks))
        versions = dict(runtime.versions)
    records = tuple(corpus.record for corpus in cut)
    if len({record.sha256 for record in records}) < len(records):
        raise EvalError("the same text was given twice; it would count twice")
    return TokenizedTexts(np.concatenate([corpus.windows for corpus in cut]), records, versions)

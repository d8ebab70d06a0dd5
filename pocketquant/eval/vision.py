"""The cost of a smaller vision tower: one image and question through two towers, with one text model behind both.

There are two measures. The cosine between the two embeddings of each image token shows how far they turn, without a
text model. The Kullback-Leibler divergence shows how far the answer moves: the reference answers with its most likely
tokens, and both give their probabilities at every token of that answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pocketquant.errors import EvalError
from pocketquant.eval.bootstrap import F64Array
from pocketquant.eval.tasks.compare import Progress, context_of
from pocketquant.extras import list_versions
from pocketquant.files.reading import states_of
from pocketquant.files.unchanged import check_unchanged
from pocketquant.formats import F32Array, U8Array
from pocketquant.gguf_file.identity import FileIdentity, identify, identify_model
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.llama.vision import VisionRuntime, open_vision_runtime
from pocketquant.texts.chat_template import RENDERED, render_conversations, special_tokens

SCHEMA = "pocketquant.vision/1"
QUESTION = "Describe this image."
ANSWER_TOKENS = 32
_IMAGE_MARK = "<|image_pad|>"


@dataclass(frozen=True)
class ImageResult:
    """One image through both towers.

    Attributes:
        image: the file.
        height: of the image, in pixels.
        width: of the image, in pixels.
        image_tokens: rows of its embeddings.
        cosine_mean: over the rows, of the two towers' embeddings.
        cosine_min: at the worst row.
        answer: the answer of the reference.
        answer_tokens: its tokens; the numbers below are taken over them.
        kld_mean: nats, mean over the answer's tokens.
        kld_max: nats, at the worst token.
        same_top: share of tokens at which both have the same most likely token.
    """

    image: FileIdentity
    height: int
    width: int
    image_tokens: int
    cosine_mean: float
    cosine_min: float
    answer: str
    answer_tokens: int
    kld_mean: float
    kld_max: float
    same_top: float


@dataclass(frozen=True)
class VisionReport:
    """Two towers on the same images.

    Attributes:
        model: the text model behind both.
        mmproj: the tower judged.
        reference_mmproj: the tower at full precision.
        kld_mean: nats a token, over all answers.
        kld_standard_error: of it, from the images' own means; None for a single image.
        cosine_mean: over all rows of all images.
    """

    model: FileIdentity
    mmproj: FileIdentity
    reference_mmproj: FileIdentity
    question: str
    context: int
    threads: int | None
    gpu_layers: int
    versions: Mapping[str, str]
    kld_mean: float
    kld_standard_error: float | None
    cosine_mean: float
    images: tuple[ImageResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {"schema": SCHEMA, **asdict(self)}


@dataclass(frozen=True)
class VisionSettings:
    """How two towers are compared.

    Attributes:
        question: asked about each image, in the model's chat template where it has one.
        answer_tokens: the most tokens of the reference's answer that are compared.
        context: tokens of image, question and answer; None for 4,096, or what the model is made for if less.
        threads: threads that compute; None for all.
        gpu_layers: layers of the text model on a GPU.
    """

    question: str = QUESTION
    answer_tokens: int = ANSWER_TOKENS
    context: int | None = None
    threads: int | None = None
    gpu_layers: int = 0


@dataclass(frozen=True)
class _Compared:
    """One image through both towers: the result, and the cosines and divergences behind it."""

    result: ImageResult
    cosines: F64Array
    divergences: F64Array


def compare_towers(
    model: Path,
    mmproj: Path,
    reference_mmproj: Path,
    images: Sequence[Path],
    settings: VisionSettings = VisionSettings(),
    *,
    progress: Progress | None = None,
) -> VisionReport:
    """Shows every image to both towers.

    Args:
        model: GGUF of the text model, the same behind both.
        mmproj: GGUF of the tower to judge.
        reference_mmproj: GGUF of the tower at full precision.
        images: PNG or JPEG files.
        settings: how the towers are compared.
        progress: told after each image.

    Raises:
        EvalError: a file cannot be read or run, an image does not fit, or numbers are not finite.
        SourceError: a file was changed during the run.
    """
    files = states_of(model, mmproj, reference_mmproj, *images)
    identities = identify_model(model), identify(mmproj), identify(reference_mmproj)
    settings = replace(settings, context=settings.context or context_of(model))
    around = _prompt_around(model, settings.question)
    options: Any = {"context": settings.context, "threads": settings.threads, "gpu_layers": settings.gpu_layers}
    compared = []
    # side by side, so that no more than one answer's logits are kept; both share the text model's pages
    with (
        open_vision_runtime(model, reference_mmproj, **options) as full,
        open_vision_runtime(model, mmproj, **options) as small,
    ):
        for i, path in enumerate(images, start=1):
            compared.append(_compare_image(full, small, path, around, settings, mmproj))
            if progress is not None:
                progress(i, len(images))
        versions = list_versions() | dict(small.versions)
    means = np.array([each.divergences.mean() for each in compared])
    check_unchanged(files)
    return VisionReport(
        model=identities[0],
        mmproj=identities[1],
        reference_mmproj=identities[2],
        question=settings.question,
        context=settings.context or 0,
        threads=settings.threads,
        gpu_layers=settings.gpu_layers,
        versions=versions,
        kld_mean=float(np.concatenate([each.divergences for each in compared]).mean()),
        kld_standard_error=float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else None,
        cosine_mean=float(np.concatenate([each.cosines for each in compared]).mean()),
        images=tuple(each.result for each in compared),
    )


def _compare_image(
    full: VisionRuntime,
    small: VisionRuntime,
    path: Path,
    around: tuple[str, str],
    settings: VisionSettings,
    mmproj: Path,
) -> _Compared:
    """Shows one image to both towers; `around` is the text before and after it."""
    before, after = around
    image, context, answer_tokens = full.read_image(path), settings.context or 0, settings.answer_tokens
    theirs, ours = full.embeddings(image), small.embeddings(image)
    if ours.shape != theirs.shape:
        raise EvalError(f"{mmproj}: cuts {path} into {len(ours)} tokens, the reference into {len(theirs)}")
    if len(theirs) + answer_tokens + len((before + after).encode()) > context:
        raise EvalError(f"{path}: {len(theirs)} tokens of it do not fit a context of {context}; scale it down")
    prompt: list[str | U8Array] = [before, image, after]
    tokens = full.answer(prompt, answer_tokens)
    cosines = _cosines(ours, theirs)
    divergences, is_same = _divergence(small.follow(prompt, tokens), full.follow(prompt, tokens))
    if not np.isfinite(divergences).all() or not np.isfinite(cosines).all():
        raise EvalError(f"{mmproj}: gives numbers that are not finite for {path}; convert it again")
    result = ImageResult(
        image=identify(path),
        height=image.shape[0],
        width=image.shape[1],
        image_tokens=len(ours),
        cosine_mean=float(cosines.mean()),
        cosine_min=float(cosines.min()),
        answer=full.text(tokens),
        answer_tokens=len(tokens),
        kld_mean=float(divergences.mean()),
        kld_max=float(divergences.max()),
        same_top=float(is_same.mean()),
    )
    return _Compared(result, cosines, divergences)


def _prompt_around(model: Path, question: str) -> tuple[str, str]:
    """Text before and after the image: in the chat template of the model if it has one that shows images."""
    values = open_gguf(model).metadata
    template = values.get("tokenizer.chat_template")
    if template is not None and isinstance(template.value, str):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        variables = {"add_generation_prompt": True, "enable_thinking": False}
        (rendering,) = render_conversations(template.value, special_tokens(values), [messages], variables=variables)
        if rendering.outcome == RENDERED and rendering.text.count(_IMAGE_MARK) == 1:
            # llama.cpp puts the marks around an image itself
            text = rendering.text.replace("<|vision_start|>", "").replace("<|vision_end|>", "")
            before, after = text.split(_IMAGE_MARK)
            return before, after
    return "", question


def _divergence(ours: Iterable[F32Array], theirs: Iterable[F32Array]) -> tuple[F64Array, F64Array]:
    """At each token of an answer: the divergence from the reference in nats, and whether both top tokens agree."""
    divergences, same = [], []
    for row, reference in zip(ours, theirs, strict=True):
        log_q, log_p = _log_probabilities(row), _log_probabilities(reference)
        divergences.append((np.exp(log_p) * (log_p - log_q)).sum())
        same.append(row.argmax() == reference.argmax())
    return np.array(divergences, np.float64), np.array(same, np.float64)


def _log_probabilities(row: F32Array) -> F64Array:
    logits = row.astype(np.float64) - row.max()
    return logits - np.log(np.exp(logits).sum())


def _cosines(ours: F32Array, theirs: F32Array) -> F64Array:
    one, other = ours.astype(np.float64), theirs.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(axis=1) / lengths

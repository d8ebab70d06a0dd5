"""`eval --image`, and `eval-vision`: a vision tower beside its full precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pocketquant.cli.options import Gguf, mode_panel, option
from pocketquant.cli.screen import print_table
from pocketquant.cli.tasks import Run, TaskContext

Images = Annotated[list[Path], option("--image", "FILE", "PNG or JPEG image; may be repeated.")]
_PANEL = mode_panel("--image")


@dataclass(frozen=True)
class ImageOptions:
    """The two towers, and what is asked about the images."""

    mmproj: Annotated[Path | None, option("--mmproj", "GGUF", "The vision tower to judge.", _PANEL)] = None
    reference_mmproj: Annotated[
        Path | None, option("--reference-mmproj", "GGUF", "The vision tower at full precision.", _PANEL)
    ] = None
    question: Annotated[str, option("--question", "TEXT", "Question to ask about each image.", _PANEL)] = (
        "Describe this image."
    )
    answer_tokens: Annotated[
        int, option("--answer-tokens", "N", "Compare at most this many tokens of an answer.", _PANEL, min=1)
    ] = 32


def eval_vision(
    gguf: Gguf,
    image: Images,
    *,
    options: ImageOptions,
    context: TaskContext = None,
    run: Run,
) -> None:
    """Compare vision towers on images, as `eval --image`."""
    from pocketquant.eval.vision import VisionSettings, compare_towers

    mmproj, reference = options.mmproj, options.reference_mmproj
    if mmproj is None or reference is None:
        missing = "--mmproj" if mmproj is None else "--reference-mmproj"
        raise typer.BadParameter(
            "name both vision towers: the one to judge, and the one in full precision", param_hint=missing
        )
    if run.dry_run:
        raise typer.BadParameter("has no effect with --image", param_hint="--dry-run")
    settings = VisionSettings(
        options.question, options.answer_tokens, context, run.compute.threads, run.compute.gpu_layers
    )
    run.refuse_overwriting(gguf, mmproj, reference, *image)
    with run.talk.steps(mmproj.name, "images") as advance:
        report = compare_towers(
            gguf,
            mmproj,
            reference,
            image,
            settings,
            progress=advance,
        )
    run.keep(report)
    if run.talk.json:
        return
    rows = [
        [
            each.image.name,
            f"{each.width} x {each.height}",
            f"{each.cosine_mean:.6f}",
            f"{each.cosine_min:.6f}",
            f"{each.kld_mean:.3g}",
            f"{each.kld_max:.3g}",
            f"{100 * each.same_top:.0f} %",
        ]
        for each in report.images
    ]
    print_table(["image", "pixels", "cosine", "worst", "KL, nats a token", "largest", "same word"], rows)

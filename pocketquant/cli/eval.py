"""`eval`: how far a GGUF is from full precision, on texts, tensors, tasks, chats or images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketquant.cli.cost import say_pace
from pocketquant.cli.eval_vision import ImageOptions, eval_vision
from pocketquant.cli.group import refuse_given
from pocketquant.cli.options import Chunks, EvalTexts, Gguf, Talk, mode_panel, option
from pocketquant.cli.screen import set_document
from pocketquant.cli.smoke import ChatOptions, smoke
from pocketquant.cli.tasks import Run, TaskOptions, tasks
from pocketquant.cli.weights import weights

if TYPE_CHECKING:
    from pocketquant.eval.report.evidence import TensorState
    from pocketquant.eval.report.schema import Report
    from pocketquant.pace import Progress

_PANEL = mode_panel("--text")


@dataclass(frozen=True)
class Modes:
    """What is compared: one of these, and tensors beside texts."""

    text: EvalTexts = None
    weights: Annotated[
        bool, option("--weights", "", "Compare the weights of each tensor; without --text, no model is run.")
    ] = False
    tasks: Annotated[
        str | None, option("--tasks", "NAME,…", "Compare answers to benchmarks of lm-evaluation-harness, item by item.")
    ] = None
    chats: Annotated[bool, option("--chats", "", "Let both models answer a few chats, and count what went wrong.")] = (
        False
    )
    image: Annotated[
        list[Path] | None, option("--image", "FILE", "PNG or JPEG to compare vision towers on; may be repeated.")
    ] = None

    def only(self) -> str:
        """The mode; refuses none and several."""
        given = {"--text": self.text, "--tasks": self.tasks, "--chats": self.chats, "--image": self.image}
        used = [name for name, value in given.items() if value]
        if self.weights and self.text is None:
            used.append("--weights")
        if len(used) > 1:
            raise typer.BadParameter(f"{' and '.join(used)} are different comparisons: give one", param_hint=used[1])
        if not used:
            raise typer.BadParameter(
                "name what to compare on: --text, --weights, --tasks, --chats or --image", param_hint="--text"
            )
        return used[0]


@dataclass(frozen=True)
class TextOptions:
    """How texts are scored."""

    chunks: Chunks = None
    positions: Annotated[
        bool,
        option("--positions", "", "Also show the loss by position; windows are scored from their beginning.", _PANEL),
    ] = False
    noise_floor: Annotated[
        bool, option("--noise-floor", "", "Also measure the file against itself at another batch size.", _PANEL)
    ] = False
    like: Annotated[
        str | None,
        option("--like", "llama-perplexity", "Round logits as that program does; default: no rounding.", _PANEL),
    ] = None
    head: Annotated[
        Path | None,
        option(
            "--head", "GGUF", "The GGUF that a reference pack was made from; default: the one beside the pack.", _PANEL
        ),
    ] = None
    seed: Annotated[int, option("--seed", "", "Seed of the resampling behind the standard errors.", _PANEL, min=0)] = 0


@dataclass(frozen=True)
class ModeOptions:
    """What goes with one mode only."""

    text: TextOptions
    tasks: TaskOptions
    chats: ChatOptions
    images: ImageOptions


def eval(
    gguf: Gguf,
    modes: Modes,
    command_line: typer.Context,
    *,
    reference: Annotated[
        str | None,
        option(
            "--reference",
            "GGUF|PACK|DIR",
            "The model in full precision: a GGUF, a reference pack, or the checkpoint itself.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        option(
            "--context",
            "N",
            "Tokens in a window; default: 512; with --tasks or --image 4096 for a prompt and its answer.",
            min=8,
        ),
    ] = None,
    options: ModeOptions,
    run: Run,
) -> None:
    """Measure how far a GGUF is from full precision.

    With --text: divergence, agreement and perplexity on texts. With --weights alone: each tensor's error. With --tasks:
    benchmarks. With --chats: free answers. With --image: the vision tower.
    """
    mode = modes.only()
    refuse_given(command_line, _REFUSED[mode], f"has no effect with {mode}")
    set_document(_DOCUMENT[mode])
    if mode == "--image":
        images = modes.image or []
        eval_vision(gguf, images, options=options.images, context=context, run=run)
        return
    if reference is None:
        raise typer.BadParameter("name the full precision to compare with", param_hint="--reference")
    if mode == "--weights":
        weights(str(gguf), reference, run.talk)
    elif mode == "--tasks":
        tasks(gguf, reference, modes.tasks or "", options=options.tasks, context=context, run=run)
    elif mode == "--chats":
        smoke(gguf, reference, options.chats, run)
    else:
        _on_texts(gguf, Path(reference), modes, context or 512, options.text, run)


_REFUSED = {
    "--text": set(),
    "--weights": {"context", "chunks", "threads", "gpu_layers", "out", "dry_run"},
    "--tasks": {"chunks"},
    "--chats": {"context", "chunks"},
    "--image": {"reference", "chunks", "dry_run"},
}
"""Options of no panel, by mode, that say nothing there."""

_DOCUMENT = {"--text": "eval", "--weights": "weights", "--tasks": "tasks", "--chats": "smoke", "--image": "eval-vision"}
"""What a mode's document is called: as the command that is nothing but this mode."""


def _on_texts(gguf: Path, reference: Path, modes: Modes, context: int, options: TextOptions, run: Run) -> None:
    from pocketquant.eval import compare
    from pocketquant.eval.compare import SCORERS
    from pocketquant.eval.reference import open_reference
    from pocketquant.eval.report.markdown import to_markdown
    from pocketquant.pace import try_out
    from pocketquant.texts.embedded import read_texts

    if options.like not in SCORERS:
        raise typer.BadParameter(f"must be {' or '.join(name for name in SCORERS if name)}", param_hint="--like")
    texts = read_texts(modes.text or [])
    run.refuse_overwriting(gguf, reference, *(each.path for each in texts))

    def measure(progress: Progress) -> Report:
        return compare(
            gguf,
            reference,
            texts,
            context=context,
            chunks=options.chunks,
            threads=run.compute.threads,
            gpu_layers=run.compute.gpu_layers,
            seed=options.seed,
            positions=options.positions,
            noise_floor=options.noise_floor,
            like=options.like,
            progress=progress,
            reference_opener=partial(open_reference, head=options.head),
        )

    if run.dry_run:
        say_pace(try_out(measure), "windows", 0, run.talk)
        return
    with run.talk.steps(gguf.name, "windows", (1, 2) if modes.weights else None) as advance:
        report = measure(advance)
    if modes.weights:
        report = replace(report, tensors=_tensors(gguf, reference, run.talk))
    run.keep(report)
    if not run.talk.json:
        print(to_markdown(report), end="")


def _tensors(gguf: Path, reference: Path, talk: Talk) -> tuple[TensorState, ...]:
    """What each tensor is; how far from the reference's, too, unless that is a pack, which holds no weights."""
    from pocketquant.convert import open_model
    from pocketquant.eval.packs.pack import is_pack
    from pocketquant.eval.report.evidence import describe_tensors

    original = None if reference.is_file() and is_pack(reference) else open_model(str(reference))
    with talk.steps("weights", "tensors", (2, 2)) as advance:
        return describe_tensors(open_model(str(gguf)), original, progress=advance)

"""`tune`: scales and codes of a finished file, moved by runs of the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketquant.cli.options import Chunks, Compute, CostOnly, OutFile, Seed, Talk, TorchDevice, option
from pocketquant.cli.screen import print_json, size
from pocketquant.cli.sensitivity import TrainingContext

if TYPE_CHECKING:
    from pocketquant.model import Model
    from pocketquant.tuning.tune import Tuned


@dataclass(frozen=True)
class Training:
    """What is learnt from, and how fast."""

    text: Annotated[
        list[str] | None, option("--text", "FILE", "UTF-8 text; may be repeated; default: the embedded text.")
    ] = None
    context: TrainingContext = 256
    chunks: Chunks = None
    sampled: Annotated[
        int, option("--sampled", "N", "Also train on N windows of which the reference writes the most part.", min=0)
    ] = 0
    epochs: Annotated[float, option("--epochs", "", "How often each window is used.", min=0.01)] = 2.0
    rate: Annotated[
        float, option("--rate", "", "Learning rate of the scales, as a share of a scale.", min=1e-6, max=0.1)
    ] = 1e-3
    code_rate: Annotated[
        float,
        option(
            "--code-rate",
            "",
            "Learning rate of the codes, in distances between levels; 0 leaves the codes alone.",
            min=0,
            max=0.1,
        ),
    ] = 1e-3
    seed: Seed = 0
    torch_device: TorchDevice = "cpu"


def tune(
    file: Annotated[Path, typer.Argument(metavar="GGUF", help="The quantized file.")],
    reference: Annotated[
        str, option("--reference", "SRC", "What the file was made from: a checkpoint, or a GGUF in F32 or BF16.")
    ],
    out: OutFile,
    *,
    training: Training,
    compute: Compute,
    dry_run: CostOnly = False,
    talk: Talk,
) -> None:
    """Move scales and codes of a file to where it loses least.

    It runs the whole model forwards and backwards, which needs the extra `curvature` (torch, transformers).
    """
    from pocketquant.calibration.torch_layers import require_torch
    from pocketquant.convert.sources import open_model
    from pocketquant.demo import text_path
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.texts.calibration import SELF, CalibrationSettings, cut_texts
    from pocketquant.tuning.tune import check_file

    texts = training.text or [str(text_path("calibration"))]
    if SELF in texts:
        raise typer.BadParameter("must be a text; use --sampled N for text that the model writes", param_hint="--text")
    refuse_overwriting([out], [str(file), reference, *texts])
    model = open_model(reference)
    n_scales, n_codes = check_file(file, model)
    if not training.code_rate:
        n_codes = 0
    if not dry_run:
        require_torch()  # before the texts are read
    settings = CalibrationSettings(training.context, training.chunks, compute.threads, seed=training.seed)
    windows, about, _ = cut_texts(file, texts, settings)
    tokens = windows.size + training.sampled * training.context
    disk = 4 * tokens * model.sizes["n_embd"] + 8 * n_codes
    talk.say(
        f"{n_scales} scales, {n_codes} codes, {tokens} tokens {training.epochs:g} times, each forwards and backwards "
        f"through the model; meanwhile {size(disk)} of disk"
    )
    if dry_run:
        if talk.json:
            print_json({"scales": n_scales, "codes": n_codes, "tokens": tokens, "disk_bytes": disk}, of="plan")
        return
    task = _Task(file, reference, out, training, compute, talk)
    more = _sample(task, windows) if training.sampled else None
    _report(task, tokens, _train(task, model, windows, about, more))


@dataclass(frozen=True)
class _Task:
    file: Path
    reference: str
    out: Path
    training: Training
    compute: Compute
    talk: Talk

    def step(self, number: int) -> tuple[int, int]:
        """Sampling, where it is wanted, then tuning."""
        return (number, 2) if self.training.sampled else (1, 1)


def _sample(task: _Task, windows: Any) -> Any:
    """Windows that the reference goes on with."""
    from pocketquant.cli.planning import as_gguf
    from pocketquant.tuning.tune import sample_continuations

    training, compute = task.training, task.compute
    with (
        as_gguf(task.reference, task.out, threads=compute.threads, quiet=task.talk.quiet) as gguf,
        task.talk.steps("sampling", "windows", task.step(1)) as advance,
    ):
        return sample_continuations(
            gguf,
            windows,
            training.sampled,
            threads=compute.threads,
            gpu_layers=compute.gpu_layers,
            seed=training.seed,
            progress=advance,
        )


def _train(task: _Task, model: Model, windows: Any, about: Any, more: Any) -> Tuned:
    from pocketquant.tuning.tune import DoesNotPay, TuneSettings, TuningWindows, sampled_text, tune_file

    training = task.training
    settings = TuneSettings(
        training.epochs,
        training.rate,
        training.code_rate,
        device=training.torch_device,
        threads=task.compute.threads,
        seed=training.seed,
    )
    if more is not None:
        about = (*about, sampled_text(more))
    try:
        with task.talk.steps("tuning", "steps", task.step(2)) as advance:
            return tune_file(
                task.file,
                model,
                TuningWindows(windows, about, more),
                task.out,
                settings,
                progress=advance,
            )
    except DoesNotPay as error:
        task.talk.say(str(error))
        if task.talk.json:
            print_json({"out": None, "held_back_kld": {"before": error.before, "after": error.after}})
        raise typer.Exit(1) from None


def _report(task: _Task, tokens: int, tuned: Tuned) -> None:
    task.talk.say(
        f"written: {task.out}: {tuned.steps} steps, {tuned.n_moved} codes moved; divergence on windows held back "
        f"{tuned.before:.6f} before, {tuned.after:.6f} after ({tuned.after / tuned.before:.3f})"
    )
    if task.talk.json:
        print_json(
            {
                "out": str(task.out),
                "file_bytes": task.out.stat().st_size,
                "scales": tuned.n_scales,
                "codes": tuned.n_codes,
                "moved": tuned.n_moved,
                "steps": tuned.steps,
                "tokens": tokens,
                "held_back_kld": {"before": tuned.before, "after": tuned.after},
            }
        )

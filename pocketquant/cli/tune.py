"""`pocketquant tune`: scales and codes of a finished file, moved by runs of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketquant.cli.screen import print_json, say, size, step_progress


def tune(
    file: Annotated[Path, typer.Argument(metavar="GGUF", help="The quantized file.")],
    reference: Annotated[
        str,
        typer.Option("--reference", metavar="SRC", help="What it was made from: checkpoint, GGUF in F32 or BF16."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The tuned file to write.")],
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="FILE", help="UTF-8 text, several times for several; default: embedded."),
    ] = None,
    context: Annotated[int, typer.Option("--context", min=16, metavar="N", help="Tokens in a window.")] = 256,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, metavar="N", help="Windows of each text; default: all.")
    ] = None,
    sampled: Annotated[
        int,
        typer.Option("--sampled", min=0, metavar="N", help="Windows more, which the reference itself goes on with."),
    ] = 0,
    epochs: Annotated[float, typer.Option("--epochs", min=0.01, help="How often each window is used.")] = 2.0,
    rate: Annotated[float, typer.Option("--rate", min=1e-6, max=0.1, help="Of the steps, in parts of a scale.")] = 1e-3,
    code_rate: Annotated[
        float, typer.Option("--code-rate", min=0, max=0.1, help="Of codes, in levels' distances; 0 leaves them alone.")
    ] = 1e-3,
    seed: Annotated[int, typer.Option("--seed", help="Of the windows' order, and of what is sampled.")] = 0,
    device: Annotated[str, typer.Option("--device", metavar="cpu|cuda", help="Where gradients are computed.")] = "cpu",
    threads: Annotated[int | None, typer.Option("--threads", min=1, metavar="N", help="Threads that compute.")] = None,
    gpu_layers: Annotated[int, typer.Option("--gpu-layers", metavar="N", help="Layers llama.cpp runs on a GPU.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it will cost and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no talk on stderr.")] = False,
) -> None:
    """Tune scales and codes of a quantized file by runs of the whole model (extra `curvature`: torch, transformers)."""
    from pocketquant.calibration.torch_layers import require_torch
    from pocketquant.cli.planning import as_gguf
    from pocketquant.convert.sources import open_model
    from pocketquant.demo import text_path
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.texts.calibration import SELF, CalibrationSettings, cut_texts
    from pocketquant.tuning.tune import (
        DoesNotPay,
        TuneSettings,
        TuningWindows,
        check_file,
        sample_continuations,
        sampled_text,
        tune_file,
    )

    texts = text or [str(text_path("calibration"))]
    if SELF in texts:
        raise typer.BadParameter("give a text, and --sampled for what the model writes", param_hint="--text")
    refuse_overwriting([out], [str(file), reference, *texts])
    model = open_model(reference)
    n_scales, n_codes = check_file(file, model)
    if not code_rate:
        n_codes = 0
    if not dry_run:
        require_torch()  # before the texts are read
    windows, about, _ = cut_texts(file, texts, CalibrationSettings(context, chunks, threads, seed=seed))
    tokens = windows.size + sampled * context
    disk = 4 * tokens * model.sizes["n_embd"] + 8 * n_codes
    say(
        f"{n_scales} scales, {n_codes} codes, {tokens} tokens {epochs:g} times, each forwards and backwards through "
        f"the model; meanwhile {size(disk)} of disk",
        quiet=quiet,
    )
    if dry_run:
        if json:
            print_json({"scales": n_scales, "codes": n_codes, "tokens": tokens, "disk_bytes": disk}, of="plan")
        return
    more = None
    if sampled:
        with (
            as_gguf(reference, out, threads=threads, quiet=quiet) as gguf,
            step_progress("sampling", quiet=quiet) as advance,
        ):
            more = sample_continuations(
                gguf, windows, sampled, threads=threads, gpu_layers=gpu_layers, seed=seed, progress=advance
            )
        about = (*about, sampled_text(more))
    try:
        with step_progress("tuning", quiet=quiet) as advance:
            tuned = tune_file(
                file,
                model,
                TuningWindows(windows, about, more),
                out,
                TuneSettings(epochs, rate, code_rate, device=device, threads=threads, seed=seed),
                progress=advance,
            )
    except DoesNotPay as error:
        say(str(error), quiet=quiet)
        if json:
            print_json({"out": None, "held_back_kld": {"before": error.before, "after": error.after}})
        raise typer.Exit(1) from None
    say(
        f"written: {out}: {tuned.steps} steps, {tuned.n_moved} codes moved; divergence on windows held back "
        f"{tuned.before:.6f} before, {tuned.after:.6f} after ({tuned.after / tuned.before:.3f})",
        quiet=quiet,
    )
    if json:
        print_json(
            {
                "out": str(out),
                "file_bytes": out.stat().st_size,
                "scales": tuned.n_scales,
                "codes": tuned.n_codes,
                "moved": tuned.n_moved,
                "steps": tuned.steps,
                "tokens": tokens,
                "held_back_kld": {"before": tuned.before, "after": tuned.after},
            }
        )

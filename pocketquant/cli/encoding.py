"""`convert` and `quantize`: a source in, a GGUF out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketquant.cli.options import (
    AdapterDir,
    ChatTemplate,
    DryRun,
    Json,
    KeepSource,
    Mmproj,
    Mtp,
    Out,
    Quiet,
    RoundingSteps,
    Scheduler,
    Source,
    SplitMaxSize,
    Stats,
    Threads,
)
from pocketquant.cli.planning import Request, run
from pocketquant.cli.sizing import Deciding


def convert(
    source: Source,
    out: Out = None,
    type: Annotated[str, typer.Option("--type", metavar="bf16|f16|f32", help="Number format of the weights.")] = "bf16",
    chat_template: ChatTemplate = None,
    adapter: AdapterDir = None,
    mtp: Mtp = "sidecar",
    mmproj: Mmproj = None,
    keep_source: KeepSource = None,
    split_max_size: SplitMaxSize = None,
    threads: Threads = None,
    scheduler: Scheduler = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint to a full-precision GGUF."""
    if type.lower() not in ("bf16", "f16", "f32"):
        raise typer.BadParameter("bf16, f16 or f32; for smaller types use `pocketquant quantize`", param_hint="--type")
    run(
        Request(
            source,
            out,
            Deciding(recipe=type.lower()),
            chat_template=chat_template,
            adapter=adapter,
            mtp=mtp,
            mmproj=mmproj,
            keep_source=keep_source,
            split_max_size=split_max_size,
            threads=threads,
            scheduler=scheduler,
            dry_run=dry_run,
            json=json,
            quiet=quiet,
        )
    )


def quantize(
    source: Source,
    out: Out = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME|FILE",
            help="Built-in recipe, a TOML file, or from:FILE.gguf for another file's types; default: pocket_4bit.",
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option("--target-size", metavar="SIZE", help="Least predicted loss in a file of 2.95GB, 700MB, 1.5GiB."),
    ] = None,
    target_bpw: Annotated[
        float | None, typer.Option("--target-bpw", metavar="BITS", help="The same for bits per weight: 4.8.")
    ] = None,
    sensitivity: Annotated[
        Path | None, typer.Option("--sensitivity", metavar="FILE", help="Measured sensitivities to predict with.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print what each role takes, loses, and would lose in the next type.")
    ] = False,
    device: Annotated[
        str, typer.Option("--device", metavar="phone|any", help="Types to choose from: those fast on phones, or all.")
    ] = "phone",
    keep_types: Annotated[
        bool, typer.Option("--keep-types", help="A pocket recipe's own types, though --stats could choose better ones.")
    ] = False,
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", metavar="FILE", help="Importance matrix, llama.cpp's GGUF format.")
    ] = None,
    stats: Stats = None,
    rounding: RoundingSteps = None,
    chat_template: ChatTemplate = None,
    adapter: AdapterDir = None,
    mtp: Mtp = "sidecar",
    mmproj: Mmproj = None,
    keep_source: KeepSource = None,
    split_max_size: SplitMaxSize = None,
    threads: Threads = None,
    scheduler: Scheduler = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a checkpoint in one pass, or a full-precision GGUF."""
    run(
        Request(
            source,
            out,
            Deciding(
                recipe=recipe,
                target_size=target_size,
                target_bpw=target_bpw,
                sensitivity=sensitivity,
                explain=explain,
                device=device,
                keep_types=keep_types,
                imatrix=imatrix,
                stats=stats,
                rounding=rounding,
            ),
            chat_template=chat_template,
            adapter=adapter,
            mtp=mtp,
            mmproj=mmproj,
            keep_source=keep_source,
            split_max_size=split_max_size,
            threads=threads,
            scheduler=scheduler,
            dry_run=dry_run,
            json=json,
            quiet=quiet,
        )
    )

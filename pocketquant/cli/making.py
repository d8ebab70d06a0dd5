"""`make` and `demo`: everything at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pocketquant.cli.options import (
    AdapterDir,
    ChatTemplate,
    Chunks,
    Context,
    DryRun,
    GpuLayers,
    Json,
    KeepSource,
    Mmproj,
    Mtp,
    Quiet,
    RoundingSteps,
    Scheduler,
    Source,
    SplitMaxSize,
    Stats,
    Threads,
)
from pocketquant.cli.planning import encoding_on, open_source
from pocketquant.cli.report import command_words
from pocketquant.cli.screen import byte_progress, print_json, say, size, step_progress
from pocketquant.cli.sizing import Deciding, read_choices


def make(
    source: Source,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the files and the report.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", "-r", metavar="NAME|FILE.toml", help="One output each; default: pocket_4bit, q8_0."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="FILE|NAME=FILE|domains", help="As for eval; default: embedded text."),
    ] = None,
    positions: Annotated[bool, typer.Option("--positions", help="Also by position in the window.")] = False,
    imatrix: Annotated[
        str | None,
        typer.Option("--imatrix", metavar="FILE|none", help="Importance matrix; default: one is made and kept."),
    ] = None,
    stats: Stats = None,
    rounding: RoundingSteps = None,
    calibrate: Annotated[
        str | None,
        typer.Option("--calibrate", metavar="FILE|self", help="Text to make it from; self: the model writes it."),
    ] = None,
    calibrate_chunks: Annotated[
        int | None, typer.Option("--calibrate-chunks", min=1, metavar="N", help="Windows of it; default 128, self 16.")
    ] = None,
    reference_type: Annotated[
        str, typer.Option("--reference-type", metavar="f32|bf16", help="Type of the reference; bf16 halves memory.")
    ] = "f32",
    chat_template: ChatTemplate = None,
    adapter: AdapterDir = None,
    mtp: Mtp = "sidecar",
    mmproj: Mmproj = None,
    keep_source: KeepSource = None,
    split_max_size: SplitMaxSize = None,
    context: Context = 512,
    chunks: Chunks = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    scheduler: Scheduler = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Do it all: quantized files, evaluation against full precision, report, checksums."""
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.gguf_file.shards import parse_size
    from pocketquant.release.make import (
        DEFAULT_RECIPES,
        Bars,
        Settings,
        calibration_text,
        list_outputs,
        make_release,
        plan_release,
        to_markdown,
    )
    from pocketquant.texts.embedded import read_texts

    if imatrix is not None and (calibrate is not None or calibrate_chunks is not None):
        raise typer.BadParameter("give a matrix, or a text to make one from, not both", param_hint="--calibrate")
    if reference_type not in ("f32", "bf16"):
        raise typer.BadParameter("f32 or bf16", param_hint="--reference-type")
    matrix = None if imatrix in (None, "none") else Path(imatrix)
    shared = Deciding(imatrix=matrix, stats=stats, rounding=rounding)
    settings = Settings(
        texts=tuple(read_texts(text)) if text else (),
        context=context,
        chunks=chunks,
        positions=positions,
        calibrate=(calibrate or calibration_text()) if imatrix is None else None,
        calibrate_chunks=calibrate_chunks,
        reference_type=reference_type,
        mmproj=mmproj,
        split_bytes=parse_size(split_max_size) if split_max_size else None,
    )
    choices = read_choices([replace(shared, recipe=name) for name in recipe or DEFAULT_RECIPES])
    parts = open_source(source, chat_template, keep_source, adapter, mtp, mmproj)
    with step_progress("predicting", quiet=quiet) as advance:
        release = plan_release(source, choices, settings, parts=parts, progress=advance)
    made_from = [source, imatrix, stats, calibrate, chat_template, adapter, *(recipe or [])]
    read = [*made_from, *(each.path for each in release.settings.texts)]
    refuse_overwriting(list_outputs(release, out), read, makes_folder=True)
    for note in release.model.notes:
        say(f"note: {note}", quiet=quiet)
    for variant in (*release.variants, *release.sidecars):
        bits = f"{variant.plan.bits_per_weight:.2f} bits per weight"
        say(f"will write {variant.name}: {size(variant.plan.file_bytes)}, {bits}", quiet=quiet)
    say(
        f"needs {size(release.disk_bytes)} of disk while it runs ({size(release.kept_bytes)} stay) and about "
        f"{size(release.memory_bytes)} of memory for the evaluation",
        quiet=quiet,
    )
    if dry_run:
        if json:
            files = [
                {"file": item.name, "file_bytes": item.plan.file_bytes}
                for item in (*release.variants, *release.sidecars)
            ]
            print_json(
                {"files": files, "disk_bytes": release.disk_bytes, "memory_bytes": release.memory_bytes}, of="plan"
            )
        return
    bars = Bars(
        bytes=lambda label, total: byte_progress(label, total, quiet=quiet),
        steps=lambda label: step_progress(label, quiet=quiet),
    )
    with encoding_on(scheduler) as encode:
        result = make_release(
            release, out, threads=threads, gpu_layers=gpu_layers, bars=bars, run=encode, command=command_words()
        )
    if json:
        print_json(result)
    else:
        print(to_markdown(result), end="")
    say(f"written to {out}", quiet=quiet)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the files.")] = Path("demo-out"),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run `make` on the small checkpoint that comes with the package."""
    from pocketquant.demo import checkpoint_dir

    # seconds; the whole texts take minutes
    make(str(checkpoint_dir()), out, calibrate_chunks=32, chunks=64, json=json, quiet=quiet)

"""`sweep`: several recipes or sizes over one source and one reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pocketquant.cli.planning import encoding_on, open_source
from pocketquant.cli.report import command_words
from pocketquant.cli.screen import byte_progress, print_json, say, size, step_progress
from pocketquant.cli.sizing import Deciding, read_choices


def sweep(
    source: Annotated[str, typer.Argument(metavar="SRC", help="As for make.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the report and the kept files.")],
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", "-r", metavar="NAME|FILE", help="A recipe; may be repeated.")
    ] = None,
    target_size: Annotated[
        list[str] | None, typer.Option("--target-size", metavar="SIZE", help="A file size; may be repeated.")
    ] = None,
    target_bpw: Annotated[
        list[float] | None, typer.Option("--target-bpw", metavar="BITS", help="Bits per weight; may be repeated.")
    ] = None,
    sensitivity: Annotated[
        Path | None, typer.Option("--sensitivity", metavar="FILE", help="Measured sensitivities, for targets.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="FILE|NAME=FILE|domains", help="As for eval; default: embedded text."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", metavar="PACK", help="A reference pack with its head; default: one is made."),
    ] = None,
    reference_type: Annotated[
        str, typer.Option("--reference-type", metavar="f32|bf16", help="Type of the reference; bf16 halves memory.")
    ] = "f32",
    positions: Annotated[bool, typer.Option("--positions", help="Also by position in the window.")] = False,
    imatrix: Annotated[
        str | None,
        typer.Option("--imatrix", metavar="FILE|none", help="Importance matrix; default: one is made and kept."),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option("--calibrate", metavar="FILE|self", help="Text to make it from; self: the model writes it."),
    ] = None,
    calibrate_chunks: Annotated[
        int | None, typer.Option("--calibrate-chunks", min=1, metavar="N", help="Windows of it; default 128, self 16.")
    ] = None,
    stats: Annotated[
        Path | None, typer.Option("--stats", metavar="FILE", help="Statistics to round by, from `calibrate`.")
    ] = None,
    rounding: Annotated[
        str | None, typer.Option("--rounding", metavar="STEPS", help="How far to go with them, as for quantize.")
    ] = None,
    keep: Annotated[
        str, typer.Option("--keep", metavar="front|all|none", help="Files to keep; front: those that no other beats.")
    ] = "front",
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="PEFT LoRA adapter to merge into the checkpoint.")
    ] = None,
    keep_source: Annotated[
        Path | None, typer.Option("--keep-source", metavar="DIR", help="Download a hub's repository there, whole.")
    ] = None,
    context: Annotated[int, typer.Option("--context", min=8, metavar="N", help="Tokens in a window.")] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, metavar="N", help="Windows to score of each text; default: all.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, metavar="N", help="Worker threads; default: every processor.")
    ] = None,
    gpu_layers: Annotated[int, typer.Option("--gpu-layers", metavar="N", help="Layers to run on a GPU.")] = 0,
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", metavar="dask://HOST:PORT", help="Encode on a Dask cluster; measure here."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it costs and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no talk on stderr.")] = False,
) -> None:
    """Measure several recipes or sizes against one reference; an interrupted sweep goes on where it was."""
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.release.measuring import REPORTS, Bars, Means, to_markdown
    from pocketquant.release.planning import Settings, calibration_text, plan_release
    from pocketquant.release.sweep import KEEP, plan_sweep, run_sweep
    from pocketquant.texts.embedded import read_texts

    if imatrix is not None and (calibrate is not None or calibrate_chunks is not None):
        raise typer.BadParameter("give a matrix, or a text to make one from, not both", param_hint="--calibrate")
    if reference_type not in ("f32", "bf16"):
        raise typer.BadParameter("f32 or bf16", param_hint="--reference-type")
    if keep not in KEEP:
        raise typer.BadParameter(" or ".join(KEEP), param_hint="--keep")
    matrix = None if imatrix in (None, "none") else Path(imatrix)
    shared = Deciding(imatrix=matrix, stats=stats, rounding=rounding)
    sized = replace(shared, sensitivity=sensitivity)
    options = [replace(shared, recipe=name) for name in recipe or []]
    options += [replace(sized, target_size=wanted) for wanted in target_size or []]
    options += [replace(sized, target_bpw=bits) for bits in target_bpw or []]
    if not options:
        raise typer.BadParameter("name what to compare: --recipe, --target-size or --target-bpw", param_hint="--recipe")
    settings = Settings(
        texts=tuple(read_texts(text)) if text else (),
        context=context,
        chunks=chunks,
        positions=positions,
        calibrate=(calibrate or calibration_text()) if imatrix is None else None,
        calibrate_chunks=calibrate_chunks,
        reference_type=reference_type,
    )
    parts = open_source(source, None, keep_source, adapter, "drop", "none")
    with step_progress("predicting", quiet=quiet) as advance:
        release = plan_release(source, read_choices(options), settings, parts=parts, progress=advance)
    made_from = [source, imatrix, stats, calibrate, sensitivity, reference, adapter, *(recipe or [])]
    written = [out / name for name in (*(each.name for each in release.variants), *REPORTS)]
    refuse_overwriting(written, [*made_from, *(each.path for each in release.settings.texts)], makes_folder=True)
    planned = plan_sweep(release, pack=reference, keep=keep)
    missing = planned.missing(out)
    for variant in release.variants:
        known = "to measure" if variant in missing else "measured already"
        say(f"{variant.name}: {size(variant.plan.file_bytes)}, {known}", quiet=quiet)
    say(
        f"{len(missing)} of {len(release.variants)} files to make and measure; needs up to {size(planned.disk_bytes)} "
        f"of disk and {size(planned.memory_bytes)} of memory",
        quiet=quiet,
    )
    if dry_run:
        if json:
            files = [
                {"file": each.name, "file_bytes": each.plan.file_bytes, "is_measured": each not in missing}
                for each in release.variants
            ]
            print_json(
                {"files": files, "disk_bytes": planned.disk_bytes, "memory_bytes": planned.memory_bytes}, of="plan"
            )
        return
    bars = Bars(
        bytes=lambda label, total: byte_progress(label, total, quiet=quiet),
        steps=lambda label: step_progress(label, quiet=quiet),
    )
    with encoding_on(scheduler) as encode:
        result = run_sweep(planned, out, means=Means(threads, gpu_layers, bars, encode), command=command_words())
    if json:
        print_json(result)
    else:
        print(to_markdown(result), end="")
    say(f"written to {out}", quiet=quiet)

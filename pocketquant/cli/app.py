"""The commands. Each opens, plans, says what it will cost, runs, and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketquant.cli.calibrate import calibrate
from pocketquant.cli.doctor import doctor
from pocketquant.cli.encoding import convert, quantize
from pocketquant.cli.gate import gate
from pocketquant.cli.group import Commands
from pocketquant.cli.making import demo, make
from pocketquant.cli.options import Context, DryRun, GpuLayers, Json, Out, Quiet, Source, Threads
from pocketquant.cli.report import report
from pocketquant.cli.screen import print_json, step_progress
from pocketquant.cli.sensitivity import sensitivity as measure_sensitivity
from pocketquant.cli.sizing import recipe_app
from pocketquant.cli.sweep import sweep
from pocketquant.cli.tasks import eval_vision, smoke, tasks
from pocketquant.cli.tune import tune

app = typer.Typer(
    cls=Commands,
    help="Qwen3.5 checkpoints in, small GGUF files out, with the numbers of what quantization cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # [absolute] in a help text is a word, no markup
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(recipe_app, name="recipe")
app.command()(calibrate)
app.command()(tune)
app.command("sensitivity")(measure_sensitivity)
app.command()(gate)
app.command()(doctor)
app.command()(tasks)
app.command()(smoke)
app.command("eval-vision")(eval_vision)
app.command()(report)
app.command()(sweep)
app.command()(convert)
app.command()(quantize)


def _version(value: bool) -> None:
    if value:
        from pocketquant import __version__

        typer.echo(f"pocketquant {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def adapter(
    folder: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a LoRA adapter, PEFT's or mlx-lm's.")],
    base: Annotated[str, typer.Option("--base", metavar="SRC", help="The model it belongs to: checkpoint or GGUF.")],
    out: Out = None,
    type: Annotated[str, typer.Option("--type", metavar="f32|f16|bf16", help="Number format of the matrices.")] = "f32",
    split_max_size: Annotated[
        str | None,
        typer.Option("--split-max-size", metavar="SIZE", help="Refuse a larger file: adapters are not read in shards."),
    ] = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a LoRA adapter to a GGUF that llama.cpp loads beside the base model (--lora)."""
    from pocketquant.cli.adapter import convert_adapter

    if type.lower() not in ("f32", "f16", "bf16"):
        raise typer.BadParameter("f32, f16 or bf16", param_hint="--type")
    if out is None and not dry_run:
        raise typer.BadParameter("name the file to write, or use --dry-run", param_hint="--out")
    convert_adapter(folder, base, None if dry_run else out, type.lower(), split_max_size, json=json, quiet=quiet)


@app.command()
def split(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF, or the first shard of one to split anew.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Names the shards: FILE-00001-of-0000N.")],
    split_max_size: Annotated[
        str, typer.Option("--split-max-size", metavar="SIZE", help="Largest file: 512M, 2GB, 1.5GiB.")
    ],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Split a GGUF into shards that llama.cpp loads, without touching its weights."""
    from pocketquant.cli import splitting

    splitting.split(file, out, split_max_size, json=json, quiet=quiet)


@app.command()
def join(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The first shard, NAME-00001-of-0000N.gguf.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The GGUF to write.")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Join the shards of a GGUF; the result is the file that was split."""
    from pocketquant.cli import splitting

    splitting.join(file, out, json=json, quiet=quiet)


@app.command()
def inspect(source: Source, json: Json = False) -> None:
    """List metadata and tensors of a GGUF or a checkpoint, without reading weights."""
    from pocketquant.cli import viewing

    viewing.inspect(source, json=json)


@app.command()
def eval(
    gguf: Annotated[Path, typer.Argument(metavar="GGUF", help="The file to judge.")],
    reference: Annotated[
        Path,
        typer.Option(
            "--reference",
            metavar="GGUF|PACK|DIR",
            help="Full precision: a GGUF of the same checkpoint, a reference pack, or the checkpoint itself.",
        ),
    ],
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            metavar="FILE|NAME=FILE|domains",
            help="UTF-8 text or conversations in .jsonl, none used for calibration; once for each domain.",
        ),
    ],
    context: Context = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, metavar="N", help="Windows to score of each text; default: all.")
    ] = None,
    positions: Annotated[
        bool, typer.Option("--positions", help="Also by position in the window, scored from its beginning.")
    ] = False,
    noise_floor: Annotated[
        bool, typer.Option("--noise-floor", help="Also the file against itself at another batch size.")
    ] = False,
    like: Annotated[
        str | None,
        typer.Option("--like", metavar="llama-perplexity", help="Round as that program does; default: not at all."),
    ] = None,
    head: Annotated[
        Path | None,
        typer.Option("--head", metavar="GGUF", help="What a reference pack was made from; default: beside the pack."),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Also what each tensor is and lost, for gate --explain.")
    ] = False,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap behind the standard errors.")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how far a GGUF is from full precision: divergence, agreement, perplexity, by domain and position."""
    from pocketquant.cli.evaluate import evaluate

    evaluate(
        gguf,
        reference,
        text,
        context=context,
        chunks=chunks,
        positions=positions,
        noise_floor=noise_floor,
        like=like,
        threads=threads,
        gpu_layers=gpu_layers,
        seed=seed,
        json=json,
        quiet=quiet,
        head=head,
        weights=weights,
    )


@app.command()
def reference(
    model: Annotated[Path, typer.Argument(metavar="GGUF|DIR", help="Full precision: a GGUF or a checkpoint's folder.")],
    text: Annotated[
        list[str], typer.Option("--text", metavar="FILE|NAME=FILE|domains", help="As for eval; once for each text.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The pack to write: NAME.pqref.")],
    context: Context = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, metavar="N", help="Windows to keep of each text; default: all.")
    ] = None,
    positions: Annotated[
        bool, typer.Option("--positions", help="Keep windows from their beginning, for eval --positions.")
    ] = False,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, metavar="N", help="Keep the N most likely tokens only: 64 for CI.")
    ] = 0,
    with_head: Annotated[
        bool, typer.Option("--with-head", help="Put the output matrix into the pack, so that it needs no other file.")
    ] = False,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run was saved.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the pack will take and stop.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Keep what a full-precision model says about texts, to compare with later."""
    from pocketquant.cli.reference import make_pack

    if top_k and with_head:
        raise typer.BadParameter("a pack of top tokens needs no output matrix", param_hint="--with-head")
    make_pack(
        model,
        text,
        out,
        context=context,
        chunks=chunks,
        positions=positions,
        top_k=top_k,
        with_head=with_head,
        threads=threads,
        gpu_layers=gpu_layers,
        resume=resume,
        dry_run=dry_run,
        json=json,
        quiet=quiet,
    )


@app.command()
def weights(
    source: Source,
    reference: Annotated[
        str, typer.Option("--reference", metavar="SRC", help="Full precision: the checkpoint or a GGUF of it.")
    ],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure each tensor's error against full precision, without inference."""
    from pocketquant.cli import viewing

    viewing.weights(source, reference, json=json, quiet=quiet)


@app.command()
def check(
    file: Annotated[str, typer.Argument(metavar="FILE|SRC", help="GGUF file, or a checkpoint before it is converted.")],
    source: Annotated[
        str | None,
        typer.Option("--source", metavar="SRC", help="The checkpoint it was made from: compare every tensor with it."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look for what is wrong with a GGUF or a checkpoint, without running it; exit code 1 if something is."""
    from pocketquant.cli.findings import check_file_or_source, print_report

    with step_progress(Path(file).name, quiet=quiet) as advance:
        report = check_file_or_source(file, source, advance)
    if json:
        print_json({"file": file, **report.to_json()})
    else:
        print_report(file, report)
    if report.has_errors:
        raise typer.Exit(1)


@app.command()
def imatrix(
    files: Annotated[list[Path], typer.Argument(metavar="GGUF", help="Model to run; with --merge, matrices to add.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The importance matrix to write.")],
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE|self", help="UTF-8 text; self: the model writes it.")
    ] = None,
    mtp: Annotated[
        Path | None,
        typer.Option("--mtp", metavar="FILE", help="The mtp- file beside the model; one inside is found."),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add matrices of one model up instead of running it.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run was saved.")] = False,
    context: Context = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, metavar="N", help="Windows to run; default: all, self: 16.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the text that the model writes.")] = 0,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make an importance matrix: which inputs of each weight matter, from running the model over a text."""
    from pocketquant.cli.importance import make_matrix, merge_matrices

    if merge:
        if text is not None or resume or mtp is not None:
            raise typer.BadParameter("runs no model, so it takes no --text, --mtp or --resume", param_hint="--merge")
        merge_matrices(files, out, json=json, quiet=quiet)
        return
    if len(files) != 1:
        raise typer.BadParameter("one model; to add matrices up, say --merge", param_hint="GGUF")
    if text is None:
        raise typer.BadParameter("name a text, or self to let the model write one", param_hint="--text")
    make_matrix(
        files[0],
        text,
        out,
        mtp=mtp,
        context=context,
        chunks=chunks,
        seed=seed,
        threads=threads,
        gpu_layers=gpu_layers,
        resume=resume,
        json=json,
        quiet=quiet,
    )


app.command()(make)
app.command()(demo)

"""The commands. Each opens, plans, says what it will cost, runs, and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pocketquant.cli.screen import byte_progress, print_json, print_table, say, size, step_progress

app = typer.Typer(
    help="Qwen3.5 checkpoints in, small GGUF files out, with the numbers of what quantization cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint folder (config.json, *.safetensors) or GGUF.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="The GGUF to write.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, metavar="N", help="Worker threads; default: every processor.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan with the exact file size and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no talk on stderr.")]
GpuLayers = Annotated[
    int, typer.Option("--gpu-layers", metavar="N", help="Layers to run on a GPU; -1 for all (needs a GPU build).")
]
Context = Annotated[int, typer.Option("--context", min=8, metavar="N", help="Tokens in a window.")]
Chunks = Annotated[int | None, typer.Option("--chunks", min=1, metavar="N", help="Windows to score; default: all.")]


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
def convert(
    source: Source,
    out: Out = None,
    type: Annotated[str, typer.Option("--type", metavar="bf16|f16|f32", help="Number format of the weights.")] = "bf16",
    threads: Threads = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint to a full-precision GGUF."""
    if type.lower() not in ("bf16", "f16", "f32"):
        raise typer.BadParameter("bf16, f16 or f32; for smaller types use `pocketquant quantize`", param_hint="--type")
    _run_plan(source, out, type.lower(), None, threads, dry_run, json, quiet)


@app.command()
def quantize(
    source: Source,
    out: Out = None,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="NAME|FILE.toml", help="Built-in recipe or a TOML file.")
    ] = "pocket_4bit",
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", metavar="FILE", help="Importance matrix, llama.cpp's GGUF format.")
    ] = None,
    threads: Threads = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a checkpoint in one pass, or a full-precision GGUF."""
    _run_plan(source, out, recipe, imatrix, threads, dry_run, json, quiet)


def _run_plan(
    source: str,
    out: Path | None,
    recipe: str,
    imatrix: Path | None,
    threads: int | None,
    dry_run: bool,
    json: bool,
    quiet: bool,
) -> None:
    from pocketquant.convert import open_model
    from pocketquant.pipeline import write
    from pocketquant.quant import open_recipe, plan, read_importance

    if out is None and not dry_run:
        raise typer.BadParameter("name the file to write, or use --dry-run", param_hint="--out")
    model = open_model(source)
    for note in model.notes:
        say(f"note: {note}", quiet=quiet)
    planned = plan(model, open_recipe(recipe), read_importance(imatrix) if imatrix else None)
    entries = [
        _entry(item.tensor, item.format.name, item.nbytes) | ({"reason": item.reason} if dry_run else {})
        for item in planned.tensors
    ]
    summary = {
        "file_bytes": planned.file_bytes,
        "bits_per_weight": round(planned.bits_per_weight, 4),
        "recipe": planned.metadata["pocketquant.recipe"].value,
        "notes": list(model.notes),
        "tensors": entries,
    }
    if dry_run:
        if json:
            print_json(summary)
        else:
            print_table(
                ["tensor", "role", "shape", "type", "bytes", "reason"],
                [[*_cells(entry), str(entry["reason"])] for entry in entries],
            )
            print(f"\n{planned.file_bytes:,} bytes in all, {planned.bits_per_weight:.2f} bits per weight")
        return
    assert out is not None
    say(f"{out}: {size(planned.file_bytes)} ({planned.bits_per_weight:.2f} bits per weight) from {source}", quiet=quiet)
    with byte_progress(out.name, sum(item.nbytes for item in planned.tensors), quiet=quiet) as advance:
        write(planned, out, threads=threads, on_bytes=advance)
    if json:
        print_json({"out": str(out), **summary})


def _entry(tensor: Any, type_name: str, nbytes: int) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "role": tensor.role.value,
        "shape": list(tensor.shape),
        "type": type_name,
        "nbytes": nbytes,
    }


def _cells(entry: dict[str, Any]) -> list[str]:
    shape = " x ".join(str(n) for n in entry["shape"])
    return [entry["name"], entry["role"], shape, entry["type"], f"{entry['nbytes']:,}"]


@app.command()
def inspect(source: Source, json: Json = False) -> None:
    """List metadata and tensors of a GGUF or a checkpoint, without reading weights."""
    from pocketquant.convert import open_model
    from pocketquant.formats import FORMATS

    model = open_model(source)
    entries = [
        _entry(tensor, tensor.dtype, tensor.n_rows * FORMATS[tensor.dtype].row_bytes(tensor.n_cols))
        for tensor in model.tensors
    ]
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    file_bytes = sum(file.stat().st_size for file in files)
    if json:
        print_json(
            {
                "architecture": model.architecture,
                "file_bytes": file_bytes,
                "notes": list(model.notes),
                "metadata": {key: _short(value.value) for key, value in model.metadata.items()},
                "tensors": entries,
            }
        )
        return
    print_table(
        ["key", "type", "value"],
        [[key, value.kind, str(_short(value.value))[:100]] for key, value in model.metadata.items()],
    )
    print()
    print_table(["tensor", "role", "shape", "type", "bytes"], [_cells(entry) for entry in entries])
    print(f"\n{file_bytes:,} bytes in {len(files)} file(s), {len(entries)} tensors of {model.architecture}")
    for note in model.notes:
        print(f"note: {note}")


def _short(value: Any) -> Any:
    """A metadata value with long lists cut: nobody reads 248,320 tokens."""
    if isinstance(value, list) and len(value) > 16:
        return {"count": len(value), "first": value[:4]}
    return value


@app.command()
def eval(
    gguf: Annotated[Path, typer.Argument(metavar="GGUF", help="The file to judge.")],
    reference: Annotated[
        Path, typer.Option("--reference", metavar="GGUF", help="Full precision, of the same checkpoint.")
    ],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8 text, best none used for calibration.")],
    context: Context = 512,
    chunks: Chunks = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap behind the standard errors.")] = 0,
    weights: Annotated[
        bool, typer.Option("--weights", help="Per-tensor weight error only, without inference.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity, KL divergence and agreement of a GGUF against full precision."""
    from pocketquant.eval import compare

    with step_progress(gguf.name, quiet=quiet) as advance:
        report = compare(
            gguf,
            reference,
            text,
            context=context,
            chunks=chunks,
            threads=threads,
            gpu_layers=gpu_layers,
            seed=seed,
            progress=advance,
        )
    if json:
        print_json(report.to_json())
    else:
        print(report.to_markdown(), end="")


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
    from dataclasses import asdict

    from pocketquant.convert import open_model
    from pocketquant.eval import weight_errors

    errors = weight_errors(open_model(source), open_model(reference))
    if json:
        print_json({"tensors": [asdict(error) | {"role": error.role.value} for error in errors]})
        return
    columns = ["tensor", "role", "type", "SNR (dB)", "cosine", "relative RMSE", "largest error"]
    print_table(
        columns,
        [
            [
                error.name,
                error.role.value,
                error.format,
                "exact" if error.snr_db is None else f"{error.snr_db:.2f}",
                f"{error.cosine:.6f}",
                "" if error.relative_rmse is None else f"{error.relative_rmse:.5f}",
                f"{error.max_abs_error:.3g}",
            ]
            for error in errors
        ],
    )


@app.command()
def make(
    source: Source,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the files and the report.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", "-r", metavar="NAME|FILE.toml", help="One output each; default: pocket_4bit, q8_0."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="What to measure on; default: embedded text.")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", metavar="FILE", help="Importance matrix, llama.cpp's GGUF format.")
    ] = None,
    reference_type: Annotated[
        str, typer.Option("--reference-type", metavar="f32|bf16", help="Type of the reference; bf16 halves memory.")
    ] = "f32",
    context: Context = 512,
    chunks: Chunks = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Do it all: quantized files, evaluation against full precision, report, checksums."""
    from pocketquant.make import DEFAULT_RECIPES, Bars, make_release, plan_release, to_markdown

    if reference_type not in ("f32", "bf16"):
        raise typer.BadParameter("f32 or bf16", param_hint="--reference-type")
    release = plan_release(
        source,
        recipes=recipe or DEFAULT_RECIPES,
        text=text,
        context=context,
        chunks=chunks,
        imatrix=imatrix,
        reference_type=reference_type,
    )
    for note in release.model.notes:
        say(f"note: {note}", quiet=quiet)
    for variant in release.variants:
        line = f"{variant.name}: {size(variant.plan.file_bytes)}, {variant.plan.bits_per_weight:.2f} bits per weight"
        say(line, quiet=quiet)
    say(
        f"needs {size(release.disk_bytes)} of disk while it runs ({size(release.kept_bytes)} stay) and about "
        f"{size(release.memory_bytes)} of memory for the evaluation",
        quiet=quiet,
    )
    if dry_run:
        if json:
            files = [{"file": item.name, "file_bytes": item.plan.file_bytes} for item in release.variants]
            print_json({"files": files, "disk_bytes": release.disk_bytes, "memory_bytes": release.memory_bytes})
        return
    bars = Bars(
        bytes=lambda label, total: byte_progress(label, total, quiet=quiet),
        steps=lambda label: step_progress(label, quiet=quiet),
    )
    result = make_release(release, out, threads=threads, gpu_layers=gpu_layers, bars=bars)
    if json:
        print_json(result)
    else:
        print(to_markdown(result), end="")
    say(f"written to {out}", quiet=quiet)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the files.")] = Path("demo-out"),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run `make` on the small checkpoint that comes with the package."""
    from pocketquant.demo import checkpoint_dir

    make(str(checkpoint_dir()), out, json=json, quiet=quiet)

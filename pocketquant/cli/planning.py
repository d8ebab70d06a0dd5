"""`convert` and `quantize`: open, plan, say what it will cost, write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pocketquant.cli.screen import byte_progress, print_json, print_lines, print_table, say, size, step_progress
from pocketquant.cli.sizing import Deciding, print_explanation, read_choice, say_allocation

if TYPE_CHECKING:
    from pocketquant.convert.sources import Parts
    from pocketquant.gguf_file.writing import Run


@dataclass(frozen=True)
class Request:
    """What the options of `convert` and `quantize` ask for."""

    source: str
    out: Path | None
    deciding: Deciding
    chat_template: Path | None = None
    adapter: Path | None = None
    mtp: str = "sidecar"
    mmproj: str | None = None
    keep_source: Path | None = None
    split_max_size: str | None = None
    threads: int | None = None
    scheduler: str | None = None
    dry_run: bool = False
    json: bool = False
    quiet: bool = False


def run(request: Request) -> None:
    """Does what was asked for."""
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.gguf_file.shards import parse_size
    from pocketquant.gguf_file.writing import write_together
    from pocketquant.quant import explain, with_figures
    from pocketquant.quant.planning import importance_gaps
    from pocketquant.release.outputs import all_files, plan_outputs

    quiet = request.quiet
    made_from = [request.source, *request.deciding.files, request.chat_template, request.adapter]
    if request.out:
        refuse_overwriting([request.out], made_from)
    if request.scheduler and request.threads:
        raise typer.BadParameter("a worker's threads are set where it is started", param_hint="--threads")
    if request.out is None and not request.dry_run:
        raise typer.BadParameter("name the file to write, or use --dry-run", param_hint="--out")
    if quiet:  # the hub's client draws bars of its own
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    choice = read_choice(request.deciding)
    parts = open_source(
        request.source, request.chat_template, request.keep_source, request.adapter, request.mtp, request.mmproj
    )
    for note in parts.model.notes:
        say(f"note: {note}", quiet=quiet)
    out = request.out or Path("model.gguf")
    if choice.is_allocated or request.deciding.explain:
        with step_progress("predicting", quiet=quiet) as advance:
            choice = with_figures(parts.model, choice, advance)
    split_bytes = parse_size(request.split_max_size) if request.split_max_size else None
    outputs = plan_outputs(parts, out, choice, request.mmproj, split_bytes)
    planned = outputs[0].plan
    say_allocation(planned, quiet=quiet)
    gaps = importance_gaps(planned) if choice.importance else ()
    for gap in gaps:
        say(f"note: {gap}", quiet=quiet)
    entries = [
        describe_tensor(item.tensor, item.format.name, item.nbytes)
        | ({"reason": item.reason} if request.dry_run else {})
        for item in planned.tensors
    ]
    summary: dict[str, Any] = {
        "file_bytes": planned.file_bytes,
        "bits_per_weight": round(planned.bits_per_weight, 4),
        "recipe": planned.metadata["pocketquant.recipe"].value,
        "notes": [*parts.model.notes, *gaps],
        "files": [
            {"kind": output.kind, "file": path.name, "file_bytes": part.file_bytes}
            for output in outputs
            for part, path in output.files
        ],
        "tensors": entries,
    }
    explanation = None
    if request.deciding.explain and choice.figures is not None:
        explanation = explain(planned, parts.model, choice.figures, choice.device)
        summary["explain"] = explanation.to_json()
    files = all_files(outputs)
    if request.out:
        refuse_overwriting([path for _, path in files], made_from)
    if not request.dry_run:
        for part, path in files:
            say(f"will write {path}: {size(part.file_bytes)} from {request.source}", quiet=quiet)
        total = sum(item.nbytes for part, _ in files for item in part.tensors)
        with (
            encoding_on(request.scheduler) as encode,
            byte_progress(out.name, total, quiet=quiet) as advance,
        ):
            write_together(files, threads=request.threads, on_bytes=advance, run=encode)
        for part, path in files:
            say(f"written: {path}: {size(part.file_bytes)}", quiet=quiet)
        summary = {"out": str(request.out), **summary}
    if request.json:
        print_json(summary)
        return
    if request.dry_run:
        rows = [[*tensor_cells(entry), str(entry["reason"])] for entry in entries]
        print_table(["tensor", "role", "shape", "type", "bytes", "reason"], rows)
        print(f"\n{planned.file_bytes:,} bytes in all, {planned.bits_per_weight:.2f} bits per weight")
        for part, path in files if len(files) > 1 else []:
            print_lines(f"{path.name}: {part.file_bytes:,} bytes, {len(part.tensors)} tensors")
    if explanation:
        print_explanation(explanation)


@contextmanager
def encoding_on(scheduler: str | None) -> Iterator[Run | None]:
    """Who encodes: the cluster of that address, or None for this machine."""
    if scheduler is None:
        yield None
        return
    from pocketquant.cluster import open_cluster

    with open_cluster(scheduler) as encode:
        yield encode


def open_source(
    source: str,
    chat_template: Path | None,
    keep_source: Path | None,
    adapter: Path | None,
    mtp: str,
    mmproj: str | None,
) -> Parts:
    """Opens a source as the options say."""
    from pocketquant.convert.sources import open_parts

    if mtp not in ("sidecar", "embed", "drop"):
        raise typer.BadParameter("sidecar, embed or drop", param_hint="--mtp")
    return open_parts(
        source,
        chat_template=chat_template,
        keep_source=keep_source,
        adapter=adapter,
        mtp=mtp,  # type: ignore[arg-type]
        with_vision=mmproj != "none",
    )


@contextmanager
def as_gguf(
    source: str, out: Path, reference_type: str = "f32", *, threads: int | None = None, quiet: bool = False
) -> Iterator[Path]:
    """A source as a GGUF in full precision: itself, or converted, beside `out`, for as long as the block runs."""
    from pocketquant.convert.sources import names_gguf, open_model
    from pocketquant.files.leftovers import work_folder
    from pocketquant.files.replacing import check_target
    from pocketquant.gguf_file.writing import write
    from pocketquant.quant import open_recipe, plan

    if names_gguf(source):
        yield Path(source)
        return
    planned = plan(open_model(source), open_recipe(reference_type))
    with work_folder(check_target(out)) as folder:
        converted = folder / "source.gguf"
        with byte_progress("converting", planned.file_bytes, quiet=quiet) as advance:
            write(planned, converted, threads=threads, on_bytes=advance, is_result=False)
        yield converted


def describe_tensor(tensor: Any, type_name: str, nbytes: int) -> dict[str, Any]:
    """A tensor as `--json` shows it."""
    return {
        "name": tensor.name,
        "role": tensor.role.value,
        "shape": list(tensor.shape),
        "type": type_name,
        "nbytes": nbytes,
    }


def tensor_cells(entry: dict[str, Any]) -> list[str]:
    """The same as cells of a table."""
    shape = " x ".join(str(n) for n in entry["shape"])
    return [entry["name"], entry["role"], shape, entry["type"], f"{entry['nbytes']:,}"]

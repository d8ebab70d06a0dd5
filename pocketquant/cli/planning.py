"""What `convert` and `quantize` have in common: open a source, plan, say what it will cost, write."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pocketquant.cli.choice import Deciding, print_explanation, read_choice, say_allocation
from pocketquant.cli.options import (
    AdapterDir,
    ChatTemplate,
    DryRun,
    KeepSource,
    Mmproj,
    Mtp,
    Scheduler,
    SplitMaxSize,
    Talk,
    Threads,
)
from pocketquant.cli.screen import byte_progress, print_json, print_lines, print_table, size, step_progress

if TYPE_CHECKING:
    from pocketquant.convert.sources import Parts
    from pocketquant.quant.explain import Explanation
    from pocketquant.release.means import Means
    from pocketquant.release.outputs import Output


@dataclass(frozen=True)
class Opened:
    """How a source is opened."""

    adapter: AdapterDir = None
    chat_template: ChatTemplate = None
    mtp: Mtp = "sidecar"
    mmproj: Mmproj = None
    keep_source: KeepSource = None

    @property
    def files(self) -> list[Path | None]:
        """What must not be written over."""
        return [self.adapter, self.chat_template]

    def open(self, source: str, talk: Talk) -> Parts:
        """Opens a source as the options say."""
        from pocketquant.release.outputs import Opening

        if self.mtp not in ("sidecar", "embed", "drop"):
            raise typer.BadParameter("must be sidecar, embed or drop", param_hint="--mtp")
        if talk.quiet:  # the hub's client draws bars of its own
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        how: Any = (self.chat_template, self.keep_source, self.adapter, self.mtp, self.mmproj != "none")
        return Opening(*how).open(source)


@dataclass(frozen=True)
class Written:
    """How files are written."""

    dry_run: DryRun = False
    split_max_size: SplitMaxSize = None
    threads: Threads = None
    scheduler: Scheduler = None

    def check(self, out: Path | None) -> None:
        """Refuses what does not go together."""
        if self.scheduler and self.threads:
            raise typer.BadParameter("a worker's threads are set where it is started", param_hint="--threads")
        if out is None and not self.dry_run:
            raise typer.BadParameter("name the file to write, or use --dry-run", param_hint="--out")

    @property
    def split_bytes(self) -> int | None:
        """The largest file; None for no limit."""
        from pocketquant.gguf_file.shards import parse_size

        return parse_size(self.split_max_size) if self.split_max_size else None


def encode(source: str, out: Path | None, deciding: Deciding, opened: Opened, written: Written, talk: Talk) -> None:
    """Plans the files that a source becomes, says what they will cost, and writes them."""
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.quant import explain, with_figures
    from pocketquant.quant.planning import importance_gaps
    from pocketquant.release.outputs import all_files, plan_outputs

    made_from = [source, *deciding.files, *opened.files]
    if out:
        refuse_overwriting([out], made_from)
    written.check(out)
    choice = read_choice(deciding)
    parts = opened.open(source, talk)
    for note in parts.model.notes:
        talk.say(f"note: {note}")
    if choice.is_allocated or deciding.explain:
        with talk.steps("predicting", "tensors") as advance:
            choice = with_figures(parts.model, choice, advance)
    outputs = plan_outputs(parts, out or Path("model.gguf"), choice, opened.mmproj, written.split_bytes)
    planned = outputs[0].plan
    say_allocation(planned, talk)
    gaps = importance_gaps(planned) if choice.importance else ()
    for gap in gaps:
        talk.say(f"note: {gap}")
    explanation = None
    if deciding.explain and choice.figures is not None:
        explanation = explain(planned, parts.model, choice.figures, choice.device)
    if out:
        refuse_overwriting([path for _, path in all_files(outputs)], made_from)
    if not written.dry_run:
        _write(source, outputs, written, talk)
    notes = [*parts.model.notes, *gaps]
    if talk.json:
        summary = _summarize(outputs, notes, explanation, with_reasons=written.dry_run)
        print_json(summary if written.dry_run else {"out": str(out), **summary})
        return
    if written.dry_run:
        _print_plan(outputs)
    if explanation:
        print_explanation(explanation)


def _write(source: str, outputs: Sequence[Output], written: Written, talk: Talk) -> None:
    from pocketquant.release.outputs import all_files, write_outputs

    files = all_files(outputs)
    for part, path in files:
        talk.say(f"will write {path}: {size(part.file_bytes)} from {source}")
    with working_with(written.threads, scheduler=written.scheduler, quiet=talk.quiet) as means:
        write_outputs(outputs, means)
    for part, path in files:
        talk.say(f"written: {path}: {size(part.file_bytes)}")


def _summarize(
    outputs: Sequence[Output], notes: list[str], explanation: Explanation | None, *, with_reasons: bool
) -> dict[str, Any]:
    """The files as `--json` shows them."""
    planned = outputs[0].plan
    return {
        "file_bytes": planned.file_bytes,
        "bits_per_weight": round(planned.bits_per_weight, 4),
        "recipe": planned.metadata["pocketquant.recipe"].value,
        "notes": notes,
        "files": [
            {"kind": output.kind, "file": path.name, "file_bytes": part.file_bytes}
            for output in outputs
            for part, path in output.files
        ],
        "tensors": [
            describe_tensor(item.tensor, item.format.name, item.nbytes)
            | ({"reason": item.reason} if with_reasons else {})
            for item in planned.tensors
        ],
    } | ({"explain": explanation.to_json()} if explanation else {})


def _print_plan(outputs: Sequence[Output]) -> None:
    """Every tensor of the model's file with the reason for its type, and all files with their sizes."""
    from pocketquant.release.outputs import all_files

    planned, files = outputs[0].plan, all_files(outputs)
    rows = [
        [*tensor_cells(describe_tensor(item.tensor, item.format.name, item.nbytes)), item.reason]
        for item in planned.tensors
    ]
    print_table(["tensor", "role", "shape", "type", "bytes", "reason"], rows)
    print(f"\n{planned.file_bytes:,} bytes in all, {planned.bits_per_weight:.2f} bits per weight")
    for part, path in files if len(files) > 1 else []:
        print_lines(f"{path.name}: {part.file_bytes:,} bytes, {len(part.tensors)} tensors")


@contextmanager
def working_with(
    threads: int | None = None,
    gpu_layers: int = 0,
    scheduler: str | None = None,
    *,
    quiet: bool = False,
    labels: Sequence[str] = (),
) -> Iterator[Means]:
    """What the work is done with, connected to the cluster of that address, if one is named.

    `labels` are those of all bars in the order of the work, where each is to say which of how many it is.
    """
    from pocketquant.release.means import Bars, Means

    steps = {label: (number, len(labels)) for number, label in enumerate(labels, 1)}
    bars = Bars(
        bytes=lambda label, total: byte_progress(label, total, quiet=quiet, step=steps.get(label)),
        steps=lambda label: step_progress(label, quiet=quiet, unit="windows", step=steps.get(label)),
    )
    if scheduler is None:
        yield Means(threads, gpu_layers, bars)
        return
    from pocketquant.cluster import open_cluster

    with open_cluster(scheduler) as encode:
        yield Means(threads, gpu_layers, bars, encode)


@contextmanager
def as_gguf(
    source: str, out: Path, reference_type: str = "f32", *, threads: int | None = None, quiet: bool = False
) -> Iterator[Path]:
    """A source as a GGUF in full precision, with a bar: itself, or converted, for as long as the block runs."""
    from pocketquant.release import outputs

    with working_with(threads, quiet=quiet) as means, outputs.as_gguf(source, out, reference_type, means) as gguf:
        yield gguf


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

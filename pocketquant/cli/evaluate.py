"""`eval`: how far a GGUF is from full precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pocketquant.cli.screen import print_json, step_progress

if TYPE_CHECKING:
    from pocketquant.eval.report.evidence import TensorState


def evaluate(
    gguf: Path,
    reference: Path,
    texts: Sequence[str],
    *,
    context: int,
    chunks: int | None,
    positions: bool,
    noise_floor: bool,
    like: str | None,
    threads: int | None,
    gpu_layers: int,
    seed: int,
    json: bool,
    quiet: bool,
    head: Path | None = None,
    weights: bool = False,
) -> None:
    """Measures and prints the report."""
    from pocketquant.eval import compare
    from pocketquant.eval.compare import SCORERS
    from pocketquant.eval.reference import open_reference
    from pocketquant.eval.report.markdown import to_markdown
    from pocketquant.texts.embedded import read_texts

    if like not in SCORERS:
        raise typer.BadParameter(" or ".join(name for name in SCORERS if name), param_hint="--like")
    with step_progress(gguf.name, quiet=quiet) as advance:
        report = compare(
            gguf,
            reference,
            read_texts(texts),
            context=context,
            chunks=chunks,
            threads=threads,
            gpu_layers=gpu_layers,
            seed=seed,
            positions=positions,
            noise_floor=noise_floor,
            like=like,
            progress=advance,
            reference_opener=partial(open_reference, head=head),
        )
    if weights:
        report = replace(report, tensors=_tensors(gguf, reference, quiet=quiet))
    if json:
        print_json(report.to_json())
    else:
        print(to_markdown(report), end="")


def _tensors(gguf: Path, reference: Path, *, quiet: bool) -> tuple[TensorState, ...]:
    """What each tensor is; how far from the reference's, too, unless that is a pack, which holds no weights."""
    from pocketquant.convert import open_model
    from pocketquant.eval.packs.pack import is_pack
    from pocketquant.eval.report.evidence import describe_tensors

    original = None if reference.is_file() and is_pack(reference) else open_model(str(reference))
    with step_progress("weights", quiet=quiet) as advance:
        return describe_tensors(open_model(str(gguf)), original, progress=advance)

"""`convert`: a source in, a GGUF in full precision out; with --base, an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketquant.cli.adapter import adapter
from pocketquant.cli.choice import Deciding
from pocketquant.cli.options import Out, Source, Talk, option
from pocketquant.cli.planning import Opened, Written, encode


def convert(
    source: Source,
    *,
    out: Out = None,
    type: Annotated[
        str | None, option("--type", "bf16|f16|f32", "Number format of the weights; default: bf16, for an adapter f32.")
    ] = None,
    base: Annotated[
        str | None,
        option("--base", "SRC", "Convert the LoRA adapter in the folder SRC, to be loaded beside this model."),
    ] = None,
    opened: Opened,
    written: Written,
    talk: Talk,
) -> None:
    """Convert a checkpoint to a full-precision GGUF."""
    if type is not None and type.lower() not in ("bf16", "f16", "f32"):
        raise typer.BadParameter(
            "must be bf16, f16 or f32; for smaller types use `pocketquant quantize`", param_hint="--type"
        )
    if base is None:
        encode(source, out, Deciding(recipe=(type or "bf16").lower()), opened, written, talk)
        return
    if opened != Opened() or written.scheduler or written.threads:
        raise typer.BadParameter(
            "converts the adapter alone, so it takes no --adapter, --chat-template, --mtp, --mmproj, "
            "--keep-source, --threads or --scheduler",
            param_hint="--base",
        )
    adapter(
        Path(source),
        base,
        out=out,
        type=type or "f32",
        split_max_size=written.split_max_size,
        dry_run=written.dry_run,
        talk=talk,
    )

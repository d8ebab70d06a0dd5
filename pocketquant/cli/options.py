"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="Checkpoint folder, one .safetensors file, GGUF, or a repository: org/name[@revision], hf://…, ms://….",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="The GGUF to write.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, metavar="N", help="Worker threads; default: every processor.")
]
Scheduler = Annotated[
    str | None, typer.Option("--scheduler", metavar="dask://HOST:PORT", help="Encode on the workers of a Dask cluster.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan with the exact file size and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no talk on stderr.")]
GpuLayers = Annotated[
    int, typer.Option("--gpu-layers", metavar="N", help="Layers to run on a GPU; -1 for all (needs a GPU build).")
]
ChatTemplate = Annotated[
    Path | None,
    typer.Option("--chat-template", metavar="FILE", help="A jinja2 template in place of the source's own."),
]
AdapterDir = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="DIR", help="LoRA adapter (PEFT's, mlx-lm's) to merge into the checkpoint."),
]
Mtp = Annotated[
    str,
    typer.Option(
        "--mtp",
        metavar="sidecar|embed|drop",
        help="A multi-token-prediction block: beside, inside, or not at all.",
    ),
]
Mmproj = Annotated[
    str | None,
    typer.Option(
        "--mmproj", metavar="RECIPE|none", help="Recipe of the vision tower; default: pocket_mmproj, or the plain type."
    ),
]
KeepSource = Annotated[
    Path | None, typer.Option("--keep-source", metavar="DIR", help="Download a hub's repository there, whole.")
]
Stats = Annotated[
    Path | None, typer.Option("--stats", metavar="FILE", help="Statistics to round by, from `calibrate`.")
]
RoundingSteps = Annotated[
    str | None,
    typer.Option(
        "--rounding",
        metavar="none|search|feedback|descent|two-sided",
        help="How far to go with them; each does what those before it do; default: two-sided.",
    ),
]
Context = Annotated[int, typer.Option("--context", min=8, metavar="N", help="Tokens in a window.")]
SplitMaxSize = Annotated[
    str | None,
    typer.Option("--split-max-size", metavar="SIZE", help="Write shards no larger than this: 512M, 2GB, 1.5GiB."),
]
Chunks = Annotated[int | None, typer.Option("--chunks", min=1, metavar="N", help="Windows to score; default: all.")]

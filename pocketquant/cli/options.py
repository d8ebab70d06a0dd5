"""Every option of the commands, declared once; what several commands take together is a group.

A command is a function whose parameters are options (types annotated for Typer) and groups of options (frozen
dataclasses of such types). `spread` shows Typer the options of the groups, and gives the function the groups.

The panel of an option decides where the help shows it: first the options without one, then "Advanced". An option of
the panel "With --tasks" is refused where `--tasks` is not given. A second long name is an old one: it is accepted and
not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from pocketquant.cli import screen

ADVANCED = "Advanced"


def mode_panel(mode: str) -> str:
    """The panel of options that are taken with an option only: `mode_panel("--tasks")`."""
    return f"With {mode}"


def option(names: str, metavar: str, help: str, panel: str | None = None, **limits: Any) -> Any:
    """An option for Typer: its names ("--out -o"), what stands for its value ("" for a flag), what it does."""
    return typer.Option(*names.split(), metavar=metavar or None, help=help, rich_help_panel=panel, **limits)


# ---------------------------------------------------------------- what is read and written

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="Checkpoint folder, one .safetensors file, GGUF, or a repository: org/name[@revision], hf://…, ms://….",
    ),
]
Gguf = Annotated[Path, typer.Argument(metavar="GGUF", help="GGUF file to measure.")]
Out = Annotated[Path | None, option("--out -o", "FILE", "The GGUF to write.")]
OutFile = Annotated[Path, option("--out -o", "FILE", "The file to write.")]
OutFolder = Annotated[Path, option("--out -o", "DIR", "Folder for the files and the report.")]
ReportOut = Annotated[Path | None, option("--out -o", "FILE", "Write the whole report to this file as JSON.")]
SplitMaxSize = Annotated[
    str | None, option("--split-max-size", "SIZE", "Write shards no larger than this: 512M, 2GB, 1.5GiB.", ADVANCED)
]
ReferenceSource = Annotated[
    str, option("--reference", "SRC", "The model in full precision: the checkpoint, or a GGUF of it.")
]
ReferenceGguf = Annotated[str, option("--reference", "GGUF", "A full-precision GGUF of the same checkpoint.")]
ReferenceType = Annotated[
    str,
    option("--reference-type", "f32|bf16", "Type of the reference; bf16 halves the memory that it takes.", ADVANCED),
]

# ---------------------------------------------------------------- how a source is opened

ChatTemplate = Annotated[
    Path | None, option("--chat-template", "FILE", "A jinja2 template in place of the source's own.", ADVANCED)
]
AdapterDir = Annotated[
    Path | None, option("--adapter", "DIR", "LoRA adapter (of PEFT or mlx-lm) to merge into the checkpoint.", ADVANCED)
]
Mtp = Annotated[
    str,
    option(
        "--mtp",
        "sidecar|embed|drop",
        "Multi-token prediction: a file beside the model, inside it, or left out.",
        ADVANCED,
    ),
]
Mmproj = Annotated[
    str | None,
    option(
        "--mmproj",
        "RECIPE|none",
        "Recipe of the vision tower, or no tower; default: pocket_mmproj beside a pocket recipe, else f16 or --type.",
        ADVANCED,
    ),
]
KeepSource = Annotated[
    Path | None,
    option("--keep-source", "DIR", "Download the whole repository to this folder, and read it there.", ADVANCED),
]

# ---------------------------------------------------------------- which types, and how weights are rounded

Stats = Annotated[Path | None, option("--stats", "FILE", "Statistics to round by, from `calibrate`.")]
RoundingSteps = Annotated[
    str | None,
    option(
        "--rounding",
        "none|search|feedback|descent|two-sided",
        "How to round with --stats: each takes one step more than the one before it; default: two-sided.",
        ADVANCED,
    ),
]

# ---------------------------------------------------------------- texts

TextFiles = Annotated[
    list[str] | None,
    option(
        "--text", "FILE|self", "UTF-8 text; self: the model writes it; may be repeated; default: the embedded text."
    ),
]
EvalTexts = Annotated[
    list[str] | None,
    option(
        "--text",
        "FILE|NAME=FILE|domains",
        "UTF-8 text or .jsonl conversations, not used for calibration; domains: six embedded texts; may be repeated.",
    ),
]
Context = Annotated[int, option("--context", "N", "Tokens in a window.", min=8)]
Chunks = Annotated[
    int | None, option("--chunks", "N", "Use at most this many windows of each text; default: all.", min=1)
]
Positions = Annotated[bool, option("--positions", "", "Also show the loss by position in the window.")]
Seed = Annotated[int, option("--seed", "", "Seed of the random numbers.", ADVANCED, min=0)]

# ---------------------------------------------------------------- the run

Threads = Annotated[
    int | None, option("--threads", "N", "Worker threads; default: every processor.", ADVANCED, min=1, max=512)
]
"""At most GGML_MAX_N_THREADS (ggml/include/ggml.h): ggml keeps no room for more, and would end the process."""
GpuLayers = Annotated[
    int, option("--gpu-layers", "N", "Layers to run on a GPU; -1 for all (needs a GPU build).", ADVANCED)
]
TorchDevice = Annotated[str, option("--torch-device --device", "cpu|cuda", "Device on which torch computes.", ADVANCED)]
Scheduler = Annotated[
    str | None, option("--scheduler", "dask://HOST:PORT", "Encode on the workers of a Dask cluster.", ADVANCED)
]
Resume = Annotated[bool, option("--resume", "", "Continue a run that was interrupted.")]
DryRun = Annotated[bool, option("--dry-run", "", "Print the plan with the exact file size and stop.")]
CostOnly = Annotated[bool, option("--dry-run", "", "Print an estimate of the work (time, memory or disk) and stop.")]
Json = Annotated[bool, option("--json", "", "Print one JSON document on stdout.")]
Quiet = Annotated[bool, option("--quiet -q", "", "Print nothing but errors on stderr.")]


@dataclass(frozen=True)
class Talk:
    """What a command says and shows, as `--json` and `--quiet` ask for it."""

    json: Json = False
    quiet: Quiet = False

    def say(self, message: str) -> None:
        """A line for people, on stderr."""
        screen.say(message, quiet=self.quiet)

    def bytes(self, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Progress that counts bytes."""
        return screen.byte_progress(label, total, quiet=self.quiet)

    def steps(
        self, label: str, unit: str = "", step: tuple[int, int] | None = None
    ) -> AbstractContextManager[Callable[[int, int], None]]:
        """Progress that counts units; `step` is which of how many steps of the command this is."""
        return screen.step_progress(label, quiet=self.quiet, unit=unit, step=step)


@dataclass(frozen=True)
class Compute:
    """Where inference runs."""

    threads: Threads = None
    gpu_layers: GpuLayers = 0


# ---------------------------------------------------------------- groups, spread over a signature


def spread(function: Callable[..., None]) -> Callable[..., None]:
    """The function with the options of its groups in place of the groups, for Typer to read."""
    hints = get_type_hints(function, include_extras=True)
    parameters: list[Parameter] = []
    for name, parameter in signature(function).parameters.items():
        if is_dataclass(hints[name]):
            parameters += _options_of(hints[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=Parameter.KEYWORD_ONLY))

    @wraps(function)
    def run(**options: Any) -> None:
        groups = {name: _take(hints[name], options) for name in hints if is_dataclass(hints[name])}
        function(**options, **groups)

    run.__signature__ = signature(function).replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options_of(group: Any) -> Iterator[Parameter]:
    """The options of a group and of the groups in it."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        if is_dataclass(hints[field.name]):
            yield from _options_of(hints[field.name])
        else:
            default = Parameter.empty if field.default is MISSING else field.default
            yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name])


def _take(group: Any, options: dict[str, Any]) -> Any:
    """A group with its values, which leave `options`."""
    hints = get_type_hints(group, include_extras=True)
    return group(
        **{
            field.name: _take(hints[field.name], options)
            if is_dataclass(hints[field.name])
            else options.pop(field.name)
            for field in fields(group)
        }
    )

"""`fit`: whether a file fits a device, from its header or its plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketquant.cli.options import ADVANCED, Json, option
from pocketquant.cli.screen import print_json, print_lines, print_table

if TYPE_CHECKING:
    from pocketquant.fit import Beside, Device, Fit, Settings, Weights


@dataclass(frozen=True)
class Where:
    """What it is to run on."""

    device: Annotated[str | None, option("--device", "NAME", "Device, one of those that `fit --devices` lists.")] = None
    memory: Annotated[str | None, option("--memory", "SIZE", "Memory that may be used: 6GB, 4096MiB.")] = None
    devices: Annotated[bool, option("--devices", "", "List the devices, with the source of each figure.")] = False


@dataclass(frozen=True)
class Run:
    """How it is to be run."""

    context: Annotated[int, option("--context -c", "N", "Tokens of context, of all sequences together.", min=1)] = 4096
    cache_type: Annotated[str, option("--cache-type", "TYPE", "Number format of the KV cache: f16, q8_0, ...")] = "f16"
    ubatch: Annotated[int, option("--ubatch-size", "N", "Tokens computed together.", ADVANCED, min=1)] = 512
    outputs: Annotated[
        int, option("--outputs", "N", "Tokens of a batch that get logits; 512 in llama-cpp-python.", ADVANCED, min=1)
    ] = 1
    sequences: Annotated[int, option("--sequences", "N", "Number of separate sequences.", ADVANCED, min=1)] = 1
    flash_attention: Annotated[
        bool, typer.Option("--flash-attn/--no-flash-attn", help="Use flash attention.", rich_help_panel=ADVANCED)
    ] = True
    draft: Annotated[
        int, option("--draft", "N", "Tokens drafted at a time by the MTP block; 0 for none.", ADVANCED, min=0)
    ] = 0


@dataclass(frozen=True)
class Files:
    """Which files."""

    recipe: Annotated[str | None, option("--recipe -r", "NAME|FILE", "Recipe for a source that is not quantized.")] = (
        None
    )
    mmproj: Annotated[
        Path | None,
        option("--mmproj-file", "GGUF", "Vision tower that is loaded beside the model.", ADVANCED, exists=True),
    ] = None
    mtp: Annotated[Path | None, option("--mtp-file", "GGUF", "MTP block to draft with.", ADVANCED, exists=True)] = None


def fit(
    source: Annotated[str | None, typer.Argument(metavar="SRC", help="Checkpoint, repository or GGUF.")] = None,
    *,
    where: Where,
    run: Run,
    files: Files,
    json: Json = False,
) -> None:
    """Say whether a file fits a device, at which context, how fast.

    It reads the header of a GGUF, or plans the file that a checkpoint would become. No weights are read. Exit
    code 1 if it does not fit.
    """
    from pocketquant.fit import Settings, device_named
    from pocketquant.fit import fit as fit_file
    from pocketquant.gguf_file.shards import parse_size

    if where.devices:
        _list_devices(json=json)
        return
    if source is None:
        raise typer.BadParameter("name a checkpoint or a GGUF", param_hint="SRC")
    if where.device is None and where.memory is None:
        raise typer.BadParameter("name a device, or give --memory", param_hint="--device")
    device = device_named(where.device) if where.device else None
    limit = parse_size(where.memory) if where.memory else None
    settings = Settings(
        run.context,
        run.ubatch,
        run.outputs,
        run.cache_type,
        run.cache_type,
        run.flash_attention,
        run.sequences,
        run.draft,
    )
    weights, beside = _read(source, files, settings)
    found = fit_file(weights, settings, device=device, limit=limit, beside=beside)
    _show(found, weights, device, json=json)
    raise typer.Exit(0 if found.fits else 1)


def _read(source: str, files: Files, settings: Settings) -> tuple[Weights, Beside]:
    """The model's weights, and what is loaded beside it: the files given, or those that the source would become."""
    from pocketquant.convert.sources import names_gguf
    from pocketquant.fit import Beside, tower_of, weights_of
    from pocketquant.quant import Choice, open_recipe
    from pocketquant.quant.choosing import DEFAULT_RECIPE
    from pocketquant.release.outputs import Opening, plan_outputs

    tower = tower_of(files.mmproj) if files.mmproj else None
    mtp = weights_of(files.mtp) if files.mtp else None
    if names_gguf(source) and files.recipe is None:
        return weights_of(Path(source)), Beside(tower, mtp)
    parts = Opening().open(source)
    choice = Choice(open_recipe(files.recipe or DEFAULT_RECIPE))
    planned = {output.kind: output.plan for output in plan_outputs(parts, Path("model.gguf"), choice)}
    if tower is None and "mmproj" in planned:
        tower = tower_of(planned["mmproj"])
    if mtp is None and settings.draft and "mtp" in planned and parts.mtp is not None:
        mtp = weights_of(planned["mtp"], parts.mtp)
    return weights_of(planned["model"], parts.model), Beside(tower, mtp)


def _show(found: Fit, weights: Weights, device: Device | None, *, json: bool) -> None:
    if json:
        document = {
            "fits": found.fits,
            "total_bytes": found.total,
            "limit_bytes": found.limit,
            "file_bytes": weights.file_bytes,
            "device": None if device is None else device.name,
            "settings": asdict(found.settings),
            "parts": [asdict(part) for part in found.parts],
            "longest_context": found.longest_context,
            "trained_context": found.trained_context,
            "weight_budget_bytes": found.weight_budget,
            "changes": list(found.changes),
            "warnings": list(found.warnings),
            "speed_estimate": None if found.speed is None else asdict(found.speed),
        }
        print_json(document)
        return
    rows = [[part.name, f"{part.nbytes:,}", "estimate" if part.is_estimate else "", part.how] for part in found.parts]
    print_table(["part", "bytes", "", "how"], [*rows, ["total", f"{found.total:,}", "", ""]])
    verdict = "fits" if found.fits else "does not fit"
    print_lines(f"\n{verdict}: {found.total:,} of {found.limit:,} bytes at a context of {found.settings.context:,}")
    if device is not None:
        print_lines(f"{device.title}; memory: {device.memory}")
    longest = f"{found.longest_context:,} tokens" if found.longest_context else "none"
    print_lines(f"longest context that fits: {longest} (the model is made for {found.trained_context:,})")
    if found.speed is not None:
        print_lines(
            f"estimated speed: {found.speed.least:.1f} to {found.speed.most:.1f} tokens a second, the context full; "
            f"a prompt at most {found.speed.prompt_bound:,.0f}, if memory alone counted"
        )
    for change in found.changes:
        print_lines(f"to make it fit: {change}")
    for warning in found.warnings:
        print_lines(f"note: {warning}")


def _list_devices(*, json: bool) -> None:
    from pocketquant.fit import devices

    if json:
        print_json({"devices": [asdict(device) for device in devices().values()]})
        return
    for name, device in devices().items():
        print_lines(f"{name}: {device.title}")
        print_lines(f"  memory {device.memory.value:,} bytes ({device.memory})")
        if device.bandwidth is not None:
            print_lines(f"  bandwidth {device.bandwidth.value / 1e9:.1f} GB a second ({device.bandwidth})")

"""`sweep`: several recipes or sizes over one source and one reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from pocketquant.cli.choice import Deciding, Sensitivity
from pocketquant.cli.make import Recipes, ReleaseOptions, describe_file, plan_files, print_cost, show_result
from pocketquant.cli.options import ADVANCED, AdapterDir, KeepSource, OutFolder, Source, Talk, option
from pocketquant.cli.planning import Opened, working_with
from pocketquant.cli.report import command_words
from pocketquant.cli.screen import size


@dataclass(frozen=True)
class Compared:
    """What is compared, with what, and what stays."""

    recipe: Recipes = None
    target_size: Annotated[
        list[str] | None,
        option("--target-size", "SIZE", "Size of a file whose types are chosen to lose least; may be repeated."),
    ] = None
    target_bpw: Annotated[
        list[float] | None,
        option("--target-bpw", "BITS", "Bits per weight in place of a size; may be repeated.", ADVANCED),
    ] = None
    sensitivity: Sensitivity = None
    reference: Annotated[
        Path | None,
        option(
            "--reference", "PACK", "Reference pack, made by `reference --with-head`; default: one is made.", ADVANCED
        ),
    ] = None
    keep: Annotated[
        str,
        option(
            "--keep",
            "front|all|none",
            "Files to keep; front: those that no other file beats in size and loss.",
            ADVANCED,
        ),
    ] = "front"

    @property
    def files(self) -> list[Path | str | None]:
        """What must not be written over."""
        return [self.sensitivity, self.reference, *(self.recipe or [])]

    def wanted(self, shared: Deciding) -> list[Deciding]:
        """What decides each file; refuses what cannot be compared."""
        from pocketquant.release.sweep import KEEP

        if self.keep not in KEEP:
            raise typer.BadParameter(f"must be {' or '.join(KEEP)}", param_hint="--keep")
        sized = replace(shared, sensitivity=self.sensitivity)
        wanted = [replace(shared, recipe=name) for name in self.recipe or []]
        wanted += [replace(sized, target_size=nbytes) for nbytes in self.target_size or []]
        wanted += [replace(sized, target_bpw=bits) for bits in self.target_bpw or []]
        if not wanted:
            what = "name what to compare: --recipe, --target-size or --target-bpw"
            raise typer.BadParameter(what, param_hint="--recipe")
        return wanted


def sweep(
    source: Source,
    out: OutFolder,
    *,
    compared: Compared,
    measured: ReleaseOptions,
    adapter: AdapterDir = None,
    keep_source: KeepSource = None,
    talk: Talk,
) -> None:
    """Measure several recipes or sizes against one reference.

    An interrupted sweep goes on where it was.
    """
    from pocketquant.files.replacing import refuse_overwriting
    from pocketquant.release.measuring import REPORTS
    from pocketquant.release.sweep import plan_sweep, run_sweep

    settings, wanted = measured.settings, compared.wanted(measured.deciding)
    opened = Opened(adapter=adapter, mtp="drop", mmproj="none", keep_source=keep_source)
    release = plan_files(source, wanted, settings, opened.open(source, talk), talk)
    read = [source, adapter, *compared.files, *measured.files]
    written = [out / name for name in (*(each.name for each in release.variants), *REPORTS)]
    refuse_overwriting(written, [*read, *(each.path for each in release.settings.texts)], makes_folder=True)
    planned = plan_sweep(release, pack=compared.reference, keep=compared.keep)
    missing = planned.missing(out)
    for variant in release.variants:
        known = "to measure" if variant in missing else "measured already"
        talk.say(f"{variant.name}: {size(variant.plan.file_bytes)}, {known}")
    talk.say(
        f"{len(missing)} of {len(release.variants)} files to make and measure; needs up to {size(planned.disk_bytes)} "
        f"of disk and {size(planned.memory_bytes)} of memory"
    )
    if measured.dry_run:
        files = (describe_file(each) | {"is_measured": each not in missing} for each in release.variants)
        print_cost(files, planned, talk)
        return
    with working_with(measured.threads, measured.gpu_layers, measured.scheduler, quiet=talk.quiet) as means:
        result = run_sweep(planned, out, means=means, command=command_words())
    show_result(result, out, talk)

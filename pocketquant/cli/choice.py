"""The options that decide a file's types and rounding, as a `Choice`, and what was decided, in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketquant.cli.options import ADVANCED, RoundingSteps, Stats, Talk, option
from pocketquant.cli.screen import print_lines, print_table

if TYPE_CHECKING:
    from pocketquant.model import Plan
    from pocketquant.quant import Choice, Target
    from pocketquant.quant.explain import Change, Explanation

Sensitivity = Annotated[
    Path | None,
    option("--sensitivity", "FILE", "What to predict losses from: a file of `calibrate --sensitivity`.", ADVANCED),
]


@dataclass(frozen=True)
class Deciding:
    """What decides a file's types and how its weights are rounded."""

    recipe: Annotated[
        str | None,
        option(
            "--recipe -r",
            "NAME|FILE",
            "Built-in recipe, a TOML file, or from:FILE.gguf for another file's types; default: pocket_4bit.",
        ),
    ] = None
    target_size: Annotated[
        str | None,
        option(
            "--target-size", "SIZE", "Choose the types that lose least in a file of this size: 2.95GB, 700MB, 1.5GiB."
        ),
    ] = None
    target_bpw: Annotated[
        float | None,
        option("--target-bpw", "BITS", "Choose the types that lose least at so many bits per weight: 4.8."),
    ] = None
    device: Annotated[
        str, option("--device", "phone|any", "Types that may be chosen: those that are fast on phones, or all.")
    ] = "phone"
    imatrix: Annotated[
        Path | None, option("--imatrix", "FILE", "Importance matrix to round by, in llama.cpp's GGUF format.")
    ] = None
    stats: Stats = None
    explain: Annotated[
        bool,
        option(
            "--explain",
            "",
            "Print each role's bytes and predicted loss, and what a smaller or a larger type would change.",
        ),
    ] = False
    rounding: RoundingSteps = None
    sensitivity: Sensitivity = None
    keep_types: Annotated[
        bool,
        option("--keep-types", "", "Keep a pocket recipe's own types, where --stats would choose others.", ADVANCED),
    ] = False

    @property
    def files(self) -> list[Path | str | None]:
        """What must not be written over."""
        recipe = self.recipe.removeprefix("from:") if self.recipe else None
        return [recipe, self.imatrix, self.stats, self.sensitivity]


def read_choice(given: Deciding) -> Choice:
    """Checks what the options say together, and opens the files that they name."""
    return read_choices([given])[0]


def read_choices(options: Sequence[Deciding]) -> list[Choice]:
    """A choice for each; a file that several of them name is opened once."""
    from pocketquant.calibration.statistics import open_statistics
    from pocketquant.quant import Choice, open_recipe, read_importance
    from pocketquant.quant.choosing import DEFAULT_RECIPE
    from pocketquant.quant.loss_table import read_figures

    opened: dict[tuple[str, Path], Any] = {}

    def read(what: str, path: Path | None, how: Callable[[Path], Any]) -> Any:
        if path is None:
            return None
        if (what, path) not in opened:
            opened[what, path] = how(path)
        return opened[what, path]

    targets = [_check_options(given) for given in options]
    return [
        Choice(
            recipe=open_recipe(given.recipe or DEFAULT_RECIPE),
            target=target,
            importance=read("importance", given.imatrix, read_importance),
            statistics=read("statistics", given.stats, open_statistics),
            steps=given.rounding or Choice.steps,
            figures=read("figures", given.sensitivity, read_figures),
            device=given.device,
            keep_types=given.keep_types,
        )
        for given, target in zip(options, targets, strict=True)
    ]


def _check_options(given: Deciding) -> Target | None:
    """Checks what the options say together; gives the target that they name."""
    from pocketquant.quant.allocation import DEVICES
    from pocketquant.quant.choosing import NO_STEPS
    from pocketquant.quant.rounding.encoding import STEPS

    target = _read_target(given)
    if given.sensitivity is not None and target is None and given.stats is None and not given.explain:
        raise typer.BadParameter(
            "is used only with --target-size, --target-bpw or --explain", param_hint="--sensitivity"
        )
    if given.device not in DEVICES:
        raise typer.BadParameter(f"must be {' or '.join(DEVICES)}", param_hint="--device")
    if given.stats is None and given.rounding not in (None, NO_STEPS):
        raise typer.BadParameter("needs --stats, from `pocketquant calibrate`", param_hint="--rounding")
    if given.rounding not in (None, NO_STEPS, *STEPS):
        raise typer.BadParameter(f"must be one of {NO_STEPS}, {', '.join(STEPS)}", param_hint="--rounding")
    return target


def _read_target(given: Deciding) -> Target | None:
    from pocketquant.gguf_file.shards import parse_size
    from pocketquant.quant import Target

    options = {"--recipe": given.recipe, "--target-size": given.target_size, "--target-bpw": given.target_bpw}
    used = [name for name, value in options.items() if value is not None]
    if len(used) > 1:
        raise typer.BadParameter(f"{' and '.join(used)} both decide the types: give one", param_hint=used[1])
    if given.target_size is not None:
        return Target(file_bytes=parse_size(given.target_size))
    return None if given.target_bpw is None else Target(bits_per_weight=given.target_bpw)


def say_allocation(planned: Plan, talk: Talk) -> None:
    """How near a plan comes to a size that was asked for, and what is not certain."""
    from pocketquant.quant.allocation import CLOSE_ENOUGH

    made = planned.allocation
    if made is None:
        return
    line = f"{100 * made.fill:.2f} % of {made.target}, predicted loss {made.predicted_loss:.5f} nats a token"
    if made.fill < 1 - CLOSE_ENOUGH:
        line += "; the formats allow no plan that is nearer and loses less"
    if made.least_loss < made.predicted_loss:
        gap = 1 - made.least_loss / made.predicted_loss
        line += f"; the search ended early: a plan that loses up to {100 * gap:.2g} % less may exist"
    talk.say(line)


def print_explanation(explanation: Explanation) -> None:
    """What each role takes and loses, the next changes, and the sums."""
    print()
    print_table(
        ["role", "types", "bytes", "bits/weight", "share of loss"],
        [
            [
                share.role,
                ", ".join(f"{n} {name}" for name, n in share.formats.items()),
                f"{share.nbytes:,}",
                f"{share.bits_per_weight:.2f}",
                f"{100 * share.loss_share:.1f} %",
            ]
            for share in explanation.roles
        ],
    )
    print()
    changes = [(share.role, change) for share in explanation.roles for change in (share.cheaper, share.dearer)]
    print_table(
        ["role", "layer", "next change", "bytes", "predicted loss", "file bytes"],
        [_change_row(role, change) for role, change in changes if change is not None],
    )
    print(f"\n{explanation.file_bytes:,} bytes, predicted loss {explanation.predicted_loss:.5f} nats a token")
    print_lines(f"predicted from {explanation.sensitivity}")


def _change_row(role: str, change: Change) -> list[str]:
    layer = "" if change.layer is None else str(change.layer)
    step = f"{change.before} -> {change.after}"
    return [role, layer, step, f"{change.nbytes:+,}", f"{change.loss:+.3g}", f"{change.file_bytes:,}"]

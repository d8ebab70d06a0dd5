"""`quantize --target-size` and `--explain`, and `recipe list` and `recipe show`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketquant.cli.group import Commands
from pocketquant.cli.screen import print_json, print_lines, print_table, say, step_progress

if TYPE_CHECKING:
    from pocketquant.model import Model, Plan, Value
    from pocketquant.quant import Importance, Sensitivity
    from pocketquant.quant.allocation import Target
    from pocketquant.quant.explain import Change, Explanation
    from pocketquant.quant.loss_table import LossTable
    from pocketquant.quant.rounding import Rounding
    from pocketquant.release.planning import Choice, Rounder

DEFAULT_RECIPE = "pocket_4bit"
POCKET = ("pocket_4bit", "pocket_5bit", "pocket_8bit")
"""Recipes that are a size: statistics choose better types within their bytes."""


@dataclass(frozen=True)
class Sizing:
    """What decides the formats: a recipe, or a target with figures to predict with; and whether to explain them.

    Attributes:
        stats, rounding: as `quantize` has them; they predict what the rounding will lose.
        device: what the file is for.
        keep_types: take a recipe's types as they are, though statistics could choose better ones.
    """

    recipe: str
    target: Target | None = None
    sensitivity: Path | None = None
    explain: bool = False
    stats: Path | None = None
    rounding: str | None = None
    device: str = "phone"
    keep_types: bool = False


def read_sizing(
    recipe: str | None,
    target_size: str | None,
    target_bpw: float | None,
    sensitivity: Path | None,
    explain: bool,
    *,
    stats: Path | None = None,
    rounding: str | None = None,
    device: str = "phone",
    keep_types: bool = False,
) -> Sizing:
    """Checks what the options say together."""
    from pocketquant.gguf_file.shards import parse_size
    from pocketquant.quant.allocation import DEVICES, Target

    given = {"--recipe": recipe, "--target-size": target_size, "--target-bpw": target_bpw}
    used = [name for name, value in given.items() if value is not None]
    if len(used) > 1:
        raise typer.BadParameter(f"{' and '.join(used)} both decide the types: give one", param_hint=used[1])
    if sensitivity is not None and target_size is None and target_bpw is None and stats is None and not explain:
        raise typer.BadParameter("goes with --target-size, --target-bpw or --explain", param_hint="--sensitivity")
    if device not in DEVICES:
        raise typer.BadParameter(f"{' or '.join(DEVICES)}", param_hint="--device")
    target = None
    if target_size is not None:
        target = Target(file_bytes=parse_size(target_size))
    elif target_bpw is not None:
        target = Target(bits_per_weight=target_bpw)
    return Sizing(recipe or DEFAULT_RECIPE, target, sensitivity, explain, stats, rounding, device, keep_types)


def plan_sized(model: Model, sizing: Sizing, importance: Importance | None, *, quiet: bool) -> Plan:
    """The plan that the options ask for; says how near it comes to a target, and what is not certain."""
    from pocketquant.quant import open_recipe, plan
    from pocketquant.quant.allocation import CLOSE_ENOUGH, Target, plan_to_target

    target, name = sizing.target, None
    if target is None and (sizing.stats is None or sizing.keep_types or sizing.recipe not in POCKET):
        return plan(model, open_recipe(sizing.recipe), importance)
    extra = _rounding_metadata(sizing)
    if target is None:
        size = plan(model, open_recipe(sizing.recipe), importance, extra).file_bytes
        target, name = Target(file_bytes=size), sizing.recipe
    figures = read_predictions(model, sizing, quiet=quiet)
    made = plan_to_target(model, target, figures, importance, extra, device=sizing.device, recipe_name=name)
    line = f"{100 * made.fill:.2f} % of {target}, predicted loss {made.predicted_loss:.5f} nats a token"
    if made.fill < 1 - CLOSE_ENOUGH:
        line += "; the formats allow no plan that is nearer and loses less"
    if made.least_loss < made.predicted_loss:
        gap = 1 - made.least_loss / made.predicted_loss
        line += f"; the search ended early: a plan that loses up to {100 * gap:.2g} % less may exist"
    say(line, quiet=quiet)
    return made.plan


def choice_of(
    recipe: str | None,
    target_size: str | None,
    target_bpw: float | None,
    sensitivity: Path | None,
    stats: Path | None,
    rounding: str | None,
    rounded: Rounder,
) -> Choice:
    """What plans one file, as `quantize` does with the same options."""
    from pocketquant.quant import open_recipe
    from pocketquant.release.planning import Choice

    is_target = recipe is None
    sizing = read_sizing(
        recipe, target_size, target_bpw, sensitivity if is_target else None, False, stats=stats, rounding=rounding
    )

    def plan_it(model: Model, importance: Importance | None) -> Plan:
        return rounded(plan_sized(model, sizing, importance, quiet=True))

    return Choice(open_recipe(sizing.recipe), plan_it)


def _rounding_metadata(sizing: Sizing) -> Mapping[str, Value]:
    """What the rounding will add to the file's metadata, so that the size is decided with it."""
    if sizing.stats is None or sizing.rounding == "none":
        return {}
    from pocketquant.calibration.statistics import open_statistics
    from pocketquant.quant.rounding.encoding import rounding_metadata

    return rounding_metadata(open_statistics(sizing.stats), _rounding(sizing))


def read_predictions(model: Model, sizing: Sizing, *, quiet: bool) -> Sensitivity | LossTable:
    """What to predict with: the file that was named, else the statistics, else what comes with the package."""
    from pocketquant.quant.loss_table import LossTable, read_figures
    from pocketquant.quant.prediction import predict_losses

    figures = read_figures(sizing.sensitivity)
    if sizing.stats is None or isinstance(figures, LossTable):
        return figures
    from pocketquant.calibration.statistics import fingerprint, open_statistics

    key = (sizing, fingerprint(model))
    if key in _predicted:
        return _predicted[key]
    options = None if sizing.rounding == "none" else _rounding(sizing)
    with step_progress("predicting", quiet=quiet) as advance:
        _predicted[key] = predict_losses(
            model,
            open_statistics(sizing.stats),
            rounding=options,
            sensitivity=figures,
            activations=True,
            progress=advance,
        )
    return _predicted[key]


_predicted: dict[tuple[Sizing, str], LossTable] = {}
"""A plan and its explanation take the same; making one can take hours."""


def _rounding(sizing: Sizing) -> Rounding:
    from pocketquant.quant.rounding.encoding import STEPS

    steps = sizing.rounding or "two-sided"
    if steps not in STEPS:
        raise typer.BadParameter(f"none, {', '.join(STEPS)}", param_hint="--rounding")
    return STEPS[steps]


def explain_plan(planned: Plan, model: Model, sizing: Sizing) -> Explanation | None:
    """The explanation, if it was asked for."""
    from pocketquant.quant.explain import explain

    if not sizing.explain:
        return None
    return explain(planned, model, read_predictions(model, sizing, quiet=True), sizing.device)


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


recipe_app = typer.Typer(
    cls=Commands, help="Show the recipes, and the types of other files as recipes.", no_args_is_help=True
)


@recipe_app.command("list")
def list_recipes(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """List the built-in recipes."""
    from pocketquant.quant import builtin_recipes, open_recipe

    recipes = [open_recipe(name) for name in builtin_recipes()]
    if json:
        print_json({"recipes": [{"name": recipe.name, "description": recipe.description} for recipe in recipes]})
    else:
        print_table(["recipe", "description"], [[recipe.name, recipe.description] for recipe in recipes])


@recipe_app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE.toml|from:FILE.gguf", help="Recipe to print as TOML.")],
) -> None:
    """Print a recipe as TOML: a file for --recipe, to keep or to change."""
    from pocketquant.quant import open_recipe
    from pocketquant.quant.recipe_text import format_recipe

    print(format_recipe(open_recipe(name)), end="")


__all__ = [
    "DEFAULT_RECIPE",
    "POCKET",
    "Sizing",
    "choice_of",
    "explain_plan",
    "plan_sized",
    "print_explanation",
    "read_predictions",
    "read_sizing",
    "recipe_app",
]

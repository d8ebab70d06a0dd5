"""`quantize --target-size` and `--explain`, and `recipe list` and `recipe show`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketquant.cli.screen import print_json, print_table, say

if TYPE_CHECKING:
    from pocketquant.model import Model, Plan
    from pocketquant.quant import Importance
    from pocketquant.quant.allocation import Target
    from pocketquant.quant.explain import Change, Explanation

DEFAULT_RECIPE = "pocket_4bit"


@dataclass(frozen=True)
class Sizing:
    """What decides the formats: a recipe, or a target with a table of sensitivities; and whether to explain them."""

    recipe: str
    target: Target | None = None
    sensitivity: Path | None = None
    explain: bool = False


def read_sizing(
    recipe: str | None, target_size: str | None, target_bpw: float | None, sensitivity: Path | None, explain: bool
) -> Sizing:
    """Checks what the options say together."""
    from pocketquant.quant.allocation import Target
    from pocketquant.splits import parse_size

    given = {"--recipe": recipe, "--target-size": target_size, "--target-bpw": target_bpw}
    used = [name for name, value in given.items() if value is not None]
    if len(used) > 1:
        raise typer.BadParameter(f"{' and '.join(used)} both decide the types: give one", param_hint=used[1])
    if sensitivity is not None and target_size is None and target_bpw is None and not explain:
        raise typer.BadParameter("goes with --target-size, --target-bpw or --explain", param_hint="--sensitivity")
    target = None
    if target_size is not None:
        target = Target(file_bytes=parse_size(target_size))
    elif target_bpw is not None:
        target = Target(bits_per_weight=target_bpw)
    return Sizing(recipe or DEFAULT_RECIPE, target, sensitivity, explain)


def plan_sized(model: Model, sizing: Sizing, importance: Importance | None, *, quiet: bool) -> Plan:
    """The plan that the options ask for; says how near it comes to a target, and what is not certain."""
    from pocketquant.quant import open_recipe, plan
    from pocketquant.quant.allocation import CLOSE_ENOUGH, plan_to_target
    from pocketquant.quant.sensitivity import read_sensitivity

    if sizing.target is None:
        return plan(model, open_recipe(sizing.recipe), importance)
    made = plan_to_target(model, sizing.target, read_sensitivity(sizing.sensitivity), importance)
    line = f"{100 * made.fill:.2f} % of {sizing.target}, predicted loss {made.predicted_loss:.5f} nats a token"
    if made.fill < 1 - CLOSE_ENOUGH:
        line += "; the formats allow no plan that is nearer and loses less"
    if made.least_loss < made.predicted_loss:
        gap = 1 - made.least_loss / made.predicted_loss
        line += f"; the search ended early: a plan that loses up to {100 * gap:.2g} % less may exist"
    say(line, quiet=quiet)
    return made.plan


def explain_plan(planned: Plan, model: Model, sizing: Sizing) -> Explanation | None:
    """The explanation, if it was asked for."""
    from pocketquant.quant.explain import explain
    from pocketquant.quant.sensitivity import read_sensitivity

    return explain(planned, model, read_sensitivity(sizing.sensitivity)) if sizing.explain else None


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
    print(f"predicted from {explanation.sensitivity}")


def _change_row(role: str, change: Change) -> list[str]:
    layer = "" if change.layer is None else str(change.layer)
    step = f"{change.before} -> {change.after}"
    return [role, layer, step, f"{change.nbytes:+,}", f"{change.loss:+.3g}", f"{change.file_bytes:,}"]


recipe_app = typer.Typer(help="Show the recipes, and the types of other files as recipes.", no_args_is_help=True)


@recipe_app.command("list")
def list_recipes(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """List the built-in recipes."""
    from pocketquant.quant import builtin_recipes, open_recipe

    recipes = [open_recipe(name) for name in builtin_recipes()]
    if json:
        print_json([{"name": recipe.name, "description": recipe.description} for recipe in recipes])
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


__all__ = ["DEFAULT_RECIPE", "Sizing", "explain_plan", "plan_sized", "print_explanation", "read_sizing", "recipe_app"]

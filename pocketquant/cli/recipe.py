"""`recipe list` and `recipe show`."""

from __future__ import annotations

from typing import Annotated

import typer

from pocketquant.cli.group import Command, Commands
from pocketquant.cli.options import Json
from pocketquant.cli.screen import print_json, print_table

recipe_app = typer.Typer(
    cls=Commands, help="Show the recipes, and the types of other files as recipes.", no_args_is_help=True
)


@recipe_app.command("list", cls=Command)
def list_recipes(json: Json = False) -> None:
    """List the built-in recipes."""
    from pocketquant.quant import builtin_recipes, open_recipe

    recipes = [open_recipe(name) for name in builtin_recipes()]
    if json:
        print_json({"recipes": [{"name": recipe.name, "description": recipe.description} for recipe in recipes]})
    else:
        print_table(["recipe", "description"], [[recipe.name, recipe.description] for recipe in recipes])


@recipe_app.command("show", cls=Command)
def show_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE.toml|from:FILE.gguf", help="Recipe to print as TOML.")],
) -> None:
    """Print a recipe as TOML: a file for --recipe, to keep or to change."""
    from pocketquant.quant import open_recipe
    from pocketquant.quant.recipe_text import format_recipe

    print(format_recipe(open_recipe(name)), end="")

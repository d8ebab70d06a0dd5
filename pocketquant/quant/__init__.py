"""Model + Choice -> Plan: which format each tensor gets, how large the file will be, and why.

recipe        recipes as TOML data, and the choice of formats; recipe_text: as text, and from the types of another file
recipes/      the built-in recipes
choosing      what decides a file, as one value
planning      the output file, decided; applying: by a recipe's rules
sensitivity   what rounding each tensor is predicted to lose, from sensitivity.toml
prediction    the same for this very model, from its statistics; loss_table: the table; measuring: by running the model
knapsack      one choice for each item, least loss within a budget, exactly
allocation    a size as the input: the types that are predicted to lose least
explain       what each role takes and loses, and what the next change would do
rounding/     rounding by statistics
"""

from pocketquant.calibration.importance import Importance, check_importance, read_importance
from pocketquant.model import Allocation
from pocketquant.quant.choosing import Choice, Target
from pocketquant.quant.explain import Explanation, explain
from pocketquant.quant.planning import plan, with_figures
from pocketquant.quant.recipe import Recipe, Rule, builtin_recipes, choose_formats, parse_recipe
from pocketquant.quant.recipe_text import format_recipe, open_recipe
from pocketquant.quant.sensitivity import Sensitivity, parse_sensitivity, read_sensitivity

__all__ = [
    "Allocation",
    "Choice",
    "Explanation",
    "Importance",
    "Recipe",
    "Rule",
    "Sensitivity",
    "Target",
    "builtin_recipes",
    "check_importance",
    "choose_formats",
    "explain",
    "format_recipe",
    "open_recipe",
    "parse_recipe",
    "parse_sensitivity",
    "plan",
    "read_importance",
    "read_sensitivity",
    "with_figures",
]

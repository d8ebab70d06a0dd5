"""Model + Recipe -> Plan: which format each tensor gets, how large the file will be, and why.

recipe.py       recipes as TOML data, and the choice of formats
recipes/        the built-in recipes
importance.py   importance matrices in llama.cpp's format
collect.py      one made by running a model over a text
observing.py    what llama.cpp multiplies, read from its memory
statistics.py   second moments of inputs and gradients, read; statistics_writing.py: written and merged
calibrating.py  those of inputs, made by running a model over texts; moments.py: the sums
curvature.py    those of gradients, with torch; curvature_states.py: what lies between the layers
planning.py     the output file, decided
sensitivity.py  what rounding each tensor is predicted to lose, from sensitivity.toml
prediction.py   the same for this very model, from its statistics; loss_table.py: the table; measuring.py: by runs
knapsack.py     one choice for each item, least loss within a budget, exactly
allocation.py   a size as the input: the types that are predicted to lose least
explain.py      what each role takes and loses, and what the next change would do
recipe_text.py  recipes as TOML, and from the types of another file
"""

from pocketquant.quant.allocation import Allocation, Target, plan_to_target
from pocketquant.quant.explain import Explanation, explain
from pocketquant.quant.importance import Importance, check_importance, read_importance
from pocketquant.quant.planning import plan
from pocketquant.quant.recipe import Recipe, Rule, builtin_recipes, choose_formats, parse_recipe
from pocketquant.quant.recipe_text import format_recipe, open_recipe
from pocketquant.quant.sensitivity import Sensitivity, parse_sensitivity, read_sensitivity

__all__ = [
    "Allocation",
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
    "plan_to_target",
    "read_importance",
    "read_sensitivity",
]

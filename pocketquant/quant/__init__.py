"""Model + Recipe -> Plan: which format each tensor gets, how large the file will be, and why.

recipe.py       recipes as TOML data, and the choice of formats
recipes/        the built-in recipes
importance.py   importance matrices in llama.cpp's format
planning.py     the output file, decided
"""

from pocketquant.quant.importance import Importance, check_importance, read_importance
from pocketquant.quant.planning import plan
from pocketquant.quant.recipe import Recipe, Rule, builtin_recipes, choose_formats, open_recipe, parse_recipe

__all__ = [
    "Importance",
    "Recipe",
    "Rule",
    "builtin_recipes",
    "check_importance",
    "choose_formats",
    "open_recipe",
    "parse_recipe",
    "plan",
    "read_importance",
]

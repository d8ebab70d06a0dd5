"""Recipes as text, and from tables of types: a plan's or another file's, tensor by tensor."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pocketquant.errors import RecipeError, listing
from pocketquant.formats import FORMATS, QuantFormat
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.gguf_file.reading import read_header
from pocketquant.model import Model, Role, Value
from pocketquant.quant.recipe import Recipe, Rule, choose_formats, open_named_recipe

Place = tuple[Role, int | None]
"""A role and its block; all tensors of one place have one format."""


def open_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe of that name, the one in that TOML file, or the types of another GGUF (`from:FILE.gguf`).

    Raises:
        RecipeError: there is no such recipe or file, it is too large, or something in it is not understood.
    """
    text = str(name_or_path)
    return recipe_of_file(text[len("from:") :]) if text.startswith("from:") else open_named_recipe(name_or_path)


def format_recipe(recipe: Recipe) -> str:
    """A recipe as TOML; `parse_recipe` gives the same recipe back."""
    lines = [f"{key} = {_toml(getattr(recipe, key))}" for key in ("name", "description", "file_type", "default")]
    for rule in recipe.rules:
        lines += ["", "[[rules]]"]
        for field in fields(Rule):
            value = getattr(rule, field.name)
            if field.name in ("format", "reason") or value != field.default:
                lines.append(f"{field.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, QuantFormat):
        return _toml(value.name)
    if isinstance(value, (frozenset, tuple)):
        items = [role.value for role in Role if role in value] if isinstance(value, frozenset) else value
        return f"[{', '.join(_toml(item) for item in items)}]"
    if isinstance(value, str):  # TOML's basic strings are JSON's but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower()


def recipe_of_types(name: str, description: str, types: Mapping[Place, QuantFormat], reason: str) -> Recipe:
    """The recipe that gives every place its format: exceptions by layer first, then each role's commonest format.

    Args:
        types: the format of every place, never empty.
        reason: of every rule.
    """
    by_role: dict[Role, dict[int | None, QuantFormat]] = defaultdict(dict)
    for (role, layer), chosen in types.items():
        by_role[role][layer] = chosen
    default = _commonest(types.values())
    usual = {role: places.get(None, _commonest(places.values())) for role, places in by_role.items()}
    exceptions: dict[tuple[str, tuple[str, ...]], set[Role]] = defaultdict(set)
    for role, places in by_role.items():
        for unusual in sorted({chosen.name for chosen in places.values()} - {usual[role].name}):
            layers = [layer for layer, chosen in places.items() if layer is not None and chosen.name == unusual]
            exceptions[unusual, _layer_words(layers)].add(role)
    plain: dict[str, set[Role]] = defaultdict(set)
    for role, chosen in usual.items():
        if chosen is not default:
            plain[chosen.name].add(role)
    rules = [Rule(FORMATS[f], reason, frozenset(roles), layers) for (f, layers), roles in sorted(exceptions.items())]
    rules += [Rule(FORMATS[format], reason, frozenset(roles)) for format, roles in sorted(plain.items())]
    return Recipe(name, description, default.file_type, default, tuple(rules))


def recipe_of_file(path: Path | str) -> Recipe:
    """The types of another GGUF as a recipe, tensor by tensor.

    Applied to the same model it gives the same types. The layers are that file's: in a deeper model, those behind them
    get what is commonest for their role. Tensors that are always F32 are left out.

    Raises:
        SourceError, ArchitectureError: a file that cannot be read, with types or tensors that we do not know.
        RecipeError: types that roles and layers cannot tell apart (all listed), or nothing but F32.
    """
    path = Path(path)
    model = open_gguf(path)
    seen: dict[Place, set[str]] = defaultdict(set)
    for tensor in model.tensors:
        if not tensor.keep_f32:
            seen[tensor.role, tensor.layer].add(tensor.dtype)
    mixed = [
        f"{role.value}, layer {layer}: {' and '.join(sorted(n))}" for (role, layer), n in seen.items() if len(n) > 1
    ]
    if mixed:
        raise RecipeError(f"{path}: types that differ between tensors of one role and layer\n{listing(mixed)}")
    if not seen:
        raise RecipeError(f"{path}: holds no tensor whose type a recipe decides")
    types = {place: FORMATS[names.pop()] for place, names in seen.items()}
    name = "from-" + re.sub(r"[^a-z0-9_.-]", "_", path.stem.lower())[:59]
    recipe = recipe_of_types(name, f"the types of {path.name}", types, f"as in {path.name}")
    check_types(model, recipe, types)
    file_type = read_header(path).metadata.get("general.file_type", Value("u32", recipe.file_type)).value
    if type(file_type) is int and 0 <= file_type < 1024:
        recipe = Recipe(recipe.name, recipe.description, file_type, recipe.default, recipe.rules)
    return recipe


def check_types(model: Model, recipe: Recipe, types: Mapping[Place, QuantFormat]) -> None:
    """Raises RecipeError, all tensors listed, where a recipe does not give a model these types."""
    wrong = [
        f"{tensor.name}: {types[tensor.role, tensor.layer].name} became {format.name} ({reason})"
        for tensor, format, reason in choose_formats(model, recipe, False)
        if not tensor.keep_f32 and format is not types[tensor.role, tensor.layer]
    ]
    if wrong:
        raise RecipeError(f"{recipe.name}: types that no recipe can give\n{listing(wrong)}")


def _commonest(formats: Iterable[QuantFormat]) -> QuantFormat:
    counts = Counter(format.name for format in formats)
    return FORMATS[max(sorted(counts), key=lambda name: counts[name])]


def _layer_words(layers: list[int]) -> tuple[str, ...]:
    """Layers as a recipe's words: [0, 1, 2, 5] -> ("0-2", "5")."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return tuple(str(a) if a == b else f"{a}-{b}" for a, b in runs)

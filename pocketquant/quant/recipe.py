"""Recipes: which number format each tensor gets, as TOML data over roles and layers.

A recipe is a default format and an ordered list of rules; the first rule whose every condition holds decides. Rules
speak of `Role`s, never of tensor names. A file looks like this:

    name = "my_4bit"
    description = "one line for people"
    file_type = 15                  # general.file_type, a number of llama.cpp's llama_ftype
    default = "Q4_K"

    [[rules]]
    format = "Q6_K"
    reason = "one line for the plan"
    roles = ["attn_v", "delta_qkv"] # any of these; left out: every role
    layers = ["more_bits", "-1"]    # any of these; left out: every layer and the tensors outside the layers
    tied = true                     # the embedding is also the output head (false: it is not)
    importance = true               # an importance matrix was given (false: none was)
    min_gqa = 4                     # at least so many query heads for each key/value head
    min_experts = 2                 # at least so many experts in a block (a dense model has none)
    max_experts = 8                 # at most so many
    mtp = true                      # belongs to the multi-token-prediction block (false: does not)

Words for layers: `first_eighth` and `last_sixteenth` (of the layers, rounded down, so none of a shallow model),
`more_bits` (llama.cpp's choice of about half of the layers), a number counted from 0 ("3"), a number counted from the
end ("-1"), and a range with both ends ("0-3"). A multi-token-prediction block has the number behind the last layer.
It counts as one more layer in `first_eighth` and `more_bits`, as in llama.cpp, and does not in the other words.

No importance matrix has entries for that block, so whatever a recipe gives it is at least Q5_K, unless the rule that
decides says `mtp = true` itself. This is the one place where recipes with llama.cpp's names give other types than
llama.cpp does, which rounds the block like any other.

Source for the built-in recipes but `pocket_*`: src/llama-quant.cpp of llama.cpp (b10359), read for qwen35 and
qwen35moe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pocketquant.architectures.qwen35_mtp import MTP_LEAST
from pocketquant.errors import RecipeError, listing
from pocketquant.files.small import is_present, parse_toml, read_text
from pocketquant.formats import FORMATS, QuantFormat
from pocketquant.model import Model, Role, Tensor

MAX_RECIPE_BYTES = 65536
"""A recipe file larger than this is refused unread."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_LAYER_WORD = re.compile(r"first_eighth|last_sixteenth|more_bits|-[1-9]\d{0,3}|(\d{1,4})(?:-(\d{1,4}))?")
_RECIPE_KEYS = {"name", "description", "file_type", "default", "rules"}
_RULE_KEYS = {
    "format",
    "reason",
    "roles",
    "layers",
    "tied",
    "importance",
    "min_gqa",
    "min_experts",
    "max_experts",
    "mtp",
}


@dataclass(frozen=True)
class Rule:
    """One line of a recipe: conditions, and the format of the tensors that meet all of them.

    Attributes:
        format: what a matching tensor becomes.
        reason: why, for the plan.
        roles: any of these; empty for every role.
        layers: words for layers, any of these; empty for every layer and for the tensors outside the layers.
        tied: whether the embedding is also the head; None for both.
        importance: whether an importance matrix was given; None for both.
        min_gqa: least number of query heads per key/value head.
        min_experts: least number of experts in a block.
        max_experts: largest number of experts in a block; None for any.
        mtp: whether the tensor belongs to the multi-token-prediction block; None for both.
    """

    format: QuantFormat
    reason: str
    roles: frozenset[Role] = frozenset()
    layers: tuple[str, ...] = ()
    tied: bool | None = None
    importance: bool | None = None
    min_gqa: int = 0
    min_experts: int = 0
    max_experts: int | None = None
    mtp: bool | None = None


@dataclass(frozen=True)
class Recipe:
    """Ordered rules, first match wins, and the format of the tensors that no rule names."""

    name: str
    description: str
    file_type: int
    default: QuantFormat
    rules: tuple[Rule, ...] = ()


def builtin_recipes() -> tuple[str, ...]:
    """The names that `open_named_recipe` knows without a file, sorted."""
    folder = resources.files("pocketquant.quant") / "recipes"
    return tuple(sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml")))


def open_named_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe of that name, or the one in that TOML file.

    Raises:
        RecipeError: there is no such recipe or file, it is too large, or something in it is not understood.
    """
    text = str(name_or_path)
    if text.lower() in builtin_recipes():
        packaged = resources.files("pocketquant.quant") / "recipes" / f"{text.lower()}.toml"
        return parse_recipe(packaged.read_text(encoding="utf-8"), text)
    path = Path(name_or_path)
    if not is_present(path, RecipeError):
        raise RecipeError(
            f"{text}: neither a recipe nor a file; give a TOML file or one of\n{', '.join(builtin_recipes())}"
        )
    return parse_recipe(read_text(path, MAX_RECIPE_BYTES, RecipeError), str(path))


def parse_recipe(text: str, where: str) -> Recipe:
    """Parses a recipe strictly: whatever is not understood is refused, all of it in one message.

    Args:
        text: TOML.
        where: what to call it in errors.

    Raises:
        RecipeError: not TOML, or unknown keys, roles, formats, layers, or values of the wrong kind.
    """
    table = parse_toml(text, where, RecipeError)
    faults = [f"unknown key {key!r}" for key in table if key not in _RECIPE_KEYS]
    name = _text(table, "name", "", faults)
    if name and not _NAME.fullmatch(name):
        faults.append(f"name {name!r}: use up to 64 lower-case letters, digits, '_', '-', '.'")
    description = _text(table, "description", "", faults)
    file_type = _integer(table, "file_type", "", faults, least=0, most=1023)
    if "file_type" not in table:
        faults.append("file_type is missing")
    default = _format(table, "default", "", faults)
    entries = table.get("rules", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        faults.append("rules: write each one as [[rules]]")
        entries = []
    rules = tuple(_rule(entry, f"rule {number}: ", faults) for number, entry in enumerate(entries, start=1))
    if faults:
        raise RecipeError(f"{where}: {len(faults)} fault(s) in the recipe\n{listing(faults)}")
    return Recipe(name, description, file_type, default, rules)


def choose_formats(model: Model, recipe: Recipe, has_importance: bool) -> list[tuple[Tensor, QuantFormat, str]]:
    """Decides the format of every tensor, with the reason; reads no data.

    A row that is no multiple of the format's block goes to the format's fallback, which is what llama.cpp does; where
    llama.cpp gives up (rows of 32-wide formats that are no multiple of 32), the tensor becomes F16.

    Args:
        model: names, roles and shapes.
        recipe: the rules.
        has_importance: whether an importance matrix was given.

    Returns:
        (tensor, format, reason), in the order of `model.tensors`.
    """
    return [(tensor, *_choose(tensor, model, recipe, has_importance)) for tensor in model.tensors]


def uses_more_bits(layer: int, n_layer: int) -> bool:
    """llama.cpp's `use_more_bits`: the first eighth, the last eighth, and every third layer between."""
    eighth = n_layer // 8
    return layer < eighth or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2


def _choose(tensor: Tensor, model: Model, recipe: Recipe, has_importance: bool) -> tuple[QuantFormat, str]:
    if tensor.keep_f32:
        return FORMATS["F32"], "kept in F32: every runtime wants it so"
    wanted, reason, is_meant = recipe.default, f"default of {recipe.name}", False
    for rule in recipe.rules:
        if _matches(rule, tensor, model, has_importance):
            wanted, reason, is_meant = rule.format, rule.reason, rule.mtp is True
            break
    least = FORMATS[MTP_LEAST]
    if not is_meant and _is_mtp(tensor, model) and wanted.bits_per_weight < least.bits_per_weight:
        reason = f"multi-token prediction, which no importance matrix covers: {least.name} in place of {wanted.name}"
        wanted = least
    if tensor.role is Role.VISION_PATCH and not wanted.convolves:
        return FORMATS["F32"], f"kept in F32: runtimes have no convolution with {wanted.name} kernels"
    fitting = wanted.fitting(tensor.n_cols)
    if fitting is not wanted:
        reason += f"; {fitting.name} for {wanted.name}: {tensor.n_cols} columns are no multiple of {wanted.block_len}"
    return fitting, reason


def _matches(rule: Rule, tensor: Tensor, model: Model, has_importance: bool) -> bool:
    if rule.roles and tensor.role not in rule.roles:
        return False
    if rule.tied is not None and rule.tied != model.is_tied:
        return False
    if rule.importance is not None and rule.importance != has_importance:
        return False
    if rule.min_gqa and model.sizes["n_head"] // max(1, model.sizes["n_kv"]) < rule.min_gqa:
        return False
    n_expert = model.sizes.get("n_expert", 0)
    if n_expert < rule.min_experts or (rule.max_experts is not None and n_expert > rule.max_experts):
        return False
    if rule.mtp is not None and rule.mtp != _is_mtp(tensor, model):
        return False
    if not rule.layers:
        return True
    layer, n_layer, n_mtp = tensor.layer, model.sizes["n_layer"], model.sizes.get("n_mtp", 0)
    return layer is not None and any(_is_layer(word, layer, n_layer, n_mtp) for word in rule.layers)


def _is_mtp(tensor: Tensor, model: Model) -> bool:
    return tensor.layer is not None and tensor.layer >= model.sizes["n_layer"]


def _is_layer(word: str, layer: int, n_layer: int, n_mtp: int) -> bool:
    if word == "first_eighth":
        return layer < (n_layer + n_mtp) // 8
    if word == "last_sixteenth":
        return n_layer - n_layer // 16 <= layer < n_layer
    if word == "more_bits":
        return uses_more_bits(layer, n_layer + n_mtp)
    if word.startswith("-"):
        return layer == n_layer + int(word)
    first, _, last = word.partition("-")
    return int(first) <= layer <= int(last or first)


def _rule(entry: Mapping[str, Any], where: str, faults: list[str]) -> Rule:
    faults.extend(f"{where}unknown key {key!r}" for key in entry if key not in _RULE_KEYS)
    format = _format(entry, "format", where, faults)
    reason = _text(entry, "reason", where, faults)
    known = {role.value for role in Role}
    roles = _texts(entry, "roles", where, faults)
    faults.extend(f"{where}unknown role {role!r}" for role in roles if role not in known)
    layers = _texts(entry, "layers", where, faults)
    faults.extend(f"{where}unknown layers {word!r}" for word in layers if not _is_layer_word(word))
    min_gqa, min_experts, max_experts = (
        _integer(entry, key, where, faults, least=least, most=1024)
        for key, least in (("min_gqa", 1), ("min_experts", 1), ("max_experts", 0))
    )
    return Rule(
        format,
        reason,
        frozenset(Role(role) for role in roles if role in known),
        layers,
        _boolean(entry, "tied", where, faults),
        _boolean(entry, "importance", where, faults),
        min_gqa,
        min_experts,
        max_experts if "max_experts" in entry else None,
        _boolean(entry, "mtp", where, faults),
    )


def _is_layer_word(word: str) -> bool:
    match = _LAYER_WORD.fullmatch(word)
    return match is not None and (match[2] is None or int(match[1]) <= int(match[2]))


def _text(table: Mapping[str, Any], key: str, where: str, faults: list[str]) -> str:
    value = table.get(key)
    if isinstance(value, str) and value.strip():
        return value
    faults.append(f"{where}{key} is missing" if value is None else f"{where}{key}: expected some text, got {value!r}")
    return ""


def _texts(table: Mapping[str, Any], key: str, where: str, faults: list[str]) -> tuple[str, ...]:
    if key not in table:
        return ()
    value = table[key]
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return tuple(value)
    faults.append(f"{where}{key}: expected a list of texts, got {value!r}")
    return ()


def _integer(table: Mapping[str, Any], key: str, where: str, faults: list[str], *, least: int, most: int) -> int:
    value = table.get(key, 0)
    # bool is an int in Python; TOML's `true` is no number.
    if key in table and (not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most):
        faults.append(f"{where}{key}: expected a whole number from {least} to {most}, got {value!r}")
        return 0
    return int(value)


def _boolean(table: Mapping[str, Any], key: str, where: str, faults: list[str]) -> bool | None:
    value = table.get(key)
    if value is None or isinstance(value, bool):
        return value
    faults.append(f"{where}{key}: expected true or false, got {value!r}")
    return None


def _format(table: Mapping[str, Any], key: str, where: str, faults: list[str]) -> QuantFormat:
    name = _text(table, key, where, faults)
    if name and name not in FORMATS:
        faults.append(f"{where}unknown {key} {name!r}; known are {' '.join(FORMATS)}")
    return FORMATS.get(name, FORMATS["F32"])

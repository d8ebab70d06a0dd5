"""Writes docs/reference/ from the code: the commands, the recipes, the Python API, the number formats.

python tools/make_reference.py           write
python tools/make_reference.py --check   exit 1 if a page is not what the code says
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

import pocketquant
from pocketquant.cli.app import PANELS, app
from pocketquant.cli.group import panels_of, spellings
from pocketquant.formats import FORMATS
from pocketquant.quant import Recipe, builtin_recipes, open_recipe

PAGES = Path(__file__).parent.parent / "docs/reference"


_DOCUMENTS = """\
`--json` prints one document, which begins with `schema` (`pocketquant.COMMAND/1`, and `pocketquant.COMMAND-plan/1` for
a dry run) and the `version` that wrote it. What is wrong is a document, too, in place of the other:
`pocketquant.error/1` with the `command` and the `error`'s `kind`, `message` and `exit_code`. A mode of a command
(`eval --tasks`) prints the document of the command that is nothing but this mode (`tasks`). Where stderr is no
terminal, long runs write a line a minute there."""


def commands_page() -> str:
    codes = "0 fine, 1 a gate failed or a check found an error, 2 bad input, 70 a fault of pocketquant, 130 interrupted"
    lines = ["# Commands", "", f"stdout is data, stderr is talk. Exit codes: {codes}, 141 nobody reads stdout."]
    lines.append("`--debug` anywhere shows the traceback of an error.")
    lines.append(f"\n{_DOCUMENTS}")
    panel = ""
    order = list(PANELS)
    for name, command, shown_in in sorted(
        _commands(typer.main.get_command(app)), key=lambda found: order.index(found[2])
    ):
        if shown_in != panel:
            panel = shown_in
            lines += ["", f"## {panel}"]
        lines += ["", f"### {name}", *_command_lines(name, command)]
    return "\n".join(lines) + "\n"


def _command_lines(name: str, command: Any) -> Iterator[str]:
    positional = [each for each in command.params if each.param_type_name == "argument"]
    usage = " ".join(["pocketquant", name, *(each.metavar or each.name.upper() for each in positional), "[options]"])
    yield from ["", command.help or "", "", f"    {usage}"]
    panels = panels_of(command, command.params)
    if positional:
        title, options = panels[0] if panels else ("", [])
        panels = [(title, [*positional, *options]), *panels[1:]]
    for i, (panel, parameters) in enumerate(panels):
        yield from ["", f"| {panel if i else ''} | | default |", "|---|---|---|"]
        yield from map(_parameter_row, parameters)


def _parameter_row(parameter: Any) -> str:
    spelled = parameter.metavar or parameter.name.upper()
    if parameter.param_type_name != "argument":
        value = "" if getattr(parameter, "is_flag", False) else f" {parameter.metavar or 'N'}"
        spelled = ", ".join(spellings(parameter)) + value
    default = "" if parameter.default in (None, False) or parameter.required else f"`{parameter.default}`"
    required = "required" if parameter.required else default
    return f"| `{spelled.replace('|', chr(92) + '|')}` | {parameter.help or ''} | {required} |"


def _commands(group: Any, parent: str = "", panel: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every command with its whole name and its panel; those of a group after the group's."""
    for name, command in group.commands.items():
        shown_in = panel or command.rich_help_panel
        if hasattr(command, "commands"):
            yield from _commands(command, f"{parent}{name} ", shown_in)
        else:
            yield parent + name, command, shown_in


def recipes_page() -> str:
    lines = [
        "# Recipes",
        "",
        "The first rule whose every condition holds decides a tensor's format; the default is for the rest. Norms, "
        "biases, the convolution and DeltaNet's scalars stay F32 whatever a recipe says. All but `pocket_4bit` are "
        "llama.cpp's own mixtures, type for type. Pass a file of your own with `--recipe FILE.toml`; its grammar is in "
        "`pocketquant/quant/recipe.py`.",
    ]
    for name in builtin_recipes():
        recipe = open_recipe(name)
        lines += ["", f"## {name}", "", f"{recipe.description}. Default {recipe.default.name}.", *_rules(recipe)]
    return "\n".join(lines) + "\n"


def _rules(recipe: Recipe) -> list[str]:
    if not recipe.rules:
        return []
    lines = ["", "| roles | layers | if | format | reason |", "|---|---|---|---|---|"]
    for rule in recipe.rules:
        conditions = [
            *([] if rule.tied is None else ["tied" if rule.tied else "not tied"]),
            *([] if rule.importance is None else ["importance given" if rule.importance else "no importance"]),
            *([f"query heads per key head >= {rule.min_gqa}"] if rule.min_gqa else []),
            *([] if rule.mtp is None else ["in an MTP block" if rule.mtp else "in no MTP block"]),
            *([f"experts >= {rule.min_experts}"] if rule.min_experts else []),
            *([f"experts <= {rule.max_experts}"] if rule.max_experts is not None else []),
        ]
        roles = ", ".join(sorted(role.value for role in rule.roles)) or "all"
        layers = ", ".join(rule.layers) or "all"
        lines.append(f"| {roles} | {layers} | {', '.join(conditions)} | {rule.format.name} | {rule.reason} |")
    return lines


def formats_page() -> str:
    lines = [
        "# Number formats",
        "",
        "All of it stands in one table, in `pocketquant/formats/__init__.py`; [add a format](../add-a-format.md). "
        "`acts` is how many columns of a layer's inputs share a scale where llama.cpp's CPU kernels round them to 8 "
        "bits. `dB` is the least signal over error that `check --source` accepts. Formats on offer are those that "
        "`--target-size` chooses from: *measured* by any figures, *predicted* by statistics only, *exact* where "
        "nothing is lost.",
        "",
        "| format | GGML id | file type | weights in a block | bytes | bits per weight | where rows do not fit | acts "
        "| dB | fast on | on offer | written |",
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---|---:|---:|---|---|---|")
    for item in FORMATS.values():
        lines.append(
            f"| {item.name} | {item.ggml_id} | {item.file_type} | {item.block_len} | {item.block_bytes} | "
            f"{item.bits_per_weight:g} | {item.fallback} | {item.activation_block or ''} | {item.snr_db:g} | "
            f"{', '.join(item.fast_on)} | {item.offered} | {'yes' if item.written else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def python_page() -> str:
    lines = ["# Python API", "", inspect.getdoc(pocketquant) or ""]
    for name in pocketquant.__all__:
        item = getattr(pocketquant, name)
        signature = str(inspect.signature(item)) if inspect.isfunction(item) else ""
        signature = re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", signature)
        lines += ["", f"## {name}", "", "```", f"{name}{signature}", "", inspect.getdoc(item) or "", "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    pages = {
        "commands.md": commands_page(),
        "formats.md": formats_page(),
        "python.md": python_page(),
        "recipes.md": recipes_page(),
    }
    stale = [name for name, text in pages.items() if not (PAGES / name).exists() or (PAGES / name).read_text() != text]
    if "--check" in sys.argv:
        for name in stale:
            print(f"docs/reference/{name} is not what the code says; run `make docs`")
        return 1 if stale else 0
    PAGES.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (PAGES / name).write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The root of the commands and the commands: their help as plain text in panels, and mistakes as JSON where asked for.

Help is written without colours and without markup, so that it is the same in a terminal, in a log and for everyone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pocketquant.cli import screen
from pocketquant.errors import PocketquantError

_CommandLineError: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
"""What every mistake in a command line is; typer gives it no name of its own."""

OTHER = "More commands"
"""Panel of the commands that only `help --all` lists."""

_WITH = "With "
_MAIN = "Options"
_MORE = "More options"


class Command(TyperCommand):
    """A command whose options are shown in panels; options of a mode are refused without it."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        arguments = [_spelled(each, ctx) for each in self.params if each.param_type_name == "argument"]
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(arguments)
        for panel, options in panels_of(self, self.get_params(ctx)):
            with formatter.section(panel):
                formatter.write_dl([_spelled(each, ctx) for each in options])

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        if not ctx.resilient_parsing:
            _refuse_empty(args)
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            for panel, options in panels_of(self, self.params):
                if panel.startswith(_WITH) and not ctx.params[_name_of(panel)]:
                    refuse_given(ctx, {each.name for each in options}, f"is used only with {panel.removeprefix(_WITH)}")
        return rest


class Commands(TyperGroup):
    """A group of commands; the outermost one ends the process with the exit code, unless the caller wants to go on."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        screen.set_command([*ctx.command_path.split()[1:], str(name)])
        return name, command, rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if ctx.parent is None:
            formatter.write(f"Usage: {ctx.command_path} COMMAND [OPTIONS]\n{self.help}\n")
            formatter.write(list_commands(self, with_others=False))
            formatter.write("`pocketquant help COMMAND` explains a command, `help --all` lists all of them.\n")
        else:
            super().format_help(ctx, formatter)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        if not options.get("standalone_mode", True):
            return super().main(args, *rest, **options)
        words = list(sys.argv[1:] if args is None else args)
        options["standalone_mode"] = False
        as_json = "--json" in words
        try:
            code = super().main(words, *rest, **options)
        except _CommandLineError as error:
            error.show()
            if as_json:
                screen.print_json_error(error.format_message(), "UsageError", error.exit_code)
            sys.exit(error.exit_code)
        except PocketquantError as error:
            if as_json:
                screen.print_json_error(str(error), type(error).__name__, 2)
            raise
        sys.exit(code if isinstance(code, int) else 0)


def list_commands(root: Any, *, with_others: bool) -> str:
    """The commands in their panels, a line each, in the order of the work."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for name, command in root.commands.items():
        if with_others or not command.hidden:
            panels.setdefault(command.rich_help_panel or OTHER, []).append((name, command.get_short_help_str(200)))
    lines = []
    for panel, entries in panels.items():
        width = max(9, *(len(name) for name, _ in entries))
        lines += [panel, *(f"  {name:{width}}  {text}" for name, text in entries)]
    return "".join(f"{line}\n" for line in lines)


def panels_of(command: Any, parameters: Iterable[Any]) -> list[tuple[str, list[Any]]]:
    """The options that are shown, by panel: those without one first, "Advanced" last."""
    modes = {parameter.name for parameter in command.params if not parameter.required}
    panels: dict[str, list[Any]] = {_MAIN: []}
    for parameter in parameters:
        if parameter.param_type_name == "argument" or parameter.hidden:
            continue
        panel = getattr(parameter, "rich_help_panel", None) or _MAIN
        if panel.startswith(_WITH) and _name_of(panel) not in modes:  # a command that is nothing but this mode
            panel = _MORE
        panels.setdefault(panel, []).append(parameter)
    order = sorted(panels, key=lambda panel: (panel == "Advanced", panel != _MAIN))
    return [(panel, panels[panel]) for panel in order if panels[panel]]


def spellings(option: Any) -> list[str]:
    """How an option may be written; of several long names all but the first are old."""
    long = [name for name in option.opts if name.startswith("--")]
    return [name for name in option.opts if not name.startswith("--")] + long[:1]


def refuse_given(context: Any, names: Iterable[str], why: str) -> None:
    """Refuses options, by name of their parameter, that are in the command line.

    Raises:
        typer.BadParameter: one of them is.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(why, param_hint=spellings(parameter)[-1])


def _refuse_empty(words: Sequence[str]) -> None:
    """Refuses words with nothing in them, which would be taken for an option that was not given, or for this folder.

    Raises:
        typer.BadParameter: there is one; most often a variable of the shell that is not set.
    """
    for before, word in zip(("", *words), words, strict=False):
        name = before if not word else word.removesuffix("=")
        if not word or (word.startswith("--") and word.endswith("=")):
            place = name if name.startswith("-") else None
            raise typer.BadParameter("nothing is given; is a variable of the shell empty?", param_hint=place)


def _name_of(panel: str) -> str:
    """The parameter of the option that a panel goes with: "With --image" -> "image"."""
    return panel.removeprefix(f"{_WITH}--").replace("-", "_")


def _spelled(parameter: Any, ctx: Any) -> tuple[str, str]:
    """An option or argument as the help shows it: how it is written, and what it does."""
    _, text = parameter.get_help_record(ctx)
    text = re.sub(r"([\d.e-]+)<=x<=([\d.e-]+)", r"\1 to \2", text)
    text = re.sub(r"x>=([\d.e-]+)", r"at least \1", text)
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper(), text
    written = ", ".join(spellings(parameter))
    return (written if parameter.is_flag else f"{written} {parameter.metavar or 'N'}"), text

"""The root of the commands: knows which one runs, and says what was wrong in JSON where JSON was asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from pocketquant.cli import screen
from pocketquant.errors import PocketquantError

_CommandLineError: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
"""What every mistake in a command line is; typer gives it no name of its own."""


class Commands(TyperGroup):
    """A group of commands; the outermost one ends the process with the exit code, unless the caller wants to go on."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        screen.set_command([*ctx.command_path.split()[1:], str(name)])
        return name, command, rest

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

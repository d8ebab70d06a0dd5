"""`help` and `version`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pocketquant.cli.group import list_commands
from pocketquant.cli.options import option


def show_help(
    command_line: typer.Context,
    command: Annotated[list[str] | None, typer.Argument(metavar="COMMAND", help="Command to explain.")] = None,
    all_commands: Annotated[bool, option("--all", "", "List every command, not only the first screen.")] = False,
) -> None:
    """Explain a command, or list the commands."""
    context: Any = command_line.parent
    if not command:
        typer.echo(_everything(context) if all_commands else context.get_help().rstrip())
        return
    if all_commands:
        raise typer.BadParameter("lists the commands; leave out the one to explain", param_hint="--all")
    for name in command:
        if not hasattr(context.command, "commands"):
            raise typer.BadParameter(f"{context.command_path!r} has no commands of its own", param_hint="COMMAND")
        name, found, _ = context.command.resolve_command(context, [name])
        context = type(context)(found, info_name=name, parent=context)
    typer.echo(context.get_help().rstrip())


def _everything(root: Any) -> str:
    """Every command, and the options that stand before a command."""
    formatter = root.make_formatter()
    with formatter.section("Options"):
        options = [(", ".join(each.opts), each.help) for each in root.command.get_params(root)]
        formatter.write_dl([*options, ("--debug", "Do the work in one process, and show the traceback of an error.")])
    return (list_commands(root.command, with_others=True) + formatter.getvalue()).rstrip()


def version() -> None:
    """Print the version."""
    print_version(True)


def print_version(wanted: bool) -> None:
    """What --version does."""
    if wanted:
        from pocketquant import __version__

        typer.echo(f"pocketquant {__version__}")
        raise typer.Exit

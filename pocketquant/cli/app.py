"""The commands in the order of the work; what each does stands in the file of its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from pocketquant.cli.adapter import adapter
from pocketquant.cli.calibrate import calibrate
from pocketquant.cli.check import check
from pocketquant.cli.compare import compare
from pocketquant.cli.convert import convert
from pocketquant.cli.doctor import doctor
from pocketquant.cli.eval import eval
from pocketquant.cli.eval_vision import eval_vision
from pocketquant.cli.fit import fit
from pocketquant.cli.gate import gate
from pocketquant.cli.group import OTHER, Command, Commands
from pocketquant.cli.help import print_version, show_help, version
from pocketquant.cli.imatrix import imatrix
from pocketquant.cli.inspect import inspect
from pocketquant.cli.make import demo, make
from pocketquant.cli.options import spread
from pocketquant.cli.quantize import quantize
from pocketquant.cli.recipe import recipe_app
from pocketquant.cli.reference import reference
from pocketquant.cli.report import report
from pocketquant.cli.sensitivity import sensitivity
from pocketquant.cli.smoke import smoke
from pocketquant.cli.split import join, split
from pocketquant.cli.sweep import sweep
from pocketquant.cli.tasks import tasks
from pocketquant.cli.tune import tune
from pocketquant.cli.weights import weights

PANELS: dict[str, dict[str, Callable[..., None] | typer.Typer]] = {
    "Make a file": {"make": make, "quantize": quantize, "convert": convert, "demo": demo},
    "Prepare": {"imatrix": imatrix, "calibrate": calibrate, "reference": reference, "recipe": recipe_app},
    "Measure": {"eval": eval, "compare": compare, "gate": gate, "check": check},
    "Ship": {"report": report, "inspect": inspect, "split": split, "doctor": doctor},
    OTHER: {
        "fit": fit,
        "tune": tune,
        "sweep": sweep,
        "tasks": tasks,
        "smoke": smoke,
        "eval-vision": eval_vision,
        "weights": weights,
        "sensitivity": sensitivity,
        "adapter": adapter,
        "join": join,
        "help": show_help,
        "version": version,
    },
}
"""The first screen, and what only `help --all` lists."""

app = typer.Typer(
    cls=Commands,
    help="Turn Qwen3.5 checkpoints into small GGUF files, and measure what was lost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # [absolute] in a help text is a word, no markup
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _panel, _commands in PANELS.items():
    for _name, _command in _commands.items():
        if isinstance(_command, typer.Typer):
            app.add_typer(_command, name=_name, rich_help_panel=_panel)
        else:
            app.command(_name, cls=Command, rich_help_panel=_panel, hidden=_panel == OTHER)(spread(_command))


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass

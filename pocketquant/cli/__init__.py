"""The command line: `pocketquant COMMAND`. stdout is data, stderr is talk.

Exit codes: 0 fine, 1 a gate failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

from pocketquant.cli.app import app
from pocketquant.cli.screen import print_error
from pocketquant.errors import PocketquantError, listing
from pocketquant.interrupts import files_in_place

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

__all__ = ["main"]

_UNCHANGED = "interrupted; nothing was replaced"


class Interrupted(BaseException):
    """SIGINT or SIGTERM. Not KeyboardInterrupt, which Typer would turn into a silent exit of its own."""


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise Interrupted


def _raise_again(unraisable: UnraisableHookArgs) -> None:
    """An interrupt that arrives inside a callback of llama.cpp is lost there; raise it again a moment later."""
    if not isinstance(unraisable.exc_value, Interrupted):
        sys.__unraisablehook__(unraisable)
        return
    timer = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
    timer.daemon = True
    timer.start()


def main() -> None:
    """Entry point of the `pocketquant` command."""
    # A model's half a million tokens and merges stay to the end: looking through them for garbage takes half a second
    gc.set_threshold(200_000, 50, 50)
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    sys.unraisablehook = _raise_again
    try:
        app(args=arguments, prog_name="pocketquant")
    except PocketquantError as error:
        if debug:
            raise
        print_error(str(error))
        raise SystemExit(2) from None
    except Interrupted:
        done = files_in_place()
        print_error(f"interrupted after these were finished:\n{listing(map(str, done))}" if done else _UNCHANGED)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of stdout went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None

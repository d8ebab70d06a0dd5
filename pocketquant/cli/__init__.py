"""The command line: `pocketquant COMMAND`. stdout is data, stderr is talk.

Exit codes: 0 fine, 1 a gate failed, 2 bad input or a machine that cannot do it, 70 a fault of pocketquant itself, 130
interrupted, 141 nobody reads stdout any more. With --debug the work is done in this process and errors keep their
tracebacks.
"""

from __future__ import annotations

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler and sys.argv[0].endswith(
    ("pocketquant", "pocketquant.exe", "pocketquant/__main__.py")
):
    # until there is a handler, Ctrl-C ends the command as it ends others, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import atexit
import gc
import json
import os
import shutil
import tempfile
import threading
import time
import warnings
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from pocketquant.activity import note_end
from pocketquant.cli import streams, watching
from pocketquant.errors import PocketquantError, PocketquantWarning, listing
from pocketquant.escaping import note_name

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

__all__ = ["Interrupted", "main"]

_SAME_SECONDS = 1.0
"""Two signals within this time are one: a terminal sends it to both processes, and the watcher hands it on."""

_UNCHANGED = "interrupted; nothing was replaced"
_IMPORT_SECONDS = 5.0
"""How long an interrupt waits for the end of an import that it came in; a second or less on a machine at rest."""

_interrupted_at: float | None = None
_interrupted_by = signal.SIGINT.value
_waiting_since: float | None = None


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP. Not KeyboardInterrupt, which Typer would turn into a silent exit of its own."""


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    """Interrupts the work; a second signal ends the process at once, and the watcher tidies up.

    Libraries take what is raised in an import for something that is missing, and some go on without it.
    """
    global _interrupted_at, _interrupted_by, _waiting_since
    now, _interrupted_by = time.monotonic(), signal_number
    if _interrupted_at is None and _is_importing(frame):
        _waiting_since = _waiting_since or now
        if now - _waiting_since < _IMPORT_SECONDS:
            _raise_soon()
            return
    if _interrupted_at is None:
        _interrupted_at = now
        raise Interrupted
    if now - _interrupted_at > _SAME_SECONDS:
        watching.end_now(128 + signal.SIGINT)


def _raise_again(unraisable: UnraisableHookArgs) -> None:
    """An interrupt that arrives inside a callback or a finalizer is lost there; raise it again a moment later."""
    global _interrupted_at
    if not isinstance(unraisable.exc_value, Interrupted):
        sys.__unraisablehook__(unraisable)
        return
    _interrupted_at = None
    _raise_soon()


def _raise_soon() -> None:
    """The signal that came, not another in its place: a shell has what it starts with `&` ignore SIGINT.

    It goes to the main thread, which it wakes where that sleeps or waits.
    """
    timer = threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, _interrupted_by])
    timer.daemon = True
    timer.start()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def main() -> None:
    """Entry point of the `pocketquant` command."""
    started = time.monotonic()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    is_debug = len(arguments) < len(sys.argv) - 1
    for argument in arguments:
        note_name(argument)
    if not is_debug:
        _become_child()
    streams.open_streams()
    try:
        code = _run(arguments, is_debug)
        _ignore_interrupts()
    except Interrupted:  # the work is done, and what is left would be cut in two
        _ignore_interrupts()
        code = _say_interrupted(is_json="--json" in arguments)
    code = streams.finish(code, started)
    note_end()
    raise SystemExit(code)


def _become_child() -> None:
    try:
        watching.stay_child()
    except (OSError, RuntimeError) as error:  # too few files or processes; nothing more can be imported, perhaps
        sys.stderr.write(f"error: no process can be started here ({error}); raise this one's limits: ulimit -n, -u\n")
        os._exit(2)


def _ignore_interrupts() -> None:
    """At the end, when Python itself would meet them without a handler."""
    for number in watching.HANDED_ON:
        signal.signal(number, signal.SIG_IGN)


def _run(arguments: list[str], is_debug: bool) -> int:
    try:
        for number in watching.HANDED_ON:
            signal.signal(number, _interrupt)
        watching.listen()
        sys.unraisablehook = _raise_again
        warnings.showwarning = _note_unless(bool({"-q", "--quiet"} & set(arguments)))
        _keep_kernels_somewhere()
        # A model's half a million tokens and merges stay to the end: looking for garbage there takes half a second
        gc.set_threshold(200_000, 50, 50)
        from pocketquant.cli.app import app

        app(args=arguments, prog_name="pocketquant")
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Interrupted:
        return _say_interrupted(is_json="--json" in arguments)
    except Exception as error:
        if is_debug:
            raise
        if _interrupted_at is not None:  # a library made something else of the interrupt
            return _say_interrupted(is_json="--json" in arguments)
        return _say_error(error, is_json="--json" in arguments)


def _keep_kernels_somewhere() -> None:
    """Gives numba a folder for this run where it could keep compiled kernels nowhere, which it takes for a fault.

    It keeps them beside the package or in the user's cache. A folder in a shared place that lasts would do too, but
    what is kept there is unpickled, so it must be nobody else's.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    package = os.path.dirname(os.path.dirname(__file__))
    if "NUMBA_CACHE_DIR" in os.environ or os.access(package, os.W_OK) or _can_be_written(home):
        return
    folder = tempfile.mkdtemp(prefix="pocketquant-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["NUMBA_CACHE_DIR"] = folder


def _can_be_written(folder: str) -> bool:
    while not os.path.exists(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    return os.access(folder, os.W_OK)


def _say_interrupted(*, is_json: bool) -> int:
    from pocketquant.files.interrupts import files_in_place, how_to_go_on

    done = files_in_place()
    way = how_to_go_on(is_done=bool(done))
    said = f"interrupted after these were finished:\n{listing(map(str, done))}" if done else _UNCHANGED
    return _say("\n".join(filter(None, [said, way])), "Interrupted", 128 + signal.SIGINT, is_json=is_json)


def _say_error(error: Exception, *, is_json: bool) -> int:
    from pocketquant import failures

    if isinstance(error, PocketquantError):  # a document, where one was asked for, was printed already
        note = failures.note_on_limits(error)
        return _say(f"{error}\n{note}" if note else str(error), "", 2, is_json=False)
    message, code = failures.describe(error)
    return _say(message, type(error).__name__, code, is_json=is_json)


def _say(message: str, kind: str, code: int, *, is_json: bool) -> int:
    try:
        from pocketquant.cli.screen import print_error, print_json_error

        print_error(message)
        if is_json:
            print_json_error(message, kind, code)
    except Exception:  # what shows errors is broken itself, or has no file descriptor left to be loaded with
        print(f"error: {message}", file=sys.stderr)
        if is_json:
            print(json.dumps(watching.error_document(message, kind, code)))
    return code


def _note_unless(is_quiet: bool):  # type: ignore[no-untyped-def]
    """What shows warnings: ours as a line of talk, others as Python does."""
    as_usual = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        name: str,
        line: int,
        file: TextIO | None = None,
        text: str | None = None,
    ) -> None:
        if not issubclass(category, PocketquantWarning):
            as_usual(message, category, name, line, file, text)
        elif not is_quiet:
            from pocketquant.cli.screen import say

            say(f"note: {message}", quiet=False)

    return show

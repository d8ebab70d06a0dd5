"""Does a command's work in a child process, so that the parent can say what happened when native code dies.

The parent imports nothing, hands signals on, and takes over the child's exit code. If the child is ended by a signal
that it did not handle, the parent says what the child was doing (`pocketquant.activity`), what happened and what to do,
and removes the temporary files that the child could not. Where a process cannot be copied (Windows) the work is done in
the process itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from pocketquant import __version__
from pocketquant.activity import LastSeen, last_seen, note_end, share
from pocketquant.files.interrupts import ENDING, STARTS_ANEW

HANDED_ON = tuple(number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN)
"""What asks a run to end, but for what whoever started it has it ignore, as `nohup` does."""

BROKEN = 2
"""Exit code for a child that native code ended: as for input that cannot be worked with, never a gate's 1."""


def stay_child() -> None:
    """Copies the process and returns in the child; the parent ends here, with the child's exit code."""
    if not hasattr(os, "fork"):
        return
    share()
    alive, kept = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)  # until both know what to do with them
    pid = os.fork()
    if pid == 0:
        os.close(kept)
        for number in HANDED_ON:  # one that waits is delivered as soon as the command line has its own handler
            signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=_die_with_parent, args=(alive,), name="parent", daemon=True).start()
        return
    os.close(alive)

    def hand_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)

    for number in HANDED_ON:
        signal.signal(number, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    seen = last_seen()
    _tidy(seen)
    os._exit(code if seen.has_ended else _tell(code, seen))


def _tidy(seen: LastSeen) -> None:
    """Removes what the child made for a time and could not remove itself."""
    held, locks = list(filter(Path.exists, seen.held)), list(filter(Path.exists, seen.locks))
    if held or locks:
        from pocketquant.files.leftovers import (
            remove_unheld,  # only now: after a command that ends well there is nothing
        )

        for path in held:
            remove_unheld(path)
        for path in locks:
            remove_unheld(path, with_folder=False)


def listen() -> None:
    """Lets signals through that came while the child was being made."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)


def end_now(code: int) -> None:
    """Ends this process without any tidying, which is left to the watcher."""
    note_end()
    os._exit(code)


def _die_with_parent(alive: int) -> None:
    """The parent's end of the pipe closes when it ends, however it ends; nobody would hear of this process any more."""
    os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def _tell(code: int, seen: LastSeen) -> int:
    """Says what ended the child, which did not come to its end; gives the exit code.

    Args:
        code: the child's exit code, or minus the number of a signal. Native code may call exit() itself.
        seen: what the child left behind.
    """
    number = max(-code, 0)
    if number in HANDED_ON or number == signal.SIGPIPE:
        return 128 + number
    try:
        name = signal.Signals(number).name if number else f"native code, which ended the process with code {code}"
    except ValueError:
        name = f"signal {number}"
    from pocketquant.escaping import one_line  # only now: the watcher of a command that ends well imports nothing

    lines = [f"error: stopped by {name}{_meaning(number, seen.last_words)}"]
    if seen.doing:
        lines[0] += f", while {one_line(seen.doing)}"
    if seen.last_words:
        lines.append(f"  it said: {one_line(seen.last_words)}")
    lines.append(f"  {_advice(number, seen)}")
    if seen.placed:
        lines.append(f"  these were finished before: {one_line(', '.join(map(str, seen.placed)))}")
    else:
        lines.append("  nothing was replaced")
    ways_on = [how for place, how in seen.ways_on if place.exists()]
    lines.append(f"  {one_line(ways_on[0]) if ways_on else STARTS_ANEW}")
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        print("\n".join(lines), file=sys.stderr, flush=True)
    if "--json" in sys.argv:
        with contextlib.suppress(OSError, AttributeError):
            print(json.dumps(error_document("\n".join(lines), "Crash", BROKEN)), flush=True)
    return BROKEN


def error_document(message: str, kind: str, exit_code: int) -> dict[str, object]:
    """What --json prints of an error where the modules that print documents are not to be had."""
    error = {"kind": kind, "message": message, "exit_code": exit_code}
    return {"schema": "pocketquant.error/1", "version": __version__, "error": error}


def _meaning(number: int, last_words: str) -> str:
    if number == signal.SIGABRT:
        return " (native code gave up)" if last_words else " (native code gave up; most often memory ran out)"
    meanings = {
        signal.SIGILL: "an instruction that this processor does not have, or is not set up for",
        signal.SIGSEGV: "a fault in native code",
        signal.SIGBUS: "a file that became shorter while it was read, or a full disk behind one",
        signal.SIGFPE: "an arithmetic fault in native code",
        signal.SIGKILL: "from outside; most often the system does this when memory runs out",
    }
    return f" ({meanings[number]})" if number in meanings else ""  # type: ignore[index]


def _advice(number: int, seen: LastSeen) -> str:
    if number == signal.SIGILL:
        return (
            "run `pocketquant doctor --renew`, which tries llama.cpp's kernels on this machine and chooses what runs; "
            "if it does not help, build the library here: "
            "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
        )
    from pocketquant.failures import note_on_memory

    if number in (0, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS) and (note := note_on_memory()):
        return note
    is_memory = not seen.last_words or re.search("mem|alloc", seen.last_words)
    if number == signal.SIGKILL or (number == signal.SIGABRT and is_memory):
        return (
            "`pocketquant doctor` shows the memory that is free; use a smaller --context, fewer --threads or a smaller "
            "file"
        )
    return "run `pocketquant check` on the file named; if it finds nothing, `pocketquant doctor` on this machine"

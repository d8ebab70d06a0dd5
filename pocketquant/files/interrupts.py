"""What an interrupt may not cut in two, what was already in place when one came, and how to go on after one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pocketquant.activity import note_placed, note_ways_on
from pocketquant.errors import OutputError, listing

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a run to end."""

_placed: dict[Path, None] = {}  # in the order in which they came
_ways_on: dict[object, tuple[Path, str]] = {}  # of the blocks of `resumable` that run, the outermost first
_resuming: list[str] = []

STARTS_ANEW = "nothing of this run is kept; the same command starts it anew"
"""What to tell whoever interrupted a run that cannot be resumed, or has nothing yet to be resumed from."""


def offer_resume(how: str) -> None:
    """Notes that what is done so far is kept, and how to go on from there; called while an interrupt passes."""
    _resuming[:] = [how]


def how_to_go_on(*, is_done: bool = False) -> str:
    """What to tell whoever interrupted the run: a sentence on what is kept and how to go on, or `STARTS_ANEW`.

    Where `is_done`, results are in their place, and there is nothing to say unless more is kept.
    """
    return _resuming[0] if _resuming else "" if is_done else STARTS_ANEW


@contextmanager
def resumable(place: Path, how: str) -> Iterator[Callable[[str], None]]:
    """Says how to go on from a run that an interrupt, a crash or a kill ends within the block.

    Args:
        place: what unfinished work is kept in; nothing is said unless it is there then.
        how: the sentence. Of blocks within one another, the outermost one's counts.

    Returns:
        A function that puts another sentence in its place, one that knows how much is kept.
    """
    block = object()

    def say(how: str) -> None:
        _ways_on[block] = (place, how)
        note_ways_on(list(_ways_on.values()))

    say(how)
    try:
        yield say
    except BaseException:
        if place.exists():
            offer_resume(_ways_on[block][1])
        raise
    finally:
        del _ways_on[block]
        note_ways_on(list(_ways_on.values()))


def put_in_place(moves: Iterable[tuple[Path, Path]], *, is_result: bool = True) -> None:
    """Renames finished files to their final names; the signals of `ENDING` wait until all of them are there.

    Args:
        moves: temporary and final path of each, on one file system.
        is_result: whether `files_in_place` names them; False for what only a resumed run needs.

    Raises:
        OutputError: the system refused a rename; says which files were renamed before it.
    """
    done: list[str] = []
    with signals_held():
        for temporary, target in moves:
            try:
                os.replace(temporary, target)
            except OSError as error:
                before = f"; these were replaced before:\n{listing(done)}" if done else ""
                raise OutputError(f"{target}: cannot be written: {error.strerror}{before}") from error
            if is_result:
                _placed[target] = None
                note_placed(target)
            done.append(str(target))


def files_in_place() -> list[Path]:
    """What this process has put in place so far and not removed again, oldest first."""
    return [path for path in _placed if path.exists()]


@contextmanager
def signals_held() -> Iterator[None]:
    """Holds the signals of `ENDING` back while the block runs, and delivers one of them afterwards.

    Python runs signal handlers in the main thread only, so that in any other there is nothing to hold back. Blocking
    the signals by a mask would not do: a mask is one thread's, and the system would hand them to another one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    with ExitStack() as stack:
        stack.callback(lambda: signal.raise_signal(held[0]) if held else None)
        for number in ENDING:
            handler = signal.getsignal(number)
            # None: not installed from Python, and could not be put back; one that is ignored stays so
            if handler is not None and handler is not signal.SIG_IGN:
                stack.callback(signal.signal, number, handler)
                signal.signal(number, lambda number, frame: held.append(number))
        yield

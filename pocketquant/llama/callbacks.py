"""Calls from llama.cpp into Python: no exception of a callback is lost, and an interrupt ends a computation at once.

Without help, two things would go wrong. ctypes prints an exception of a callback and goes on. And Python runs signal
handlers between bytecodes of the main thread; while llama.cpp computes, only callbacks have bytecodes, so an interrupt
is lost in one of them, or waits for the end of the batch if there is none. So signals are held back while C computes
(`calling`), the exceptions of callbacks are kept (`Callback`), and both are raised when C has returned. llama.cpp's
abort callback makes it return soon: it reads a flag before each node of the graph. A thread sets the flag as soon as
Python's C code has written the number of a signal to its wakeup descriptor.

Source: `signal.set_wakeup_fd`; ggml/src/ggml-cpu/ggml-cpu.c of llama.cpp (b10359), `ggml_graph_compute_thread`, which
asks in the thread that called; on a GPU nothing is asked, and an interrupt waits for the end of the batch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pocketquant.files.interrupts import ENDING, signals_held

_flag = ctypes.create_string_buffer(b"0")
"""The flag of the abort callback: "0" to go on, "1" to stop."""

_watcher: int | None = None  # the descriptor that numbers of signals are written to


class Callback:
    """A Python function for C to call.

    Attributes:
        pointer: the C function. It must live as long as C may call it.
    """

    def __init__(self, kind: Callable[..., Any], function: Callable[..., Any], otherwise: Any) -> None:
        """`kind` is the type of the C function; `otherwise` is answered once the Python function has failed."""
        self._failure: BaseException | None = None

        def call(*arguments: Any) -> Any:
            if self._failure is not None:
                return otherwise
            try:
                return function(*arguments)
            except BaseException as error:
                self._failure = error
                return otherwise

        self.pointer: Any = kind(call)

    def take_failure(self) -> BaseException | None:
        """The exception that the function raised since the last call of this."""
        failure, self._failure = self._failure, None
        return failure


@contextmanager
def calling(*callbacks: Callback) -> Iterator[None]:
    """Wraps a call of C that takes long or calls back, and raises afterwards what happened during it.

    An interrupt comes first, then the exception of a callback. If another thread's interrupt ended the computation,
    nothing is raised here; C reports that it was aborted.
    """
    for callback in callbacks:
        callback.take_failure()
    if threading.current_thread() is threading.main_thread():
        _flag[0] = b"0"  # of an interrupt that was raised already: handlers run before anything else here does
    with signals_held():
        yield
    for callback in callbacks:
        if failure := callback.take_failure():
            raise failure


def is_stopping() -> bool:
    """Whether a signal that ends computations has come."""
    return bool(_flag[0] == b"1")


def abort_function(library: Any) -> tuple[Any, Any]:
    """llama.cpp's abort callback and its data.

    It is called thousands of times a batch and must not wait for Python's lock, so it is a function of C: `atoi` reads
    the flag as a number.
    """
    libc = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
    watch_signals()
    return ctypes.cast(libc.atoi, library.ggml_abort_callback), ctypes.addressof(_flag)


def load_progress(library: Any) -> Callback:
    """llama.cpp's callback while it loads a model; it ends the loading after an interrupt."""
    watch_signals()
    return Callback(library.llama_progress_callback, lambda done, data: not is_stopping(), False)


def watch_signals() -> None:
    """From now on the signals of `ENDING` set the flag, unless the program watches signals in this way itself.

    Only the main thread can start this; a call from another thread changes nothing.
    """
    global _watcher
    if threading.current_thread() is not threading.main_thread():
        return
    if _watcher is None:
        reader, _watcher = os.pipe()
        os.set_blocking(_watcher, False)
        threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    before = signal.set_wakeup_fd(_watcher, warn_on_full_buffer=False)
    if before not in (-1, _watcher):
        signal.set_wakeup_fd(before)


def _watch(reader: int) -> None:
    while numbers := os.read(reader, 64):
        if set(ENDING) & set(numbers):
            _flag[0] = b"1"


def _forget() -> None:
    """In a child after a fork: it has no such thread, and its signals would wake its parent's."""
    global _watcher
    if _watcher is not None:
        signal.set_wakeup_fd(-1)
        _watcher = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

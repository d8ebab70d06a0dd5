"""Interrupts and errors while llama.cpp computes: none is lost in a callback, and the computation ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from pocketquant.errors import EvalError
from pocketquant.llama import callbacks
from pocketquant.llama.observing import InputSums, Observer
from pocketquant.llama.runtime import open_runtime

CONTEXT = 256
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")


class Stopped(BaseException):
    """What the handlers in these tests raise."""


@pytest.fixture
def stopping() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Stopped`, as the command's handlers raise an exception of theirs."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """A signal's number may still be on its way to the thread that waits for it when a test is over."""
    yield
    time.sleep(0.2)
    with callbacks.calling():
        pass


class Nodes:
    """Counts the nodes of a graph, and does something at one of them."""

    def __init__(self, at: int, what: Callable[[], None]) -> None:
        self.count, self._at, self._what = 0, at, what

    def see(self, address: int, ask: bool) -> bool:
        self.count += not ask
        if not ask and self.count == self._at:
            self._what()
        return True


def run_window(model: Path, observe: Callable[[int, bool], bool] | None = None) -> None:
    with open_runtime(model, context=CONTEXT, threads=1, observe=observe) as runtime:
        for _ in runtime.logits(list(range(1, CONTEXT + 1)), first=CONTEXT - 1):
            pass


def count_nodes(model: Path) -> int:
    nodes = Nodes(0, lambda: None)
    run_window(model, nodes.see)
    return nodes.count


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_what_a_callback_raises_ends_the_run_and_is_raised(
    error: type[BaseException], demo_gguf: Callable[[str], Path]
) -> None:
    def fail() -> None:
        raise error

    nodes = Nodes(10, fail)
    with pytest.raises(error):
        run_window(demo_gguf("f32"), nodes.see)
    assert nodes.count == 10


@posix_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_a_callback_is_raised_and_ends_the_run(
    number: signal.Signals, demo_gguf: Callable[[str], Path], stopping: None
) -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 10
        while not callbacks.is_stopping() and time.monotonic() < deadline:  # the thread that sets the flag
            time.sleep(0.001)

    whole, nodes = count_nodes(demo_gguf("f32")), Nodes(10, interrupt)
    with pytest.raises(Stopped, match=number.name):
        run_window(demo_gguf("f32"), nodes.see)
    assert nodes.count < 20 < whole


@posix_only
def test_a_signal_ends_a_computation_without_callbacks(demo_gguf: Callable[[str], Path], stopping: None) -> None:
    model = demo_gguf("f32")
    with open_runtime(model, context=4096, threads=1) as runtime:
        tokens = [1 + i % 500 for i in range(4096)]
        started = time.monotonic()
        for _ in runtime.logits(tokens[:512], first=511):
            pass
        batch_seconds = time.monotonic() - started
        threading.Timer(0.3 * batch_seconds, os.kill, [os.getpid(), signal.SIGINT]).start()
        with pytest.raises(Stopped):
            for _ in runtime.logits(tokens, first=4095):
                pass
        assert next(runtime.logits(tokens[:32], first=31))[1].shape[0] == 1, "it goes on afterwards"


@posix_only
def test_a_handler_that_raises_nothing_makes_no_wrong_numbers(demo_gguf: Callable[[str], Path]) -> None:
    """A batch that was cut short is never taken for a whole one, whatever the program does with its signals."""
    before = signal.signal(signal.SIGINT, lambda number, frame: None)

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 10
        while not callbacks.is_stopping() and time.monotonic() < deadline:
            time.sleep(0.001)

    try:
        with pytest.raises(EvalError, match="a signal stopped it"):
            run_window(demo_gguf("f32"), Nodes(10, interrupt).see)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_of_a_fold_is_raised_by_the_window_that_met_it(demo_gguf: Callable[[str], Path]) -> None:
    class Failing(InputSums):
        def add(self, product: object) -> None:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        run_window(demo_gguf("f32"), Observer(Failing()).see)


@posix_only
def test_a_program_that_watches_signals_itself_goes_on_doing_so(demo_gguf: Callable[[str], Path]) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        run_window(demo_gguf("f32"))
        assert signal.set_wakeup_fd(writer, warn_on_full_buffer=False) == writer
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)

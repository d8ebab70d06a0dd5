"""Standard output and error as a long run needs them: what they cannot take is kept, and stops nothing.

A result goes to stdout after hours of work, and the disk behind stdout may be full, its reader gone, its encoding
unable to write a name. So a failed write raises nothing: all text is kept until the end, when `finish` says in a file
of its own what could not be written. Talk on stderr is simply lost where it cannot be written.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

CLOSED_PIPE = 141
"""128 + SIGPIPE: what a shell reports of a program whose reader went away."""

_KEPT_CHARACTERS = 64 << 20
_WORTH_KEEPING_SECONDS = 10.0
"""A reader that went away, as `head` does, has what it wanted; what took longer than this is kept all the same."""


class Stream(io.TextIOWrapper):
    """A text stream that remembers instead of raising.

    Attributes:
        failure: the first error of a write; None as long as all went well.
        text: what was written to it, as far as it is kept.
    """

    def __init__(self, binary: Any, encoding: str, *, is_kept: bool) -> None:
        super().__init__(binary, encoding=encoding, errors="backslashreplace", write_through=not is_kept)
        self.failure: OSError | None = None
        self.text: list[str] = []
        self._room = _KEPT_CHARACTERS if is_kept else 0

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # what is not sure whether this is a stream of text tries it with bytes
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if self._room > 0:
            self.text.append(text)
            self._room -= len(text)
        if self.failure is None:
            try:
                return super().write(text)
            except OSError as error:
                self.failure = error
        return len(text)

    def flush(self) -> None:
        if self.failure is None:
            try:
                super().flush()
            except OSError as error:
                self.failure = error


def open_streams() -> None:
    """Puts `Stream`s in place of stdout and stderr, and something behind each that is closed.

    A closed one would otherwise lend its number to the next file that is opened, and native code would print into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # a device that cannot be written to, so that what is printed is known to be lost
            os.dup2(os.open(os.devnull, os.O_RDONLY), number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream: TextIO | None = getattr(sys, name)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            stream.detach() if isinstance(stream, io.TextIOWrapper) else None
        is_kept = number == 1 and not os.isatty(number)
        binary = open(number, "wb", closefd=False)  # noqa: SIM115 - for as long as the process lives
        setattr(sys, name, Stream(binary, encoding, is_kept=is_kept))


def finish(code: int, started: float) -> int:
    """Flushes stdout; where it failed, keeps what was written in a file and says so.

    Args:
        code: exit code of the command itself.
        started: `time.monotonic()` when it began.

    Returns:
        The exit code: 141 for a reader that went away, 2 for any other failure.
    """
    stream = sys.stdout
    if not isinstance(stream, Stream):
        return code
    stream.flush()
    if stream.failure is None or not stream.text:
        return code
    is_pipe = stream.failure.errno == errno.EPIPE
    if not is_pipe or time.monotonic() - started > _WORTH_KEEPING_SECONDS:
        kept = keep_elsewhere("".join(stream.text))
        where = f"the result is kept in {kept}" if kept else "nor could the result be kept in a file"
        print(f"error: stdout: cannot be written ({stream.failure.strerror}); {where}", file=sys.stderr, flush=True)
    # at the end Python flushes what the stream still holds, and would fail again
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code if code not in (0, 1) else CLOSED_PIPE if is_pipe else 2


def keep_elsewhere(text: str) -> Path | None:
    """Writes a result that cannot be written where it was to go; None where nothing can be written at all."""
    suffix = ".json" if text.lstrip()[:1] in ("{", "[") else ".txt"
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        name = None
        try:
            descriptor, name = tempfile.mkstemp(prefix="pocketquant-result-", suffix=suffix, dir=folder)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return Path(name)
        except OSError:
            if name is not None:
                Path(name).unlink(missing_ok=True)
    return None

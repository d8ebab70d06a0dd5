"""The buffers of llama.cpp that weights lie in, read from its log; they decide which kernels multiply the weights.

Source: `llama_model_base::load_tensors` in src/llama-model.cpp of llama.cpp (b10359) for the line; ggml/src/ggml-cpu
for what keeps weights in a layout of its own (`AMX`, `CPU_REPACK`).
"""

from __future__ import annotations

import re

_LINE = re.compile(rb"load_tensors: +(\S{1,64}) model buffer size = ")
_PLAIN = {"CPU_Mapped": "CPU"}  # the same kernels, whether a file is mapped or read


class BufferNames:
    """Collects names from lines of the log."""

    def __init__(self) -> None:
        self._found: set[str] = set()

    def read(self, line: bytes) -> None:
        """Takes a line of the log, of any kind."""
        if match := _LINE.search(line):
            name = match[1].decode(errors="replace")
            self._found.add(_PLAIN.get(name, name))

    def clear(self) -> None:
        """Forgets what was found."""
        self._found.clear()

    def found(self) -> list[str]:
        """Names so far, sorted: AMX, CPU, CPU_REPACK, CUDA0."""
        return sorted(self._found)

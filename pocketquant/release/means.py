"""What a job is done with: threads, progress bars, a cluster."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from pocketquant.gguf_file.writing import Run

ByteBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
StepBar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class Bars:
    """Progress bars, given by whoever has a screen.

    Attributes:
        bytes: called with a label and the bytes in all; gives, for as long as the bar is shown, what is called with the
            bytes that were just done.
        steps: called with a label; gives what is called with the steps done and the steps in all.
    """

    bytes: ByteBar = lambda label, total: nullcontext(lambda nbytes: None)
    steps: StepBar = lambda label: nullcontext(lambda done, total: None)


@dataclass(frozen=True)
class Means:
    """What the work is done with.

    Attributes:
        threads: for encoding and evaluation; None for all that this process may use.
        gpu_layers: for the evaluation.
        bars: progress bars.
        run: who encodes, instead of threads here: `pocketquant.cluster.open_cluster` gives one.
    """

    threads: int | None = None
    gpu_layers: int = 0
    bars: Bars = Bars()
    run: Run | None = None

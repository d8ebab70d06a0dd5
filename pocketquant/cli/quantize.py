"""`quantize`: a source in, a small GGUF out."""

from __future__ import annotations

from pocketquant.cli.choice import Deciding
from pocketquant.cli.options import Out, Source, Talk
from pocketquant.cli.planning import Opened, Written, encode


def quantize(
    source: Source, *, out: Out = None, deciding: Deciding, opened: Opened, written: Written, talk: Talk
) -> None:
    """Quantize a checkpoint in one pass, or a full-precision GGUF."""
    encode(source, out, deciding, opened, written, talk)

"""Finds out what a source is and opens it."""

from __future__ import annotations

from pathlib import Path

from pocketquant.convert.checkpoint import open_checkpoint
from pocketquant.gguf_file import open_gguf
from pocketquant.model import Model


def open_model(source: Path | str) -> Model:
    """Opens a GGUF file or a checkpoint folder; reads no weights.

    Raises:
        SourceError, ArchitectureError, TokenizerError: see `open_gguf` and `open_checkpoint`.
    """
    path = Path(source)
    return open_gguf(path) if path.is_file() else open_checkpoint(path)

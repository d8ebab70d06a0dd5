"""A GGUF as a source: what a checkpoint's config has to fulfil, its metadata has to, too.

`open_gguf` checks names and sizes, as looking at a file needs them. A file that is to be written anew must also load
and compute the right thing: what llama.cpp asks for is there, what it would compute with is within reason. The
architecture's table says what that is, and which keys that other tools leave out can be made good, with a note.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pocketquant.architectures import architecture_named
from pocketquant.errors import ArchitectureError, listing
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.model import Model


def open_gguf_source(path: Path | str) -> Model:
    """Opens a GGUF to make another file of it.

    Raises:
        SourceError, ArchitectureError: as `open_gguf`; and metadata that no runtime could use (all of it listed).
    """
    model = open_gguf(path)
    architecture = architecture_named(model.architecture)
    if completed := architecture.complete(model.metadata):
        metadata = {**model.metadata, **{key: value for key, (value, _) in completed.items()}}
        notes = (f"{key}: {note}" for key, (_, note) in completed.items())
        model = replace(model, metadata=metadata, notes=(*model.notes, *notes))
    problems = list(architecture.find_problems(model.metadata))
    if problems:
        raise ArchitectureError(
            f"{path}: metadata that llama.cpp does not load or computes nonsense with; take the checkpoint, or a file "
            f"that `check` finds nothing wrong with:\n{listing(problems)}"
        )
    return model

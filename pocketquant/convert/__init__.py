"""A source -> `Model`: a checkpoint, local or on a hub, or a GGUF file."""

from pocketquant.convert.checkpoint import open_checkpoint
from pocketquant.convert.sources import open_model

__all__ = ["open_checkpoint", "open_model"]

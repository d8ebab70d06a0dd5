"""The model and the texts that come with the package, so that everything can be tried without a download.

A trained Qwen3.5 hybrid of 3.8 million weights in Hugging Face's layout, a text to calibrate on (part of what the
model was trained on) and a text to evaluate on (held out). How they were made: docs/explain/embedded-model.md.
"""

from __future__ import annotations

from pathlib import Path

from pocketquant.errors import SourceError

TEXTS = ("calibration", "evaluation")
_HERE = Path(__file__).parent


def checkpoint_dir() -> Path:
    """The folder of the embedded checkpoint: config, weights in BF16, tokenizer, chat template, model card."""
    return _HERE / "checkpoint"


def text_path(name: str) -> Path:
    """The embedded text of that name: "calibration" or "evaluation": UTF-8, NFC, <|endoftext|> between documents.

    Raises:
        SourceError: there is no such text.
    """
    if name not in TEXTS:
        raise SourceError(f"no embedded text is called {name!r}; there are: {', '.join(TEXTS)}")
    return _HERE / "text" / f"{name}.txt"


__all__ = ["TEXTS", "checkpoint_dir", "text_path"]

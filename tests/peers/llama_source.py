"""Where the interpreter of the oracles keeps llama.cpp's converter; `tools/get_converter.py` puts it there."""

import sys
from pathlib import Path

ROOT = Path(sys.prefix) / "llama.cpp"


def use_converter() -> None:
    """Makes its modules importable, before any gguf that is installed."""
    sys.path[:0] = [str(ROOT), str(ROOT / "gguf-py")]

"""`pocketquant eval` with the llama.cpp of another program instead of the binding's own build.

    LLAMA_CPP_LIB_PATH=FOLDER python eval_with_library.py GGUF --reference GGUF ...

With one library under both, their numbers differ only by what the two programs do with the logits. The library may be
older than the binding: functions that it lacks, none of which evaluation calls, become another one of it.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_find = ctypes.CDLL.__getattr__


def _find_or_replace(library: ctypes.CDLL, name: str) -> Any:
    try:
        return _find(library, name)
    except AttributeError:
        if not name.startswith(("llama_", "ggml_", "mtmd_")):
            raise
        return _find(library, "llama_backend_init" if name.startswith("llama_") else "ggml_time_us")


ctypes.CDLL.__getattr__ = _find_or_replace  # type: ignore[method-assign]

if __name__ == "__main__":
    from pocketquant.cli import main

    sys.argv = ["pocketquant", "eval", *sys.argv[1:]]
    main()

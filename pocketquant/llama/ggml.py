"""Functions of ggml that the binding does not name."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from pocketquant.errors import EvalError


def ggml_function(library: Any, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A function of the very library that computes, looked up through llama.cpp's, which depends on it.

    Args:
        library: `llama_cpp`.
        name: of the C function.
        result: its ctypes type, None for nothing.
        arguments: theirs.

    Raises:
        EvalError: the installed library does not show it.
    """
    try:
        return ctypes.CFUNCTYPE(result, *arguments)((name, library.llama_cpp._lib))
    except AttributeError as error:
        raise EvalError(
            f"the installed llama-cpp-python has no {name}; install the version that pocketquant asks for"
        ) from error

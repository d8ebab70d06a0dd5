"""Compiles the kernels: no GIL, cached on disk, IEEE division.

Numba dates a cached kernel by its own source file only, so a change in a file that the kernel calls into would leave
the old code running. Ours are dated by the digest of every source file of this folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import njit

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _digest_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_SOURCES = _digest_sources()


def jit(function: _Function) -> _Function:
    """Compiles a kernel when it is first called; where no folder can hold the cache, every process compiles anew.

    Division by zero follows IEEE, because candidate scales may divide by zero.
    """
    try:
        kernel = njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba's way to say that neither the package nor the user's cache folder is writable
        return njit(nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]
    kernel._cache._cache_file._source_stamp = _SOURCES
    return kernel  # type: ignore[no-any-return]

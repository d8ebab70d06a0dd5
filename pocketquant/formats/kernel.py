"""Compiles the kernels: no GIL, cached on disk, IEEE division.

Numba compares a cached kernel with its own source file only, so a change in a file that the kernel calls into would
leave the old code running. Here a cached kernel is used only if no source file of this folder has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from numba import njit

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _import_without_scipy() -> None:
    """Imports the part of numba that, where scipy is installed, would import that for a third of a second.

    numba only wants to know whether it may take BLAS for some products of vectors, which no kernel has.
    """
    from numba.np import linalg

    def say_absent() -> None:
        raise ImportError

    ensure_blas = linalg.ensure_blas
    linalg.ensure_blas = say_absent
    try:
        import numba.np.arraymath  # noqa: F401
    finally:
        linalg.ensure_blas = ensure_blas


with suppress(ImportError, AttributeError):  # another numba may be built differently
    _import_without_scipy()


def dated_jit(*folders: Path) -> Callable[[_Function], _Function]:
    """A `jit` that compiles a cached kernel anew when any source file of `folders` has changed."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    sources = digest.hexdigest()

    def compile_dated(function: _Function) -> _Function:
        try:
            kernel = njit(nogil=True, cache=True, error_model="numpy")(function)
        except RuntimeError:  # numba's way to say that neither the package nor the user's cache folder is writable
            return njit(nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]
        kernel._cache._cache_file._source_stamp = sources
        return kernel  # type: ignore[no-any-return]

    return compile_dated


_compile = dated_jit(Path(__file__).parent)


def jit(function: _Function) -> _Function:
    """Compiles a kernel when it is first called; where no folder can hold the cache, every process compiles anew.

    Division by zero follows IEEE, because candidate scales may divide by zero.
    """
    return _compile(function)

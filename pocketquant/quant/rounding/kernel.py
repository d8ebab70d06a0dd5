"""Compiles this folder's kernels as `formats.kernel` does its own; their caches date by the sources of both folders."""

from __future__ import annotations

from pathlib import Path

from pocketquant.formats import kernel

jit = kernel.dated_jit(Path(kernel.__file__).parent, Path(__file__).parent)

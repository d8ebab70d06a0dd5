"""What this machine can do with pocketquant: software, processor, llama.cpp's kernels, memory, disk, extras.

Each part is tried, not only looked up, where trying is cheap. A needed part that fails makes the whole examination
fail; one that is optional is a remark with its remedy. An installation may be damaged anywhere, so whatever is needed
to look at a part is imported there, and what that raises is what was found.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pocketquant import __version__
from pocketquant.activity import doing
from pocketquant.errors import PocketquantError
from pocketquant.extras import install_command
from pocketquant.failures import broken_package, describe, distribution_of, reinstalling

OK, REMARK, FAILED = "ok", "remark", "fail"

_EXTRAS = {
    "eval": ("llama_cpp", "runs and measures GGUF files"),
    "cluster": ("distributed", "encodes on the workers of a Dask cluster"),
    "tasks": ("lm_eval", "answers benchmark questions"),
    "curvature": ("torch", "gradients, tuning, a checkpoint as the reference"),
}
"""Extra of the package -> a module that it brings, what it is for."""

NEEDED = ("numpy", "numba", "gguf", "tokenizers", "huggingface_hub", "jinja2", "yaml", "platformdirs", "rich", "typer")
"""Modules that the package cannot do without."""

_LITTLE_MEMORY = 2 << 30
_LITTLE_DISK = 1 << 30


@dataclass(frozen=True)
class Part:
    """One part that was looked at.

    Attributes:
        name: what it is, in a word or two.
        status: `OK`, `REMARK` or `FAILED`.
        found: what was found.
        remedy: what to do; "" where nothing is to be done.
    """

    name: str
    status: str
    found: str
    remedy: str = ""


def examine(*, renew: bool = False) -> list[Part]:
    """Looks at every part.

    Args:
        renew: try llama.cpp's kernels again instead of believing what an earlier trial found.
    """
    looks: dict[str, Callable[[], Iterator[Part]]] = {
        "pocketquant": _software,
        "packages": _packages,
        "processor": _processor,
        "own kernels": _own_kernels,
        "llama.cpp": lambda: _llama_kernels(renew),
        "memory": _memory,
        "disk": _disk,
        "cache": _cache,
        "extras": _extras,
    }
    return [part for name, look in looks.items() for part in _looked_at(name, look)]


def is_fit(parts: list[Part]) -> bool:
    """Whether every needed part works."""
    return all(part.status != FAILED for part in parts)


def _looked_at(name: str, look: Callable[[], Iterator[Part]]) -> Iterator[Part]:
    """The parts that are found; what looking raises is a part that fails."""
    try:
        yield from look()
    except Exception as error:  # whatever an installation can be broken by
        found, _, remedy = describe(error)[0].partition("; ")
        yield Part(name, FAILED, found, remedy)


def _software() -> Iterator[Part]:
    yield Part("pocketquant", OK, f"{__version__}, Python {platform.python_version()}, {platform.platform()}")


def _packages() -> Iterator[Part]:
    """Imports every package that is needed."""
    names = {module: distribution_of(module) for module in NEEDED} | {"": "llama-cpp-python"}
    versions = [f"{name} {_version(name) or 'not installed'}" for name in names.values()]
    yield Part("packages", OK, ", ".join(versions))
    for module, name in names.items():
        try:
            if module:
                with doing(f"the package {name} was being imported"):
                    importlib.import_module(module)
        except Exception as error:
            found, _, remedy = describe(error)[0].partition("; ")
            yield Part(f"package {name}", FAILED, found, remedy or reinstalling(name))


def _version(name: str) -> str:
    try:
        return metadata.version(name) or ""
    except Exception:  # not installed, or what says so is damaged
        return ""


def _processor() -> Iterator[Part]:
    from pocketquant.llama import trial
    from pocketquant.machine import usable_threads

    lines = trial.processor().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    yield Part("processor", OK, f"{model or platform.machine()}, {usable_threads()} threads for this process")
    compiler = os.environ.get("CXX") or "c++"
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=10)
        yield Part("compiler", OK, (done.stdout.splitlines() or [""])[0])
    except (OSError, subprocess.TimeoutExpired):
        remedy = "needed only to build llama-cpp-python: install a C++ compiler (Debian: apt install g++)"
        yield Part("compiler", REMARK, f"no {compiler}", remedy)


def _own_kernels() -> Iterator[Part]:
    """Encodes and decodes a row, which compiles or loads a kernel."""
    try:
        import numpy as np

        from pocketquant.formats import FORMATS

        row = np.linspace(-1, 1, 256, dtype=np.float32)[None]
        back = FORMATS["Q8_0"].decode(FORMATS["Q8_0"].encode(row), 256)
        is_right = bool(np.abs(back - row).max() < 0.01)
        found = "a row encoded and decoded" if is_right else "a row came back wrong"
        yield Part("own kernels", OK if is_right else FAILED, found, "" if is_right else _REINSTALL_NUMBA)
    except Exception as error:  # whatever an installation can be broken by
        remedy = reinstalling(package) if (package := broken_package(error)) else _REINSTALL_NUMBA
        yield Part("own kernels", FAILED, f"{type(error).__name__}: {str(error)[:200]}", remedy)


_REINSTALL_NUMBA = "pip install --force-reinstall numba numpy"


def _llama_kernels(renew: bool) -> Iterator[Part]:
    from pocketquant.llama import trial

    if not trial.library_files():
        yield Part("llama.cpp", REMARK, "not installed", f"to run and measure files: {install_command('eval')}")
        return
    found = trial.renew() if renew else trial.remembered() or trial.renew()
    rebuild = "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
    if not found.runs:
        yield Part("llama.cpp", FAILED, f"does not run here: {found.reason}", f"build it on this machine: {rebuild}")
        return
    kernels = ", ".join(found.kernels) or "plain"
    if found.use_extra:
        yield Part("llama.cpp", OK, f"kernels tried in a process of their own: {kernels}")
    else:
        remedy = f"models are run without them; if they are of AMX, a newer compiler mends it: {rebuild}"
        yield Part("llama.cpp", REMARK, f"extra kernels fail: {found.reason}", remedy)
    try:
        from pocketquant.llama.library import require_runtime
        from pocketquant.llama.runtime import library_versions

        library = require_runtime()
        yield Part("llama.cpp features", OK, library_versions(library)["llama_cpp_features"])
        has_gpu = bool(library.llama_supports_gpu_offload())
        yield Part("llama.cpp GPU", OK, "this build can use one (--gpu-layers)" if has_gpu else "this build uses none")
    except PocketquantError as error:
        yield Part("llama.cpp features", FAILED, str(error).splitlines()[0], f"build it on this machine: {rebuild}")


def _memory() -> Iterator[Part]:
    total, free = _memory_bytes()
    if total is None:
        yield Part("memory", OK, "not known on this system")
        return
    is_little = free is not None and free < _LITTLE_MEMORY
    found = f"{total / 1e9:.1f} GB" + ("" if free is None else f", {free / 1e9:.1f} GB of it free")
    remedy = "close other programs; converting needs little, running a model needs its size" if is_little else ""
    yield Part("memory", REMARK if is_little else OK, found, remedy)


def _memory_bytes() -> tuple[int | None, int | None]:
    """Total and available memory; None for what the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file.read(1 << 16).splitlines() if ":" in line)
        return int(lines["MemTotal"].split()[0]) << 10, int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, ValueError, KeyError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (AttributeError, ValueError, OSError):
        return None, None


def _disk() -> Iterator[Part]:
    for name, folder in (("disk, here", Path.cwd()), ("disk, temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        status, remedy = (REMARK, "free some, or work in another folder") if free < _LITTLE_DISK else (OK, "")
        if not os.access(folder, os.W_OK):
            status, remedy = REMARK, "name outputs in a folder that you may write to"
        yield Part(name, status, f"{free / 1e9:.1f} GB free in {folder}", remedy)


def _cache() -> Iterator[Part]:
    from pocketquant.llama import trial

    path = trial.cache_folder()
    try:
        path.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(path, os.W_OK)
    except OSError:
        is_writable = False
    remedy = "" if is_writable else "kernels are tried again at every start; set XDG_CACHE_HOME to a folder of yours"
    yield Part("cache", OK if is_writable else REMARK, f"{path}{'' if is_writable else ' cannot be written'}", remedy)


def _extras() -> Iterator[Part]:
    for extra, (module, purpose) in _EXTRAS.items():
        is_there = module in sys.modules or importlib.util.find_spec(module) is not None
        remedy = "" if is_there else install_command(extra)
        yield Part(
            f"extra {extra}", OK if is_there else REMARK, f"{'' if is_there else 'not installed: '}{purpose}", remedy
        )

"""Whether llama.cpp's kernels run on this machine: tried once in a process of their own, then remembered.

llama.cpp keeps some weights in special layouts and multiplies them by special kernels (AMX, `CPU_REPACK`). If the
compiler or the processor does not suit them, a signal ends the process, or the numbers are wrong. A child process
(`pocketquant.llama.trying`) runs tiny models with these kernels and without them. If it dies, or if the numbers differ,
models are run without these kernels (`use_extra_bufts`). If even the plain kernels die, no model is run. The result is
kept in the user's cache under a digest of the library and the processor, so a new build or another machine is tried
again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from pocketquant.errors import EvalError, PocketquantWarning
from pocketquant.files.reading import sha256_of

VERSION = 1
"""The version of the trial; with another number, every machine is tried again."""

LARGEST_DIFFERENCE = 0.05
"""The most relative RMS difference of a node: a slightly different rounding of inputs gives 0.01, garbage gives 1."""

_COMMAND = (sys.executable, "-m", "pocketquant.llama.trying")
_SECONDS = 120.0
_MAX_RECORD_BYTES = 1 << 16
_FAULTS = ("SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE")
"""Signals that the code causes, and not the state of the machine, so that they will come again."""


@dataclass(frozen=True)
class Trial:
    """The result of the trial.

    Attributes:
        runs: whether llama.cpp runs at all.
        use_extra: whether its extra kernels may be used.
        kernels: the buffers whose kernels were tried, such as AMX and CPU_REPACK.
        reason: what went wrong; "" if nothing did.
        is_lasting: whether the result would be the same next time.
    """

    runs: bool
    use_extra: bool
    kernels: tuple[str, ...] = ()
    reason: str = ""
    is_lasting: bool = True


@functools.cache
def trusted() -> Trial:
    """The kernels that may be used on this machine; they are tried now if they never were.

    Raises:
        EvalError: llama-cpp-python dies on this machine with any kernels.
    """
    trial = remembered() or renew()
    if not trial.runs:
        raise EvalError(
            f"the installed llama-cpp-python does not run on this machine ({trial.reason}); build it here: "
            "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
        )
    if not trial.use_extra:
        warnings.warn(
            f"llama.cpp's extra kernels fail on this machine ({trial.reason}), so models are run without them; "
            "`pocketquant doctor` says more",
            PocketquantWarning,
            stacklevel=2,
        )
    return trial


def renew(command: Sequence[str] = _COMMAND) -> Trial:
    """Tries the kernels now and remembers the result; a cache that cannot be written is ignored."""
    trial = _try(command)
    if trial.is_lasting and (path := record_path()) is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(asdict(trial)), encoding="utf-8")
            temporary.replace(path)
    return trial


def remembered() -> Trial | None:
    """The result of an earlier trial of the same library on the same processor; None if there was none."""
    path = record_path()
    try:
        if path is None or path.stat().st_size > _MAX_RECORD_BYTES:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        kernels = tuple(str(name) for name in found["kernels"])
        return Trial(found["runs"] is True, found["use_extra"] is True, kernels, str(found["reason"])[:500])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def record_path() -> Path | None:
    """The file of the result; None if there is no library to try."""
    libraries = library_files()
    if not libraries:
        return None
    digest = hashlib.sha256(f"{VERSION}\n{processor()}\n".encode())
    for path in libraries:
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return cache_folder() / f"kernels-{digest.hexdigest()[:24]}.json"


def cache_folder() -> Path:
    """The user's cache of pocketquant."""
    return user_cache_path("pocketquant", appauthor=False)


def library_files() -> list[Path]:
    """The shared libraries of the installed llama-cpp-python, found without importing it."""
    try:
        spec = importlib.util.find_spec("llama_cpp")
    except (ImportError, ValueError):
        return []
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / "lib"
    return sorted(path for path in folder.glob("*") if path.suffix in (".so", ".dylib", ".dll") and path.is_file())


def processor() -> str:
    """Model and features of the processor, in words that differ wherever its kernels could."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = file.read(1 << 16).splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _try(command: Sequence[str]) -> Trial:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
        code, output, said = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        code, output, said = 1, error.stdout or b"", b"no answer within two minutes"
    except OSError as error:
        return Trial(True, False, (), f"the trial could not be started: {error.strerror}", is_lasting=False)
    stages = _stages(output)
    kernels = tuple(sorted({str(name) for stage in stages for name in stage.get("kernels", ())}))
    for stage in stages:
        if stage["stage"] == "extra" and not stage["difference"] <= LARGEST_DIFFERENCE:
            what = f"{', '.join(kernels)}: {stage['where']} differs by {stage['difference']:.2g} from plain kernels"
            return Trial(True, False, kernels, what)
    if code == 0:
        return Trial(True, True, kernels)
    reason, is_lasting = _reason(code, said)
    last = stages[-1]["stage"] if stages else ""
    # died with the extra kernels, after the plain ones had run
    return Trial(last == "plain" or not is_lasting, False, kernels, reason, is_lasting)


def _stages(output: bytes) -> list[dict[str, Any]]:
    stages = []
    for line in output.splitlines():
        try:
            stage = json.loads(line)
        except ValueError:
            continue
        if isinstance(stage, dict) and "stage" in stage:
            stages.append(stage)
    return stages


def _reason(code: int, said: bytes) -> tuple[str, bool]:
    """The reason why the trial ended, and whether it would end so again."""
    words = said.decode(errors="replace").strip().splitlines()
    last = f": {words[-1][:200]}" if words else ""
    if code >= 0:
        return f"the trial ended with code {code}{last}", False
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"{name} in a trial run", name in _FAULTS

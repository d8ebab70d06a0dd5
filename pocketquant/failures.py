"""What an exception that nobody expected says: of the machine, of an installed package, or a fault of ours.

Where memory or open files run out, libraries fail in ways of their own: numpy takes it for a bad installation, numba
for a fault of Python, the loader says that it cannot map a file. So the limits of this process are looked at, too.
"""

from __future__ import annotations

import errno
import re
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from pocketquant.escaping import one_line

FAULT = 70
"""EX_SOFTWARE of sysexits.h: a fault of pocketquant itself."""

ENOUGH_MEMORY = 2 << 30
"""Bytes of address space that numpy, numba and llama.cpp are sure to start in; a limit below explains odd failures."""

_OF_MEMORY = re.compile(r"cannot allocate|failed to map|out of memory|memory allocation|MemoryError|bad_alloc", re.I)
_OF_THREADS = re.compile(r"can't start new thread", re.I)
_INSTALLED_AS = {"yaml": "pyyaml", "llama_cpp": "llama-cpp-python", "lm_eval": "lm-eval"}
_WORDS = 200


def describe(error: Exception) -> tuple[str, int]:
    """A message and the exit code for an exception that is no `PocketquantError`."""
    if of_memory := _describe_memory(error):
        return f"memory ran out{of_memory}", 2
    if note := note_on_limits(error):
        return f"{_words(error)}; {note}", 2
    if package := broken_package(error):
        name = "pocketquant" if package == "pocketquant" else f"the package {package}"
        return f"{name} is missing or damaged ({_words(error)}); {reinstalling(package)}", 2
    if isinstance(error, OSError):
        place = f"{name}: " if (name := error.filename) else ""
        return f"{place}{error.strerror or error}; `pocketquant doctor` examines this machine", 2
    return (
        f"a fault of pocketquant itself, please report it: {type(error).__name__}: {str(error)[:_WORDS]}\n"
        "the same command with --debug shows where",
        FAULT,
    )


def note_on_limits(error: BaseException) -> str:
    """What to do about a limit of this process that an error comes from; "" where it comes from none."""
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno in (errno.EMFILE, errno.ENFILE):
            return f"this process may have no more than {_limit('RLIMIT_NOFILE')} files open; raise it: ulimit -n 1024"
        if isinstance(each, RuntimeError) and _OF_THREADS.search(str(each)):
            return (
                f"this user may have no more than {_limit('RLIMIT_NPROC')} threads; use fewer --threads, or raise it: "
                "ulimit -u"
            )
    return ""


def note_on_memory() -> str:
    """What to do about a limit of this process's memory that is too low to start in; "" where there is none."""
    limit = _limit("RLIMIT_AS")
    if limit is None or limit >= ENOUGH_MEMORY:
        return ""
    return (
        f"this process may have no more than {limit >> 20} MiB of address space, and {ENOUGH_MEMORY >> 20} are sure to "
        f"be enough to start in; raise it: ulimit -v {ENOUGH_MEMORY >> 10}"
    )


def broken_package(error: BaseException) -> str | None:
    """The installed package that could not be imported; "pocketquant" if nothing says which, None if none was."""
    is_import = False
    for each in _chain(error):
        if isinstance(each, ImportError):
            is_import = True
            top = (each.name or "").split(".")[0]
            if top and top != "pocketquant":
                return distribution_of(top)
        if found := _module_that_failed(each):
            return distribution_of(found)
    return "pocketquant" if is_import else None


def reinstalling(package: str) -> str:
    """The command that mends a package."""
    return f"pip install --force-reinstall {package}"


def _describe_memory(error: BaseException) -> str | None:
    """What follows "memory ran out" if it did, else None."""
    note = note_on_memory()
    chain = list(_chain(error))
    ran_out = any(
        isinstance(each, MemoryError)
        or (isinstance(each, OSError) and each.errno == errno.ENOMEM)
        or (isinstance(each, ImportError | OSError | SystemError) and _OF_MEMORY.search(str(each)))
        for each in chain
    )
    # numba's and llvmlite's words do not tell
    is_odd = any(isinstance(each, SystemError) or _cannot_load(each) for each in chain)
    if not ran_out and not (note and is_odd):
        return None
    return f"; {note}" if note else "; `pocketquant doctor` shows how much is free, --threads 1 needs least"


def _cannot_load(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno is None and "shared object" in str(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it came from."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _module_that_failed(error: BaseException) -> str | None:
    """The top-level name of the installed module whose own code was being run when it was imported."""
    found = [error.filename] if isinstance(error, SyntaxError) and error.filename else []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_name == "<module>":
            found.insert(1 if isinstance(error, SyntaxError) else 0, code.co_filename)
        trace = trace.tb_next
    return next((top for name in found if (top := _top_of(name))), None)


def _top_of(file: str) -> str | None:
    """yaml of .../site-packages/yaml/reader.py; None for files of Python itself and of this package."""
    path = Path(file)
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}:
        if folder and path.is_relative_to(folder) and not path.is_relative_to(Path(__file__).parent):
            top = path.relative_to(folder).parts[0].removesuffix(".py")
            if folder != sysconfig.get_path("stdlib") and top.isidentifier() and top not in sys.stdlib_module_names:
                return top
    return None


def distribution_of(module: str) -> str:
    """What a top-level module is installed as: pyyaml for yaml."""
    if module in _INSTALLED_AS:
        return _INSTALLED_AS[module]
    with suppress(Exception):  # the very files that say so may be damaged
        return metadata.packages_distributions()[module][0]
    return module.replace("_", "-")


def _words(error: BaseException) -> str:
    """What an exception says, as a part of a line: numpy's says the cause after pages of advice."""
    text = str(error).split("Original error was:")[-1].strip() or type(error).__name__
    return one_line(text.splitlines()[0][:_WORDS])


def _limit(name: str) -> int | None:
    """A limit of this process, None if there is none or the system knows of none."""
    with suppress(ImportError, AttributeError, OSError):
        import resource

        found = resource.getrlimit(getattr(resource, name))[0]
        return None if found == resource.RLIM_INFINITY else found
    return None

"""Installed packages: their versions, and what to install where a part is missing, by the names that an index knows."""

from __future__ import annotations

import platform
import re
from importlib import metadata

_OWN = "pocketquant"
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[([^\]]*)\])?\s*([^;]*)(?:;.*extra\s*==\s*['\"]([^'\"]+)['\"])?")


def install_command(extra: str) -> str:
    """The pip command that brings what an extra of this package asks for, wherever the package itself came from."""
    try:
        requirements = metadata.requires(_OWN) or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return f"pip install '.[{extra}]' in the checkout"
    packages = dict.fromkeys(_packages_of(extra, requirements))
    return f"pip install {' '.join(repr(package) for package in packages)}"


def _packages_of(extra: str, requirements: list[str]) -> list[str]:
    found = []
    for requirement in requirements:
        match = _REQUIREMENT.match(requirement)
        if match is None or match[4] != extra:
            continue
        name, extras, version = match[1], match[2] or "", match[3].strip()
        if name == _OWN:
            found += [package for other in extras.split(",") for package in _packages_of(other.strip(), requirements)]
        else:
            found.append(f"{name}[{extras}]{version}" if extras else f"{name}{version}")
    return found


def list_versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on, besides the runtime's own."""
    return {"python": platform.python_version()} | {name: _version(name) for name in ("pocketquant", "numpy", "numba")}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from a source tree
        return "not installed"

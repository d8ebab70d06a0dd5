"""The tables. A new architecture is one file of rows and its name in `ARCHITECTURES` (docs/add-an-architecture.md)."""

from __future__ import annotations

from pocketquant.architectures.qwen35 import QWEN35
from pocketquant.architectures.qwen35_vision import QWEN35_VISION
from pocketquant.architectures.qwen35moe import QWEN35MOE
from pocketquant.architectures.table import Architecture
from pocketquant.errors import ArchitectureError

ARCHITECTURES: tuple[Architecture, ...] = (QWEN35, QWEN35MOE, QWEN35_VISION)


def find_architecture(name: str) -> Architecture | None:
    """The table for GGUF's `general.architecture`; None if there is none."""
    return next((architecture for architecture in ARCHITECTURES if architecture.name == name), None)


def architecture_named(name: str) -> Architecture:
    """The table for GGUF's `general.architecture`; ArchitectureError if there is none."""
    if (found := find_architecture(name)) is not None:
        return found
    known = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise ArchitectureError(f"architecture {name!r} is not supported; supported are {known}")


def architecture_of_class(class_name: str) -> Architecture:
    """The table for a name in config.json's `architectures`; ArchitectureError if there is none."""
    for architecture in ARCHITECTURES:
        if class_name in architecture.classes:
            return architecture
    known = ", ".join(name for architecture in ARCHITECTURES for name in architecture.classes)
    raise ArchitectureError(f"config.json: model class {class_name!r} is not supported; supported are {known}")

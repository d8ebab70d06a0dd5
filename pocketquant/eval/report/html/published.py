"""What others measured of the same family: `published.toml`, whose head names the source."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FILE = Path(__file__).parents[1] / "published.toml"


@dataclass(frozen=True)
class PublishedPoint:
    """A whole model in one type."""

    format: str
    bits_per_weight: float
    kld: float


@dataclass(frozen=True)
class PublishedModel:
    """One model's points, by bits per weight."""

    name: str
    points: tuple[PublishedPoint, ...]


@dataclass(frozen=True)
class Published:
    """All of them, and where they are from."""

    source: str
    models: tuple[PublishedModel, ...]


def read_published() -> Published:
    """The figures that come with the package."""
    table = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    bits = table["bits_per_weight"]
    return Published(
        table["source"],
        tuple(
            PublishedModel(
                name,
                tuple(sorted((PublishedPoint(key, bits[key], kld) for key, kld in figures.items()), key=_place)),
            )
            for name, figures in table["models"].items()
        ),
    )


def _place(point: PublishedPoint) -> tuple[float, float]:
    return point.bits_per_weight, point.kld

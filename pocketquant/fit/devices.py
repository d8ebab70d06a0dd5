"""What files are made for: memory, bandwidth and types of phones, laptops and browsers, each figure with its source."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pocketquant.errors import RecipeError
from pocketquant.files.small import read_toml
from pocketquant.fit.weights import REPACKED_ROWS
from pocketquant.formats import FORMATS

_FILE = Path(__file__).with_name("devices.toml")
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Figure:
    """A number, and where it comes from: an address, with the day it was read or published, or what it rests on."""

    value: float
    source: str
    date: str
    is_estimate: bool

    def __str__(self) -> str:
        return f"estimate: {self.source}" if self.is_estimate else f"{self.source}, {self.date}"


@dataclass(frozen=True)
class Device:
    """Something that a file is to run on.

    Attributes:
        memory: bytes that one program may use.
        bandwidth: bytes a second, at the memory's peak; None where nothing is known.
        backend: what computes; "cpu" is the one whose buffers are computed exactly.
        cpu: a key of `REPACKED_ROWS`.
        slow, refused: types without kernels of their own, and without any.
        limits: others, in words.
    """

    name: str
    title: str
    backend: str
    cpu: str
    memory: Figure
    bandwidth: Figure | None = None
    slow: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()

    @property
    def slow_types(self) -> frozenset[str]:
        """Types that run slower than others there: for ARM and Hexagon those without kernels made for them."""
        kernels = self.cpu if self.cpu == "arm" else self.backend
        if kernels in ("arm", "hexagon"):
            return frozenset(name for name, kind in FORMATS.items() if kernels not in kind.fast_on and name != "F32")
        return frozenset(self.slow)


@cache
def devices() -> dict[str, Device]:
    """All devices by name, from `devices.toml`."""
    return {name: _device(name, entry) for name, entry in _table().items() if name != "speed"}


def device_named(name: str) -> Device:
    """One of them.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in devices():
        raise RecipeError(f"{name}: no known device; there are {', '.join(devices())}, or give --memory")
    return devices()[name]


def bandwidth_shares() -> tuple[Figure, Figure]:
    """The least and the largest share of the peak bandwidth that generating tokens was seen to reach."""
    speed = _table()["speed"]
    return _figure(speed["least"]), _figure(speed["most"])


@cache
def _table() -> dict[str, Any]:
    return read_toml(_FILE, _MOST_BYTES, RecipeError)


def _device(name: str, entry: dict[str, Any]) -> Device:
    bandwidth = _figure(entry["bandwidth"]) if "bandwidth" in entry else None
    slow, refused, limits = (tuple(entry.get(key, ())) for key in ("slow", "refused", "limits"))
    words = (entry["title"], entry["backend"], entry["cpu"])
    device = Device(name, *words, _figure(entry["memory"]), bandwidth, slow, refused, limits)
    unknown = ({*device.slow, *device.refused} - FORMATS.keys()) | ({device.cpu} - REPACKED_ROWS.keys())
    if unknown:
        raise RecipeError(f"{_FILE.name}: {name}: {', '.join(sorted(unknown))}: no such type or kind of CPU")
    return device


def _figure(entry: dict[str, Any]) -> Figure:
    if "estimate" in entry:
        return Figure(entry["value"], entry["estimate"], "", True)
    return Figure(entry["value"], entry["source"], entry["date"], False)

"""Whether a file fits a device, at which context, how fast it will be, and what to change if it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pocketquant.errors import RecipeError
from pocketquant.fit.devices import Device, bandwidth_shares
from pocketquant.fit.memory import CELLS, Part, Settings, kv_bytes, memory_parts, state_bytes
from pocketquant.fit.vision import Tower
from pocketquant.fit.weights import Weights

_SMALL_UBATCH, _SMALL_CONTEXT = 128, 4096
_BACKENDS_OWN = {"compute buffer", "vision buffer", "MTP compute buffer"}
_WIDE_CACHES = {"f32", "f16", "bf16"}
_LEAST_TYPES = {"delta_alpha": 8.5, "delta_beta": 8.5}
"""Roles that lose too much below so many bits per weight, at any target size."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second, estimated as bytes over bandwidth.

    Attributes:
        least, most: while tokens are generated, at the context that was asked for; from the shares of the peak
            bandwidth that others measured.
        prompt_bound: while a prompt is read, if only the memory counted: a bound that arithmetic keeps far away.
    """

    least: float
    most: float
    prompt_bound: float


@dataclass(frozen=True)
class Fit:
    """What a file takes on a device.

    Attributes:
        parts: of the memory, largest first.
        limit: bytes that may be used.
        settings: how it is run.
        longest_context: the longest context that fits with these settings; 0 if none does.
        trained_context: the longest that the model is made for.
        weight_budget: bytes of weights that would fit at this context.
        changes: what would make it fit, or fit better, each with the memory it then takes.
        warnings: what else to know: types that the device has no kernels for, other limits.
        speed: None where the bandwidth is not known.
    """

    parts: tuple[Part, ...]
    limit: int
    settings: Settings
    longest_context: int
    trained_context: int
    weight_budget: int
    changes: tuple[str, ...]
    warnings: tuple[str, ...]
    speed: Speed | None

    @property
    def total(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


@dataclass(frozen=True)
class Beside:
    """What is loaded beside the model.

    Attributes:
        tower: a vision tower.
        mtp: a multi-token-prediction block in a file of its own.
    """

    tower: Tower | None = None
    mtp: Weights | None = None


def fit(
    weights: Weights,
    settings: Settings,
    *,
    device: Device | None = None,
    limit: int | None = None,
    beside: Beside | None = None,
) -> Fit:
    """Adds up what a file takes; reads no weights.

    Args:
        weights: of the file, from `weights_of`.
        settings: how it is to be run.
        device: what it is to run on; None for a CPU that packs no weights anew.
        limit: bytes that may be used, in place of the device's.
        beside: what is loaded beside it.

    Raises:
        RecipeError: neither a device nor a limit is given, or there is nothing to draft with.
    """
    if limit is None and device is None:
        raise RecipeError("name a device or a limit of memory")
    if limit is None:
        limit = int(device.memory.value)  # type: ignore[union-attr]
    beside = beside or Beside()
    if settings.draft and beside.mtp is None and weights.trunk == weights.weights:
        raise RecipeError("nothing to draft with: the file has no multi-token-prediction block, and none is given")
    parts_at = _adder(weights, device, beside)
    parts = parts_at(settings)
    trained = weights.sizes.get("n_ctx", settings.cells)
    needed = sum(part.nbytes for part in parts)
    held = next(part.nbytes for part in parts if part.name == "weights")
    return Fit(
        parts=parts,
        limit=limit,
        settings=settings,
        longest_context=_longest(parts_at, settings, limit, trained),
        trained_context=trained,
        weight_budget=max(0, limit - needed + held),
        changes=tuple(_changes(parts_at, settings, limit, beside)) if needed > limit else (),
        warnings=tuple(_warnings(weights, settings, device)),
        speed=_speed(weights, settings, device),
    )


_PartsAt = Callable[[Settings], tuple[Part, ...]]


def _adder(weights: Weights, device: Device | None, beside: Beside) -> _PartsAt:
    is_cpu = device is None or device.backend == "cpu"
    cpu = device.cpu if device else "none"

    def parts_at(settings: Settings) -> tuple[Part, ...]:
        mtp = beside.mtp if settings.draft else None
        parts = memory_parts(weights, settings, cpu, tower=beside.tower, mtp=mtp)
        if is_cpu:
            return parts
        note = "as on a CPU; this backend's own was not checked"
        return tuple(replace(p, is_estimate=True, how=note) if p.name in _BACKENDS_OWN else p for p in parts)

    return parts_at


def _total(parts_at: _PartsAt, settings: Settings) -> int:
    return sum(part.nbytes for part in parts_at(settings))


def _longest(parts_at: _PartsAt, settings: Settings, limit: int, trained: int) -> int:
    """The most cells, in steps of 256, that fit; at most what the model is made for."""
    low, high = 0, max(trained // CELLS, 1)
    while low < high:
        middle = (low + high + 1) // 2
        if _total(parts_at, replace(settings, context=middle * CELLS)) <= limit:
            low = middle
        else:
            high = middle - 1
    return low * CELLS


def _changes(parts_at: _PartsAt, settings: Settings, limit: int, beside: Beside) -> Iterator[str]:
    """Changes of the settings, one on top of the other until the file fits, and the size that would fit otherwise."""
    steps: list[tuple[bool, str, dict[str, Any]]] = [
        (settings.draft > 0, "do not draft (--draft 0)", {"draft": 0}),
        (not settings.flash_attention, "--flash-attn", {"flash_attention": True}),
        (settings.outputs > settings.sequences, f"--outputs {settings.sequences}", {"outputs": settings.sequences}),
        (settings.ubatch > _SMALL_UBATCH, f"--ubatch-size {_SMALL_UBATCH}", {"ubatch": _SMALL_UBATCH}),
        (
            {settings.cache_type_k, settings.cache_type_v} & _WIDE_CACHES != set(),
            "--cache-type q8_0",
            {"cache_type_k": "q8_0", "cache_type_v": "q8_0"},
        ),
        (settings.context > _SMALL_CONTEXT, f"--context {_SMALL_CONTEXT}", {"context": _SMALL_CONTEXT}),
    ]
    current, total = settings, _total(parts_at, settings)
    for _, words, changed in (step for step in steps if step[0]):
        current = replace(current, **changed)
        total = _total(parts_at, current)
        yield f"{words}: then {total:,} bytes{', which fits' if total <= limit else ''}"
        if total <= limit:
            return
    if beside.tower is not None:
        parts = parts_at(current)
        total -= sum(part.nbytes for part in parts if part.name.startswith("vision"))
        yield f"leave the vision tower out: then {total:,} bytes{', which fits' if total <= limit else ''}"
        if total <= limit:
            return
    held = next(part.nbytes for part in parts_at(current) if part.name == "weights")
    budget = limit - total + held
    if budget > 0:
        yield f"with all of that, weights of at most {budget:,} bytes: `pocketquant quantize --target-size {budget}`"
    else:
        yield "a smaller model: what it needs besides its weights does not fit either"


def _warnings(weights: Weights, settings: Settings, device: Device | None) -> Iterator[str]:
    trained = weights.sizes.get("n_ctx", settings.context)
    if settings.context > trained:
        yield f"a context of {settings.context:,} is more than the {trained:,} that the model is made for"
    low = [w.name for w in weights.trunk if w.nbytes * 8 < _LEAST_TYPES.get(w.role.value, 0) * _count(w.shape)]
    if low:
        yield f"{len(low)} of ssm_alpha and ssm_beta are below Q8_0, where this family loses most: {low[0]}, ..."
    if device is None:
        return
    for types, words in ((device.refused, "no kernels on this device"), (device.slow_types, "slow on this device")):
        found = {w.type: 0 for w in weights.trunk if w.type in types and len(w.shape) > 1}
        for weight in weights.trunk:
            if weight.type in found:
                found[weight.type] += weight.nbytes
        for kind, nbytes in found.items():
            if kind not in device.refused or types is device.refused:
                yield f"{kind}, {nbytes:,} bytes of the weights: {words}"
    yield from device.limits


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _speed(weights: Weights, settings: Settings, device: Device | None) -> Speed | None:
    if device is None or device.bandwidth is None:
        return None
    one = replace(settings, sequences=1, draft=0)
    # a token reads the cache, and reads and writes the state
    caches = kv_bytes(weights, one) + 2 * state_bytes(weights, one)
    least, most = bandwidth_shares()
    token = weights.read_a_token + caches
    batch = sum(weight.nbytes for weight in weights.trunk) + caches
    peak = device.bandwidth.value
    return Speed(least.value * peak / token, most.value * peak / token, settings.ubatch * peak / batch)


__all__ = ["Beside", "Fit", "Speed", "fit"]

"""Prepared moments of this process, kept while there is room: tensors that share one mostly follow one another.

All encoders share them, those that came to a worker of a cluster in a pickle too, so what is kept is bounded however
many tensors there are. Only one moment is being prepared at a time, because that takes twice the memory of a finished
one; whoever finds its own here does not wait.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

from pocketquant.quant.rounding.prepared import Prepared

ROOM = 1 << 30
"""Bytes that are kept. A moment of 9,216 inputs takes 0.7 GB, one of 2,560 takes 50 MB."""

_kept: OrderedDict[Hashable, Prepared] = OrderedDict()
_looking, _preparing = threading.Lock(), threading.Lock()


def bytes_of(side: int) -> int:
    """What a prepared moment of so many inputs takes."""
    return 8 * side * side


def keep(key: Hashable, side: int, make: Callable[[], Prepared], room: int = ROOM) -> Prepared:
    """The prepared moment of a key, made if it is not kept.

    Args:
        key: says whose it is: of which file, tensor and expert, and how it is damped.
        side: its inputs.
        make: makes it.
        room: bytes that may be kept with it; it itself is kept even if it is larger.
    """
    found = _look(key)
    if found is not None:
        return found
    with _preparing:
        found = _look(key)  # another thread may have made it meanwhile
        if found is not None:
            return found
        with _looking:
            while _kept and sum(bytes_of(len(each.hessian)) for each in _kept.values()) + bytes_of(side) > room:
                _kept.popitem(last=False)
        made = make()
        with _looking:
            _kept[key] = made
        return made


def alone(make: Callable[[], Prepared]) -> Prepared:
    """Makes one that nobody else will ask for."""
    with _preparing:
        return make()


def _look(key: Hashable) -> Prepared | None:
    with _looking:
        if key not in _kept:
            return None
        _kept.move_to_end(key)
        return _kept[key]

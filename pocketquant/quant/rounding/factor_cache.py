"""The cache of factored Hessians: the tensors that share a Hessian mostly follow one another.

The cache belongs to the process. All encoders share it, also those that a cluster sends to a worker in a pickle, so
its memory is bounded whatever the number of tensors. One Hessian is factored at a time, because factoring takes twice
the memory of the result. A thread that finds its Hessian in the cache does not wait.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

from pocketquant.quant.rounding.factored import FactoredHessian

CACHE_BYTES = 1 << 30
"""Size of the cache. A Hessian of 9,216 inputs takes 0.7 GB factored, one of 2,560 inputs 50 MB."""

_cache: OrderedDict[Hashable, FactoredHessian] = OrderedDict()
_reading, _factoring = threading.Lock(), threading.Lock()


def factored_bytes(k: int) -> int:
    """Memory of the factored Hessian of k inputs."""
    return 8 * k * k


def cached(
    key: Hashable, k: int, make: Callable[[], FactoredHessian], cache_bytes: int = CACHE_BYTES
) -> FactoredHessian:
    """The factored Hessian of a key, from the cache or made now.

    Args:
        key: names the Hessian: its file, tensor and expert, and its damping.
        k: number of inputs.
        make: reads and factors the Hessian.
        cache_bytes: the most that the cache may hold with this Hessian; the Hessian itself is kept even if it is
            larger.
    """
    found = _look(key)
    if found is not None:
        return found
    with _factoring:
        found = _look(key)  # another thread may have made it meanwhile
        if found is not None:
            return found
        with _reading:
            while (
                _cache
                and sum(factored_bytes(len(each.matrix)) for each in _cache.values()) + factored_bytes(k) > cache_bytes
            ):
                _cache.popitem(last=False)
        made = make()
        with _reading:
            _cache[key] = made
        return made


def uncached(make: Callable[[], FactoredHessian]) -> FactoredHessian:
    """Makes a factored matrix that no other tensor will ask for."""
    with _factoring:
        return make()


def _look(key: Hashable) -> FactoredHessian | None:
    with _reading:
        if key not in _cache:
            return None
        _cache.move_to_end(key)
        return _cache[key]

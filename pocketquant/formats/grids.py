"""The codebooks of the IQ1, IQ2 and IQ3 formats, from the tables that gguf-py carries.

Each is a list of points: what the four or eight weights of a group can be together, up to a scale and signs. They were
found by search and follow no formula, so they are taken from a dependency that has them and not written down again.

Source: `gguf.quants` of gguf-py (0.17 and after), the same points as ggml/src/ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from pocketquant.formats import F32Array

_LENGTHS = {
    "IQ1_S": (2048, 8),
    "IQ2_XXS": (256, 8),
    "IQ2_XS": (512, 8),
    "IQ2_S": (1024, 8),
    "IQ3_XXS": (256, 4),
    "IQ3_S": (512, 4),
}


@cache
def codebook(name: str) -> F32Array:
    """The points of a format, f32[n_point, weights in a group]; IQ1_M shares those of IQ1_S."""
    from gguf import quants

    kind = getattr(quants, name)
    kind.init_grid()
    points = np.ascontiguousarray(kind.grid, np.float32).reshape(_LENGTHS[name])
    points.flags.writeable = False
    return points

"""How far apart two figures may be that come from different kernels of llama.cpp.

Kernels differ in how they round a product's inputs and in which order they add up: AMX, weights packed anew, AVX-512 or
not, a batch's size, flash attention. Of one file they give figures a little apart, and no text is long enough to tell
that from a better or worse file. So the distance was measured (`benchmarks/kernels_floor.py`, `docs/experiments.md`).
"""

from __future__ import annotations

FLOOR = {
    "kld_mean_ratio": 0.005,
    "kld_p99_ratio": 0.04,
    "domain_kld_mean_ratio": 0.01,
    "tv_mean_ratio": 0.0025,
    "top1_drop": 0.002,
    "top5_drop": 0.001,
    "bpb_rise": 0.0005,
}
"""Limit of [baseline] -> how far apart figures of one file on two kernels may be, some two to three times the most that
was measured: relative for ratios, absolute for the others."""


def describe_kernels(ours: str, theirs: str, other: list[str]) -> str:
    """A sentence on two figures whose kernels differ in `other`."""
    percent = 100 * FLOOR["kld_mean_ratio"]
    return (
        f"{ours} was measured by other kernels of llama.cpp than {theirs} ({', '.join(other)}): divergences less than "
        f"{percent:g} % apart mean nothing."
    )

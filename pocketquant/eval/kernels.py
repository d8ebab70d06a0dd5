"""How far apart two figures from different kernels of llama.cpp may be.

Kernels differ in how they round the inputs of a matrix product and in the order of their sums. It depends on AMX, on
repacked weights, on AVX-512, on the batch size and on flash attention. So one file has slightly different figures on
different kernels, and no text is long enough to tell that from a better or worse file. The difference was measured
(`benchmarks/kernels_floor.py`, `docs/experiments.md`).
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

"""Standard errors of means and quantiles of scored positions, by resampling whole clusters.

Neighbouring tokens of a text are alike, so positions are not independent and the usual s / sqrt(n) is too small. Whole
windows are drawn instead, with replacement. Where there are few windows, each is first cut into equal blocks.

Source: A. C. Davison and D. V. Hinkley, Bootstrap Methods and their Application (1997), chapters 2 and 3.8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64Array = npt.NDArray[np.float64]

RESAMPLES = 1000
MIN_CLUSTERS = 20


@dataclass(frozen=True)
class Resampling:
    """The number of times that each cluster is drawn in each resample.

    Attributes:
        cluster: i64[n], the cluster of each position.
        counts: i64[RESAMPLES, n_cluster].
        unit: what a cluster is: "window" or "block" of a window.
    """

    cluster: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    unit: str

    @property
    def n_cluster(self) -> int:
        return self.counts.shape[1]


def resample(window: npt.NDArray[np.int64], place: npt.NDArray[np.int64], n_place: int, *, seed: int) -> Resampling:
    """Draws clusters.

    Args:
        window: i64[n], the window of each position that counts.
        place: i64[n], its place among the `n_place` scored ones of that window.
        n_place: scored positions in a whole window.
        seed: equal seeds give equal draws.
    """
    n_window = len(np.unique(window))
    n_block = 1 if n_window >= MIN_CLUSTERS else min(-(-MIN_CLUSTERS // n_window), n_place)
    _, cluster = np.unique(window * n_block + place * n_block // n_place, return_inverse=True)
    n_cluster = int(cluster.max()) + 1
    random = np.random.Generator(np.random.PCG64(seed))
    counts = random.multinomial(n_cluster, np.full(n_cluster, 1 / n_cluster), size=RESAMPLES)
    return Resampling(cluster, counts, "window" if n_block == 1 else "block")


def resampled_means(
    values: F64Array, resampling: Resampling, *, chosen: npt.NDArray[np.bool_] | None = None
) -> F64Array:
    """The mean of f64[n] in each resample, f64[RESAMPLES].

    `chosen` bool[n] leaves positions out of the mean and in the drawing; a resample without any of them has no number.
    """
    kept = np.ones(len(values)) if chosen is None else chosen.astype(np.float64)
    sums = np.bincount(resampling.cluster, weights=np.where(kept, values, 0), minlength=resampling.n_cluster)
    sizes = np.bincount(resampling.cluster, weights=kept, minlength=resampling.n_cluster)
    with np.errstate(invalid="ignore"):
        means: F64Array = (resampling.counts @ sums) / (resampling.counts @ sizes)
    return means


def resampled_quantiles(values: F64Array, fractions: tuple[float, ...], resampling: Resampling) -> F64Array:
    """Quantiles of f64[n] in each resample, f64[RESAMPLES, len(fractions)], interpolated as numpy does it."""
    order = np.argsort(values, kind="stable")
    ordered, cluster = values[order], resampling.cluster[order]
    out = np.empty((len(resampling.counts), len(fractions)))
    for i, counts in enumerate(resampling.counts):
        ends = np.cumsum(counts[cluster])
        places = np.array(fractions) * (ends[-1] - 1)
        below = np.floor(places)
        low, high = np.searchsorted(ends, np.stack([below, np.ceil(places)]), side="right")
        out[i] = ordered[low] + (places - below) * (ordered[high] - ordered[low])
    return out


def standard_error(replicates: F64Array) -> float | None:
    """Spread of a statistic over its resamples; None where it has none that means anything."""
    if not np.isfinite(replicates).all():
        return None
    return float(replicates.std(ddof=1))

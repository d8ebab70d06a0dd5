"""Confidence intervals of shares, and of the ratio and the difference of two shares, from sums over clusters.

A share is sum(numerator) / sum(denominator): divergence per token, agreement per token, bits per byte. Its variance
comes from the deviations of the clusters. Two shares over the same clusters have correlated deviations, and subtracting
their covariance makes the comparison of the two far more precise than either share is.

The interval of a ratio is Fieller's: a bound L lies outside it exactly if a - L b differs significantly from zero, so
no variance of a quotient has to be approximated. Quantiles are those of Student's t with the number of clusters - 1
degrees of freedom, because the normal distribution is too thin in the tails that a gate looks at.

Source: E. C. Fieller, Some Problems in Interval Estimation (1954); W. G. Cochran, Sampling Techniques (1977), ch. 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

F64Array = npt.NDArray[np.float64]

_NORMAL_FROM = 3000
"""Degrees of freedom from which the normal quantile is right to a part in a thousand, 5 standard errors out."""


@dataclass(frozen=True)
class Share:
    """A share of sums over clusters.

    Attributes:
        value: sum of numerators over sum of denominators.
        deviations: f64[n_cluster], each cluster's part of the error; they sum to zero.
    """

    value: float
    deviations: F64Array

    @property
    def correction(self) -> float:
        """n / (n - 1), infinite for a single cluster: it says nothing about how clusters differ."""
        n = len(self.deviations)
        return n / (n - 1) if n > 1 else math.inf

    @property
    def variance(self) -> float:
        return self.correction * float(self.deviations @ self.deviations) if len(self.deviations) > 1 else math.inf

    @property
    def degrees(self) -> int:
        return max(len(self.deviations) - 1, 1)


def share(numerators: F64Array, denominators: F64Array) -> Share:
    """The share of sums over clusters, f64[n_cluster] each; the sum of the denominators must be positive."""
    total = float(denominators.sum())
    value = float(numerators.sum()) / total
    return Share(value, (numerators - value * denominators) / total)


def covariance(a: Share, b: Share, in_a: npt.NDArray[np.int64], in_b: npt.NDArray[np.int64]) -> float:
    """The covariance of two shares; their clusters `in_a[i]` and `in_b[i]` are the same windows, others independent."""
    if not len(in_a):
        return 0.0
    product = float(a.deviations[in_a] @ b.deviations[in_b])
    return math.sqrt(a.correction * b.correction) * product


def ratio_interval(a: Share, b: Share, cov: float, t: float) -> tuple[float, float]:
    """Fieller's interval of a / b at `t` standard errors; unbounded where b cannot be told from zero."""
    if not math.isfinite(a.variance + b.variance):
        return -math.inf, math.inf
    square = b.value**2 - t * t * b.variance
    if square <= 0:
        return -math.inf, math.inf
    half = a.value * b.value - t * t * cov
    root = math.sqrt(max(half * half - square * (a.value**2 - t * t * a.variance), 0.0))
    return (half - root) / square, (half + root) / square


def ratio_factor(a: Share, b: Share, cov: float, t: float, bound: float) -> float:
    """How many times as much text would tell a / b from `bound` if the estimates were right; inf if no text would."""
    variance = a.variance + bound * bound * b.variance - 2 * bound * cov
    return _factor(a.value - bound * b.value, variance, t)


def difference_variance(a: Share, b: Share, cov: float) -> float:
    """The variance of a - b, at least zero."""
    return max(a.variance + b.variance - 2 * cov, 0.0)


def value_factor(value: float, variance: float, t: float, bound: float) -> float:
    """How many times as much text would tell a value from `bound`."""
    return _factor(value - bound, variance, t)


def _factor(distance: float, variance: float, t: float) -> float:
    if not math.isfinite(variance) or distance == 0:
        return math.inf
    return t * t * variance / (distance * distance)


@lru_cache(maxsize=64)
def student_quantile(tail: float, degrees: int) -> float:
    """The value that Student's t exceeds with probability `tail` < 0.5.

    With t = sqrt(degrees) tan(angle) the density is cos(angle)^(degrees - 1), which is summed up from the far end.
    """
    if degrees >= _NORMAL_FROM:
        return -NormalDist().inv_cdf(tail)
    angles = np.linspace(math.pi / 2, 0.0, 400_001)
    density = np.maximum(np.cos(angles), 0.0) ** (degrees - 1)
    upper = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    share_above = upper / (2 * upper[-1])
    return float(math.sqrt(degrees) * math.tan(np.interp(tail, share_above, angles)))

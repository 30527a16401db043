"""Paired differences with their interval: whether a memory earns its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class PairedDifference:
    """Mean of ``a - b`` over paired windows, with its intervals.

    Attributes:
        mean: mean difference; for losses a negative value means that ``a`` is better.
        t_low, t_high: Student t interval of the mean.
        bootstrap_low, bootstrap_high: percentile interval over windows drawn with replacement.
        num_pairs: number of windows.
        confidence: coverage of both intervals.
    """

    mean: float
    t_low: float
    t_high: float
    bootstrap_low: float
    bootstrap_high: float
    num_pairs: int
    confidence: float

    def excludes_zero(self) -> bool:
        """Whether the t interval lies on one side of zero."""
        return self.t_low > 0 or self.t_high < 0

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Compare two systems that were measured on the same windows.

    Args:
        a, b: one figure per window, in the same order.
        confidence: coverage of the intervals, between 0 and 1.
        num_resamples: bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: unequal numbers of windows, fewer than two, or figures that are not finite.
    """
    if len(a) != len(b):
        raise ValueError(
            f"a has {len(a)} windows, b has {len(b)}; they must be paired. Evaluate both on the same windows."
        )
    if len(a) < 2:
        raise ValueError(f"an interval needs at least 2 paired windows, got {len(a)}. Evaluate more windows.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}.")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if not np.isfinite(differences).all():
        raise ValueError("some windows have no finite figure. Look at the losses of the two records.")
    num_pairs = len(differences)
    mean = float(differences.mean())
    half = (
        student_t_quantile((1 + confidence) / 2, num_pairs - 1)
        * differences.std(ddof=1)
        / math.sqrt(num_pairs)
    )
    drawn = np.random.default_rng(seed).integers(0, num_pairs, size=(num_resamples, num_pairs))
    means = differences[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return PairedDifference(
        mean=mean,
        t_low=float(mean - half),
        t_high=float(mean + half),
        bootstrap_low=float(low),
        bootstrap_high=float(high),
        num_pairs=num_pairs,
        confidence=confidence,
    )


def student_t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, by bisection of its exact finite sum."""
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"need 0 < probability < 1 and degrees >= 1, got {probability} and {degrees}.")
    if probability < 0.5:
        return -student_t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while _student_t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _student_t_cdf(t: float, degrees: int) -> float:
    """Abramowitz and Stegun 26.7.3 and 26.7.4 for t >= 0: a finite sum of powers of the cosine."""
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    if degrees % 2:
        term, total = cosine, cosine if degrees > 1 else 0.0
        for j in range(3, degrees - 1, 2):
            term *= cosine * cosine * (j - 1) / j
            total += term
        inside = 2 / math.pi * (theta + sine * total)
    else:
        term = total = 1.0
        for j in range(2, degrees, 2):
            term *= cosine * cosine * (j - 1) / j
            total += term
        inside = sine * total
    return 0.5 + inside / 2

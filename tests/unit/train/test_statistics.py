"""Paired statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from memzoo.train.statistics import paired_difference, student_t_quantile


@pytest.mark.parametrize(
    "degrees, quantile",
    # Abramowitz and Stegun, table 26.10
    [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (10, 2.228), (15, 2.131), (30, 2.042), (120, 1.980)],
)
def test_student_t_quantiles_match_the_table(degrees: int, quantile: float) -> None:
    assert student_t_quantile(0.975, degrees) == pytest.approx(quantile, abs=5e-4)
    assert student_t_quantile(0.025, degrees) == pytest.approx(-quantile, abs=5e-4)


def test_paired_difference_removes_what_both_share() -> None:
    rng = np.random.default_rng(0)
    windows = rng.normal(3.0, 1.0, size=16)
    a, b = windows - 0.05 + rng.normal(0, 0.01, 16), windows
    difference = paired_difference(list(a), list(b))
    assert difference.t_low < difference.mean < difference.t_high < 0
    assert difference.excludes_zero()
    assert difference.mean == pytest.approx(float((a - b).mean()))
    assert -0.07 < difference.bootstrap_low < difference.mean < difference.bootstrap_high < -0.03
    half = student_t_quantile(0.975, 15) * float((a - b).std(ddof=1)) / 4
    assert difference.t_high - difference.mean == pytest.approx(half)
    assert paired_difference(list(a), list(b)) == difference, "the resampling is seeded"


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        difference = paired_difference(list(rng.normal(size=8)), [0.0] * 8, num_resamples=2)
        covered += difference.t_low < 0 < difference.t_high
    assert 930 < covered < 970


def test_unpaired_or_broken_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="a has 2 windows, b has 3"):
        paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="at least 2"):
        paired_difference([1], [1])
    with pytest.raises(ValueError, match="no finite figure"):
        paired_difference([1, math.nan], [1, 2])

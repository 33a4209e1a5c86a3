"""The percentile bootstrap against formulas and against resampling by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlchat.utils.bootstrap import RESAMPLES, bootstrap_interval


def mean(values: np.ndarray) -> np.ndarray:
    return np.asarray(values.mean(1))


def test_a_mean_has_the_interval_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    half = 1.96 * values.std() / 20
    expected = (pytest.approx(values.mean() - half, abs=0.01), pytest.approx(values.mean() + half, abs=0.01))
    assert bootstrap_interval(mean, values, seed=0) == expected


def test_two_samples_are_resampled_one_after_the_other() -> None:
    one, two = np.arange(5.0), np.array([3.0, 9.0])
    generator = np.random.default_rng(7)
    first = one[generator.integers(5, size=(RESAMPLES, 5))].mean(1)
    second = two[generator.integers(2, size=(RESAMPLES, 2))].mean(1)
    low, high = np.quantile(first - second, (0.025, 0.975))
    assert bootstrap_interval(lambda a, b: a.mean(1) - b.mean(1), one, two, seed=7) == (low, high)


def test_entries_are_drawn_as_a_whole() -> None:
    """A ratio of sums of two columns that are equal is always 1."""
    counts = np.repeat(np.arange(1.0, 9.0)[:, None], 2, axis=1)
    assert bootstrap_interval(lambda x: x[..., 0].sum(1) / x[..., 1].sum(1), counts, seed=0) == (1.0, 1.0)


def test_the_seed_decides() -> None:
    values = np.sqrt(np.arange(30.0))  # few means are equal
    assert bootstrap_interval(mean, values, seed=3) == bootstrap_interval(mean, values, seed=3)
    assert bootstrap_interval(mean, values, seed=3) != bootstrap_interval(mean, values, seed=4)

"""The percentile bootstrap (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 10_000


def bootstrap_interval(statistic: Callable[..., np.ndarray], *samples: np.ndarray, seed: int) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a ``statistic`` of independent ``samples``.

    Args:
        statistic: takes the resampled form of each sample, [:data:`RESAMPLES`, n, …], and returns [:data:`RESAMPLES`].
        samples: [n, …] each, with its own n. The n entries are resampled with replacement, each as a whole.
        seed: of the resampling.

    Returns:
        The 2.5 % and the 97.5 % quantile of the statistic.
    """
    generator = np.random.default_rng(seed)
    resampled = (sample[generator.integers(len(sample), size=(RESAMPLES, len(sample)))] for sample in samples)
    low, high = np.quantile(statistic(*resampled), (0.025, 0.975))
    return float(low), float(high)

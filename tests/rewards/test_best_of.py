"""Best-of-n: the choice and its KL, worked out by hand."""

from __future__ import annotations

import math

import pytest

from rlchat.rewards.best_of import best_of, best_of_kl


def test_the_best_of_each_group() -> None:
    assert best_of([1.0, 3.0, 3.0, 0.0, -1.0, 2.0], 3) == [1, 5]  # of equal ones, the first
    assert best_of([4.0, 2.0], 1) == [0, 1]
    assert best_of([], 4) == []
    with pytest.raises(ValueError, match="5 rewards are not groups of 2"):
        best_of([0.0] * 5, 2)


def test_the_kl_is_that_of_the_largest_of_n_uniform_numbers() -> None:
    assert best_of_kl(1) == 0
    # The largest of n draws from a uniform distribution has the density f = n x^(n-1), and KL = ∫ f log f.
    for n in (2, 5):
        steps = 200_000
        xs = [(i + 0.5) / steps for i in range(steps)]
        kl = sum(n * x ** (n - 1) * math.log(n * x ** (n - 1)) for x in xs) / steps
        assert best_of_kl(n) == pytest.approx(kl, abs=1e-4)

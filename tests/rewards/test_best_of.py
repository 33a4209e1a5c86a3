"""Best-of-n: the choice and its KL; pass@k; worked out by hand."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlchat.rewards.best_of import best_of, best_of_kl, pass_at, pass_at_k


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


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs contain the correct one
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)  # 3 of the 10 pairs contain none
    assert pass_at_k(8, 3, 4) == pytest.approx(1 - 5 / 70)
    assert pass_at_k(6, 3, 4) == 1  # no four responses without a correct one
    assert pass_at_k(6, 0, 6) == 0
    for wrong in ((4, 1, 0), (4, 1, 5), (4, 5, 2), (4, -1, 2)):
        with pytest.raises(ValueError, match="cannot be estimated from 4 responses"):
            pass_at_k(*wrong)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_fraction_of_subsets_with_a_correct_response(correct: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(correct)))
    subsets = [any(subset) for subset in combinations(correct, k)]
    assert pass_at_k(len(correct), sum(correct), k) == pytest.approx(sum(subsets) / len(subsets))


@pytest.mark.parametrize(("n", "chance", "k"), [(4, 0.3, 2), (6, 0.1, 4), (8, 0.6, 3)])
def test_pass_at_k_is_unbiased(n: int, chance: float, k: int) -> None:
    """Its mean over the binomial distribution of correct responses is the chance that one of k is correct."""
    weights = [math.comb(n, c) * chance**c * (1 - chance) ** (n - c) for c in range(n + 1)]
    mean = sum(weight * pass_at_k(n, c, k) for c, weight in enumerate(weights))
    assert mean == pytest.approx(1 - (1 - chance) ** k)


def test_pass_at_the_powers_of_two() -> None:
    assert pass_at([True, False, False, False], 2) == {1: [0.5, 0.0], 2: [1.0, 0.0]}
    assert list(pass_at([True] * 6, 6)) == [1, 2, 4, 6]
    assert list(pass_at([True] * 8, 8)) == [1, 2, 4, 8]
    assert pass_at([True, False], 1) == {1: [1.0, 0.0]}
    assert pass_at([], 3) == {1: [], 2: [], 3: []}
    with pytest.raises(ValueError, match="3 responses are not groups of 2"):
        pass_at([True] * 3, 2)

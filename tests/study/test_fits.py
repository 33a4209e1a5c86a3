"""The curves of over-optimization: numbers worked out by hand, and exact recovery of known curves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rlchat.study.fits import Fit, best_of_curve, best_of_weights, fit_curve


def test_the_rl_curve_turns_where_its_slope_is_zero() -> None:
    fit = Fit("rl", alpha=2.0, beta=1.0, r2=1.0, points=3)
    assert fit.turnover == pytest.approx(math.e)  # e^(2/1 - 1)
    assert fit.peak == pytest.approx(math.e)  # e (2 - log e)
    around = fit.gold([math.e - 0.01, math.e, math.e + 0.01])
    assert around[1] > max(around[0], around[2])
    assert around[1] == pytest.approx(fit.peak)


def test_the_best_of_curve_turns_at_its_vertex() -> None:
    fit = Fit("best_of", alpha=3.0, beta=0.75, r2=1.0, points=3)
    assert (fit.turnover, fit.peak) == (2.0, 3.0)  # 3 / 1.5, and 2 (3 - 1.5)
    assert fit.gold([0, 2, 4]).tolist() == [0.0, 3.0, 0.0]


def test_a_curve_that_only_rises_or_only_falls_has_no_turnover() -> None:
    assert Fit("rl", 1.0, -0.1, 1.0, 3).turnover == math.inf
    assert Fit("best_of", 1.0, 0.0, 1.0, 3).peak == math.inf
    assert Fit("best_of", -1.0, 0.5, 1.0, 3).turnover == 0.0
    assert Fit("best_of", -1.0, 0.0, 1.0, 3).turnover == 0.0


@pytest.mark.parametrize("form", ["rl", "best_of"])
def test_a_known_curve_is_recovered(form: str) -> None:
    d = np.array([0.0, 0.3, 1.0, 1.7, 2.5, 4.0])
    truth = Fit(form, 1.25, 0.5, 1.0, 6)  # type: ignore[arg-type]
    found = fit_curve(form, d, truth.gold(d))  # type: ignore[arg-type]
    assert (found.alpha, found.beta, found.r2, found.points) == (
        pytest.approx(1.25),
        pytest.approx(0.5),
        pytest.approx(1.0),
        6,
    )


def test_least_squares_by_hand() -> None:
    # Form best_of at d = 1, 2, 3 with gold 1, 2, 0. The normal equations of [d, -d²] are
    # 14 α - 36 β = 5 and -36 α + 98 β = -9, so α = 166/76 and β = 54/76.
    fit = fit_curve("best_of", [1, 2, 3], [1.0, 2.0, 0.0])
    assert fit.alpha == pytest.approx(166 / 76)
    assert fit.beta == pytest.approx(54 / 76)
    predicted = [1 * (166 - 54) / 76, 2 * (166 - 108) / 76, 3 * (166 - 162) / 76]
    residual = sum((y - p) ** 2 for y, p in zip([1, 2, 0], predicted, strict=True))
    assert fit.r2 == pytest.approx(1 - residual / 2)  # the sum of squares around the mean 1 is 2


@pytest.mark.parametrize(
    ("d", "gold"),
    [([0.0, 1.0, 2.0], [0.0, 1.0, 1.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1, 2, 3], [1, 2, math.nan])],
)
def test_too_few_or_broken_points_are_refused(d: list[float], gold: list[float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        fit_curve("rl", d, gold)


def test_the_weights_of_best_of_n_are_those_of_all_subsets() -> None:
    for samples, n in ((5, 1), (5, 2), (6, 3), (4, 4)):
        best = [max(subset) for subset in itertools.combinations(range(samples), n)]
        shares = [best.count(i) / len(best) for i in range(samples)]
        assert best_of_weights(samples, n).tolist() == pytest.approx(shares)


def test_the_weights_of_many_samples_sum_to_one() -> None:
    assert best_of_weights(4096, 512).sum() == pytest.approx(1)


def test_the_best_by_the_proxy_is_measured_by_the_gold_reward() -> None:
    proxy = np.array([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    gold = np.array([[9.0, 0.0, 3.0], [6.0, 0.0, 3.0]])
    # Best of 1: the means 4 and 3. Best of 3: 9 and 3. Best of 2: (9 + 9 + 3) / 3 and (0 + 3 + 3) / 3.
    assert best_of_curve(proxy, gold, [1, 2, 3]) == pytest.approx([3.5, (7 + 2) / 2, 6.0])


def test_more_than_all_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="from 1 to 3"):
        best_of_weights(3, 4)

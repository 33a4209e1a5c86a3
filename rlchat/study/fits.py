"""The curves of Gao, Schulman and Hilton 2022, *Scaling Laws for Reward Model Overoptimization* (arXiv 2210.10760).

With d = √KL to the initial policy, the gold reward above that of the initial policy is, in their section 3,

* d (α - β log d) for reinforcement learning,
* d (α - β d) for best-of-n sampling.

α is the gain per unit of d at the start, β how fast the proxy stops to help. Both forms are linear in (α, β), so least
squares needs no start values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Form = Literal["rl", "best_of"]
Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Fit:
    """One fitted curve.

    Attributes:
        form: which of the two curves.
        alpha: α, in gold reward per √nat.
        beta: β, in gold reward per √nat (``rl``) or per nat (``best_of``).
        r2: the share of the variance of the gold reward that the curve explains; below 0 if the mean is better.
        points: the number of points.
    """

    form: Form
    alpha: float
    beta: float
    r2: float
    points: int

    def gold(self, d: Sequence[float] | Array) -> Array:
        """The gold reward [points] above that of the initial policy at each of ``d`` [points]."""
        first, second = _terms(self.form, np.asarray(d, dtype=np.float64))
        return self.alpha * first + self.beta * second

    @property
    def turnover(self) -> float:
        """The d at which the gold reward is highest: e^(α/β - 1), or α / 2β. 0 if it never rises, inf if always."""
        if self.beta <= 0:
            return math.inf if self.alpha > 0 or self.beta < 0 else 0.0
        if self.form == "rl":
            return math.exp(min(self.alpha / self.beta - 1, 700.0))
        return max(self.alpha, 0.0) / (2 * self.beta)

    @property
    def peak(self) -> float:
        """The gold reward at the turnover, above the initial policy's: β d*, or α² / 4β; inf if it always rises."""
        d = self.turnover
        if not math.isfinite(d):
            return math.inf
        return self.beta * d if self.form == "rl" else self.beta * d * d


def fit_curve(form: Form, d: Sequence[float] | Array, gold: Sequence[float] | Array) -> Fit:
    """The least-squares fit of ``form`` to ``gold`` [points], gold rewards above the initial policy's, at ``d``.

    Raises:
        ValueError: fewer than three points have d > 0, a number is not finite, or a d is negative.
    """
    x, y = np.asarray(d, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or not (np.isfinite(x).all() and np.isfinite(y).all()) or (x < 0).any():
        raise ValueError("expected two equally long lists of finite numbers, and d of at least 0")
    if len(np.unique(x[x > 0])) < 3:
        raise ValueError("expected at least three different values of d above 0")
    terms = np.stack(_terms(form, x), axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(terms, y, rcond=None)
    residual = float(((y - terms @ (alpha, beta)) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    return Fit(form, float(alpha), float(beta), 1 - residual / total if total else math.nan, len(x))


def _terms(form: Form, d: Array) -> tuple[Array, Array]:
    """The factors of α and of β at each of ``d``; d log d is 0 at 0."""
    if form == "best_of":
        return d, -(d**2)
    return d, -d * np.log(np.where(d > 0, d, 1.0))


def best_of_weights(samples: int, n: int) -> Array:
    """The probability [samples] that each of ``samples`` ranked responses is the best of ``n`` of them.

    Responses are ranked from the lowest proxy reward to the highest, and n different ones are drawn. The i-th, from 1,
    is the best with probability C(i - 1, n - 1) / C(samples, n). This makes the unbiased estimator of Gao et al. 2022,
    appendix I; it uses all samples for every n.

    Raises:
        ValueError: unless 1 ≤ n ≤ samples.
    """
    if not 1 <= n <= samples:
        raise ValueError(f"invalid value {n} for n: expected an integer from 1 to {samples}")
    rank = np.arange(1, samples + 1)
    with np.errstate(divide="ignore"):
        # C(i, n) / C(i - 1, n - 1) = i / n, so the weights follow from that of the highest, n / samples, downwards:
        # w(i - 1) = w(i) (i - n) / (i - 1).
        ratios = np.log(np.maximum(rank - n, 0.0)) - np.log(np.maximum(rank - 1.0, 1.0))
    logs = np.concatenate([np.cumsum(ratios[:0:-1])[::-1], [0.0]]) + math.log(n / samples)
    return np.exp(logs)


def best_of_curve(proxy: Array, value: Array, counts: Sequence[int]) -> list[float]:
    """The expected ``value`` of the response with the highest ``proxy`` among n, for each n in ``counts``.

    Args:
        proxy: [prompts, samples] the proxy reward of each response.
        value: [prompts, samples] the gold reward, or another number, of the same responses.
        counts: the values of n, at most ``samples`` each.

    Returns:
        The mean over prompts for each n.
    """
    order = np.argsort(proxy, axis=1, kind="stable")
    ranked = np.take_along_axis(value, order, axis=1)
    return [float((ranked @ best_of_weights(proxy.shape[1], n)).mean()) for n in counts]

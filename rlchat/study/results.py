"""From the finished pieces of a study to curves of gold and proxy reward against √KL, and their fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlchat.study.fits import Fit, Form, fit_curve
from rlchat.study.pieces import read_json
from rlchat.study.settings import Settings

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Curve:
    """What one seed measured with one proxy, from the initial policy on.

    ``gold`` and ``proxy`` are above those of the initial policy, in standard deviations of the initial policy's
    responses. All arrays are [points].
    """

    seed: int
    d: Array  # √KL, √nat
    gold: Array
    proxy: Array

    @property
    def best(self) -> tuple[float, float]:
        """The d of the highest measured gold reward, and that reward."""
        i = int(self.gold.argmax())
        return float(self.d[i]), float(self.gold[i])


@dataclass(frozen=True, slots=True)
class Group:
    """The curves of all seeds for one kind of proxy, with their fits.

    Attributes:
        form: ``rl`` or ``best_of``.
        width: hidden units of the proxy.
        amount: comparisons that it has learned from.
        kl_coef: of PPO; 0 for best-of-n.
        accuracy: the mean share of held-out pairs that the proxies rank as the gold reward does.
        curves: one per seed.
        fit: of the points of all seeds together; None with a KL penalty, which holds the policy at one KL, and where
            the KL has fewer than three different values.
        fits: of each seed; empty without ``fit``.
    """

    form: Form
    width: int
    amount: int
    kl_coef: float
    accuracy: float
    curves: tuple[Curve, ...]
    fit: Fit | None
    fits: tuple[Fit, ...]


def group_of(form: Form, width: int, amount: int, kl_coef: float, accuracy: float, curves: Sequence[Curve]) -> Group:
    """The group of ``curves``, fitted together and each alone."""
    fit, fits = None, tuple[Fit, ...]()
    if not kl_coef and all(len(np.unique(curve.d[curve.d > 0])) >= 3 for curve in curves):
        d, gold = (np.concatenate(x) for x in ([c.d for c in curves], [c.gold for c in curves]))
        fit, fits = fit_curve(form, d, gold), tuple(fit_curve(form, curve.d, curve.gold) for curve in curves)
    return Group(form, width, amount, kl_coef, accuracy, tuple(curves), fit, fits)


def collect(folder: Path, settings: Settings, seeds: Sequence[int]) -> list[Group]:
    """All groups of a study whose pieces are finished: best-of-n by proxy, then PPO by proxy and KL coefficient."""
    pools = {seed: read_json(folder / f"seed{seed}/pool.json")["gold_std"] for seed in seeds}
    groups = []
    for form, runs in (
        ("best_of", [(width, amount, 0.0) for width, amount in settings.proxies]),
        ("rl", settings.ppo_runs),
    ):
        for width, amount, kl_coef in runs:
            curves, accuracies = [], []
            for seed in seeds:
                stem = f"best_of-{width}-{amount}" if form == "best_of" else f"ppo-{width}-{amount}-kl{kl_coef:g}"
                found = read_json(folder / f"seed{seed}/{stem}.json")
                columns = found if form == "best_of" else _columns(found["points"])
                curves.append(make_curve(seed, columns["kl"], columns["gold"], columns["proxy"], pools[seed]))
                proxy = read_json(folder / f"seed{seed}/proxy-{width}-{amount}.json")
                accuracies.append(proxy["pair_accuracy"])
            groups.append(group_of(form, width, amount, kl_coef, float(np.mean(accuracies)), curves))  # type: ignore[arg-type]
    return groups


def make_curve(seed: int, kl: Sequence[float], gold: Sequence[float], proxy: Sequence[float], gold_std: float) -> Curve:
    """A curve from measurements, the initial policy's first: KL in nats, gold in points, proxy standardized.

    A KL estimated from samples may be slightly negative near the start; it counts as 0.
    """
    d = np.sqrt(np.maximum(np.asarray(kl, dtype=np.float64), 0.0))
    points, scores = np.asarray(gold, dtype=np.float64), np.asarray(proxy, dtype=np.float64)
    return Curve(seed, d, (points - points[0]) / gold_std, scores - scores[0])


def frontier(groups: Iterable[Group]) -> list[tuple[float, float, float, float]]:
    """How the KL penalty moves along the curve of gold reward against KL, or off it.

    For each coefficient above 0: the coefficient; √KL and gold reward of the last measurement; and the gold reward of
    the same seed's run without a penalty at the same √KL, or at its end if it never gets so far. Means over seeds.
    """
    runs = [group for group in groups if group.form == "rl"]
    rows = []
    for group in sorted(runs, key=lambda group: group.kl_coef):
        free = next(g for g in runs if (g.width, g.amount, g.kl_coef) == (group.width, group.amount, 0.0))
        if group.kl_coef == 0:
            continue
        pairs = list(zip(group.curves, free.curves, strict=True))
        rows.append(
            (
                group.kl_coef,
                float(np.mean([curve.d[-1] for curve, _ in pairs])),
                float(np.mean([curve.gold[-1] for curve, _ in pairs])),
                float(np.mean([_gold_at(other, curve.d[-1]) for curve, other in pairs])),
            )
        )
    return rows


def _gold_at(curve: Curve, d: float) -> float:
    """The gold reward where ``curve`` first reaches ``d``, between its two measurements there; at its end if never."""
    beyond = np.flatnonzero(curve.d >= d)
    if not len(beyond):
        return float(curve.gold[-1])
    i = int(beyond[0])
    if i == 0:
        return float(curve.gold[0])
    share = (d - curve.d[i - 1]) / (curve.d[i] - curve.d[i - 1])
    return float(curve.gold[i - 1] + share * (curve.gold[i] - curve.gold[i - 1]))


def _columns(points: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    return {name: [point[name] for point in points] for name in ("kl", "gold", "proxy")}

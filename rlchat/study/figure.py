"""The figure of a study: gold and proxy reward against √KL."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlchat.study.results import Group

_INK, _QUIET, _GRID = "#222222", "#777777", "#E6E6E6"


def draw(groups: Sequence[Group], amount: int, width: int) -> Figure:
    """Four panels: best-of-n and PPO by comparisons (at ``width``), and PPO by width and KL penalty (at ``amount``).

    Dots are measured gold rewards of all seeds, the thick dashed line is the fit to them, thin lines are proxy rewards.
    """
    figure = Figure((11.0, 8.2), layout="constrained")
    axes = figure.subplots(2, 2)
    free = [group for group in groups if group.kl_coef == 0]
    panels = (
        ("Best of n, by comparisons", [g for g in free if g.form == "best_of" and g.width == width], "amount"),
        ("PPO, by comparisons", [g for g in free if g.form == "rl" and g.width == width], "amount"),
        (f"PPO, by width of the proxy; {amount} comparisons", _of(free, amount), "width"),
        (
            f"PPO, by KL coefficient; {amount} comparisons",
            [g for g in groups if g.form == "rl" and (g.width, g.amount) == (width, amount)],
            "kl_coef",
        ),
    )
    for panel, (title, members, by) in zip(axes.flat, panels, strict=True):
        _draw_panel(panel, title, sorted(members, key=lambda g, by=by: getattr(g, by)), by)  # type: ignore[misc]
    handles = [
        Line2D([], [], color=_INK, marker="o", linestyle="", markersize=4, label="gold reward, each seed"),
        Line2D([], [], color=_INK, linestyle="--", linewidth=2, label="fit to the gold reward"),
        Line2D([], [], color=_INK, linewidth=0.8, alpha=0.5, label="proxy reward, each seed"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _of(free: Sequence[Group], amount: int) -> list[Group]:
    return [g for g in free if g.form == "rl" and g.amount == amount]


def _draw_panel(axes: Axes, title: str, groups: Sequence[Group], by: str) -> None:
    # from light to dark with more comparisons, width or penalty; the lightest colors are hard to see on white
    colours = colormaps["YlGnBu"](np.linspace(0.4, 1.0, len(groups)))
    golds = [0.0]
    for group, colour in zip(groups, colours, strict=True):
        for curve in group.curves:
            axes.plot(curve.d, curve.proxy, color=colour, linewidth=0.8, alpha=0.5)
            axes.plot(curve.d, curve.gold, "o", color=colour, markersize=3, alpha=0.8, markeredgewidth=0)
            golds += curve.gold.tolist()
        label = f"{getattr(group, by):g}"
        if group.fit is None:
            axes.plot([], [], "o", color=colour, label=label)
            continue
        d = np.linspace(0, max(float(curve.d.max()) for curve in group.curves), 200)
        axes.plot(d, group.fit.gold(d), "--", color=colour, linewidth=2, label=label)
    proxies = [float(curve.proxy.max()) for group in groups for curve in group.curves]
    low, high = min(golds), max([*golds, *proxies])
    axes.set_ylim(low - 0.1 * (high - low), high + 0.05 * (high - low))
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_xlabel("√KL to the initial policy, √nat", color=_QUIET)
    axes.set_ylabel("reward above the initial policy, std", color=_QUIET)
    axes.axhline(0, color=_QUIET, linewidth=0.8)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if groups:
        axes.legend(frameon=False, fontsize=9, loc="best")

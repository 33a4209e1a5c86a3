"""Draws the metrics of a run as one figure.

:func:`draw_stats` is a pure function from numbers to a figure. It uses matplotlib's objects instead of ``pyplot``, so
that it needs no display and does not change the state of a program that makes its own plots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from rlchat.callbacks.stats_curves import (
    Array,
    Curve,
    escape_dollars,
    format_number,
    format_signed,
    last_finite,
    limits,
    shorten,
    spread_labels,
)

# Paul Tol's color schemes, distinguishable with any color vision: "bright" for the two main lines, "muted" for factors.
_TRAIN = "#4477AA"
_VALIDATION = "#D0562A"
_FACTORS = ("#332288", "#CC6677", "#44AA99", "#999933", "#882255", "#88CCEE", "#117733", "#DDCC77", "#AA4499")
_INK, _QUIET, _GRID = "#222222", "#777777", "#E6E6E6"

# Inches.
_WIDTH, _PANEL_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 11.0, 1.75, 0.65, 0.25, 1.3, 0.55
_ROW_GAP, _COLUMN_GAP = 0.85, 0.7

_MOST_FACTORS = 12
_LONGEST_NAME, _LONGEST_TITLE = 30, 80


@dataclass(frozen=True)
class _Panel:
    """``train/<metric>`` and ``val/<metric>`` in one plot; ``log`` allows a logarithmic axis for a wide range."""

    metric: str
    title: str
    unit: str
    scale: Literal["number", "share"] = "number"
    log: bool = False


_REWARD = _Panel("reward", "Reward", "per response")
_PANELS = (
    _Panel("loss", "Loss", "nats"),
    _Panel("pair_loss", "Pair loss", "nats per pair"),
    _Panel("reward_margin", "Implicit reward margin", "nats per pair"),
    _Panel("pair_accuracy", "Pair accuracy", "fraction of pairs ranked correctly", "share"),
    _Panel("right_over_wrong", "Correct above incorrect", "fraction of pairs ranked correctly", "share"),
    _Panel("answer_accuracy", "Answer accuracy", "fraction of prompts", "share"),
    _Panel("policy_loss", "Policy loss", "clipped surrogate"),
    _Panel("value_loss", "Value loss", "squared reward"),
    _Panel("entropy", "Entropy", "nats per token"),
    _Panel("kl", "KL to the reference model", "nats per response"),
    _Panel("accuracy", "Token accuracy", "fraction of tokens", "share"),
    _Panel("perplexity", "Perplexity", "per token", log=True),
    _Panel("response_length", "Response length", "tokens"),
)


def draw_stats(
    history: Mapping[str, tuple[Sequence[int], Sequence[float]]], title: str, batches: int | None = None
) -> Figure:
    """The figure of a run.

    Args:
        history: metric → (training batches, values), as logged: ``train/…``, ``val/…`` and ``reward/<factor>``.
            Values that are not finite are marked on the horizontal axis. Metrics without a panel are ignored.
        title: the name of the run.
        batches: training batches so far; by default the last in ``history``.

    Returns:
        A figure of fixed width with a panel for each metric that has data, or one line of text if none has.
    """
    curves = {name: Curve.of(steps, values) for name, (steps, values) in history.items() if len(steps)}
    factors = {name.removeprefix("reward/"): c for name, c in curves.items() if name.startswith("reward/")}
    panels = [panel for panel in _PANELS if _has_data(panel, curves)]
    end = max((int(curve.steps[-1]) for curve in curves.values()), default=0) if batches is None else batches

    rows = _balanced_rows(panels, per_row=3)
    has_reward_row = bool(factors) or _has_data(_REWARD, curves)
    row_count = has_reward_row + len(rows)
    height = _TOP + max(row_count, 0.5) * (_PANEL_HEIGHT + _ROW_GAP) - _ROW_GAP + _BOTTOM
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    page = _Page(figure, height, row_count)

    if has_reward_row:
        _draw_reward_row(page, curves, factors, end)
    for row, row_panels in enumerate(rows, start=int(has_reward_row)):
        for axes, panel in zip(page.row_of_axes(row, [1.0] * len(row_panels)), row_panels, strict=True):
            _draw_panel(axes, panel, curves, end)
    _draw_header(page, title, end, curves if row_count else {})
    return figure


class _Page:
    """Positions axes in inches, so that the size of a panel does not depend on the number of panels."""

    def __init__(self, figure: Figure, height: float, row_count: int) -> None:
        self.figure, self.height, self.row_count = figure, height, row_count

    def row_of_axes(self, row: int, shares: Sequence[float], right: float = _RIGHT) -> list[Axes]:
        """Axes from left to right, with widths in the ratio of ``shares``; ``right`` inches remain free."""
        room = _WIDTH - _LEFT - right - _COLUMN_GAP * (len(shares) - 1)
        bottom = self.height - _TOP - _PANEL_HEIGHT - row * (_PANEL_HEIGHT + _ROW_GAP)
        axes, left = [], _LEFT
        for share in shares:
            width = room * share / sum(shares)
            box = (left / _WIDTH, bottom / self.height, width / _WIDTH, _PANEL_HEIGHT / self.height)
            axes.append(self.figure.add_axes(box))
            left += width + _COLUMN_GAP
            if row == self.row_count - 1:
                axes[-1].set_xlabel("training batches", fontsize=8, color=_QUIET)
        return axes


def _has_data(panel: _Panel, curves: Mapping[str, Curve]) -> bool:
    return f"train/{panel.metric}" in curves or f"val/{panel.metric}" in curves


def _balanced_rows(panels: list[_Panel], per_row: int) -> list[list[_Panel]]:
    """As few rows as possible, whose numbers of panels differ by at most one."""
    count = -(-len(panels) // per_row)
    rows, start = [], 0
    for row in range(count):
        stop = start + len(panels) // count + (row < len(panels) % count)
        rows.append(panels[start:stop])
        start = stop
    return rows


def _draw_header(page: _Page, title: str, batches: int, curves: Mapping[str, Curve]) -> None:
    def inches(x: float, from_top: float) -> tuple[float, float]:
        return x / _WIDTH, 1 - from_top / page.height

    page.figure.text(
        *inches(_LEFT, 0.42), escape_dollars(shorten(title, _LONGEST_TITLE)), fontsize=14, fontweight="bold", color=_INK
    )
    seen = "nothing logged yet" if not curves else f"{batches:,} training batch{'' if batches == 1 else 'es'}"
    page.figure.text(*inches(_LEFT, 0.66), seen, fontsize=9, color=_QUIET)

    keys: list[Artist] = []
    shown = [curve for name, curve in curves.items() if name.startswith("train/")]
    if shown:
        keys.append(Line2D([], [], color=_TRAIN, alpha=0.4, linewidth=0.8, label="training"))
        keys.append(Line2D([], [], color=_TRAIN, linewidth=1.8, label="training, smoothed"))
    if any(name.startswith("val/") for name in curves):
        keys.append(Line2D([], [], color=_VALIDATION, linewidth=1, marker="o", markersize=4.5, label="validation"))
    if any(len(curve.broken_steps) for curve in curves.values()):
        keys.append(Line2D([], [], color=_INK, linestyle="", marker="x", markersize=5, label="not a finite number"))
    if keys:
        page.figure.legend(
            handles=keys,
            loc="upper right",
            bbox_to_anchor=inches(_WIDTH - _RIGHT + 0.06, 0.53),
            ncols=len(keys),
            frameon=False,
            fontsize=9,
            labelcolor=_INK,
            handlelength=1.8,
            columnspacing=1.6,
            borderpad=0,
        )


def _draw_reward_row(page: _Page, curves: Mapping[str, Curve], factors: Mapping[str, Curve], end: int) -> None:
    shares = [1.0] * _has_data(_REWARD, curves) + [1.3] * bool(factors)
    longest = min(_LONGEST_NAME, max(map(len, factors), default=0))
    axes = page.row_of_axes(0, shares, right=1.0 + 0.066 * longest if factors else _RIGHT)
    if _has_data(_REWARD, curves):
        _draw_panel(axes[0], _REWARD, curves, end)
    if factors:
        _draw_factors(axes[-1], factors, end)


def _draw_panel(axes: Axes, panel: _Panel, curves: Mapping[str, Curve], end: int) -> None:
    train, validation = (curves.get(f"{split}/{panel.metric}") for split in ("train", "val"))
    shown = [curve for curve in (train, validation) if curve is not None]
    low, high, is_log = limits(np.concatenate([curve.finite for curve in shown]), panel.log)
    _style(axes, panel.title, panel.unit, end)
    _style_values(axes, low, high, is_log, panel.scale)
    if not any(len(curve.finite) for curve in shown):
        _mark_empty(axes)

    if train is not None:
        smoothed = train.smoothed(is_log)
        alone = "o" if len(train.finite) == 1 else ""
        axes.plot(train.steps, train.values, color=_TRAIN, alpha=0.4, linewidth=0.8)
        axes.plot(train.steps, smoothed, color=_TRAIN, linewidth=1.8, marker=alone, markersize=4.5, zorder=3)
        _write_last(axes, smoothed, panel.scale, _TRAIN, y=1.06)
    if validation is not None:
        size = 4.5 if len(validation.values) <= 30 else 2.5
        axes.plot(
            validation.steps, validation.values, color=_VALIDATION, linewidth=1, marker="o", markersize=size, zorder=4
        )
        _write_last(axes, validation.values, panel.scale, _VALIDATION, y=1.19)
    for curve, colour in ((train, _TRAIN), (validation, _VALIDATION)):
        if curve is not None:
            _mark_not_drawn(axes, curve, low, high, colour)


def _draw_factors(axes: Axes, factors: Mapping[str, Curve], end: int) -> None:
    """Smoothed lines with their names at the right end, in the order of their last values."""
    weight = {name: float(np.max(np.abs(curve.finite), initial=0)) for name, curve in factors.items()}
    chosen = sorted(sorted(factors), key=lambda name: -weight[name])[:_MOST_FACTORS]
    unit = "per response, weight included"
    if len(chosen) < len(factors):
        unit += f"; the {len(chosen)} largest of {len(factors)}"
    smoothed = {name: factors[name].smoothed() for name in chosen}
    everything = np.concatenate([values[np.isfinite(values)] for values in smoothed.values()])
    low, high, _ = limits(everything, may_be_log=False)
    _style(axes, "Reward by factor", unit, end)
    _style_values(axes, low, high, is_log=False, scale="number")
    if not len(everything):
        _mark_empty(axes)

    lasts = {name: last_finite(values) for name, values in smoothed.items()}
    # The ideal height of each label, and the nearest one without overlap, as fractions of the axes' height.
    wishes = {name: 0.5 if np.isnan(last) else (last - low) / (high - low) for name, last in lasts.items()}
    in_order = sorted(chosen, key=lambda name: wishes[name])
    heights = spread_labels([wishes[name] for name in in_order], gap=10.5 / (72 * _PANEL_HEIGHT), low=-0.1, high=1.1)
    for name, height in zip(in_order, heights, strict=True):
        place = sorted(factors).index(name)
        colour = _FACTORS[place % len(_FACTORS)]
        dashes = "-" if place < len(_FACTORS) else (0, (4, 1.5))
        curve = factors[name]
        marker = "." if len(curve.finite) == 1 else ""
        axes.plot(curve.steps, smoothed[name], color=colour, linewidth=1.5, linestyle=dashes, marker=marker, zorder=3)
        axes.plot(
            (1.005, 1.03, 1.06),
            (min(1, max(0, wishes[name])), height, height),
            transform=axes.transAxes,
            color=colour,
            linewidth=1,
            linestyle=dashes if place < len(_FACTORS) else (0, (2, 1)),
            clip_on=False,
        )
        label = f"{format_signed(lasts[name])}  {escape_dollars(shorten(name.replace('_', ' '), _LONGEST_NAME))}"
        axes.text(1.07, height, label, transform=axes.transAxes, fontsize=8, color=_INK, va="center_baseline")
        _mark_not_drawn(axes, curve, low, high, colour, only_broken=True)


def _style(axes: Axes, title: str, unit: str, end: int) -> None:
    axes.text(0, 1.19, title, transform=axes.transAxes, fontsize=10.5, fontweight="bold", color=_INK)
    axes.text(0, 1.06, unit, transform=axes.transAxes, fontsize=8, color=_QUIET)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_QUIET)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", length=0, labelsize=8, labelcolor=_QUIET, pad=4)
    axes.tick_params(axis="x", length=3, color=_QUIET)
    axes.set_xlim(0, max(end, 1) * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def _mark_empty(axes: Axes) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, fontsize=8, color=_QUIET, ha="center", va="center")


def _style_values(axes: Axes, low: float, high: float, is_log: bool, scale: str) -> None:
    if is_log:
        axes.set_yscale("log")
        wide = high / low > 300
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
        if low < 0 < high:
            axes.axhline(0, color=_QUIET, linewidth=0.8, zorder=1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: format_number(y, scale)))
    axes.set_ylim(low, high)


def _mark_not_drawn(axes: Axes, curve: Curve, low: float, high: float, colour: str, only_broken: bool = False) -> None:
    """Marks values that are not finite by a cross on the axis, and values out of range by a triangle at the edge."""
    marks: list[tuple[str, Array, float]] = [("x", curve.broken_steps, 0.0)]
    if not only_broken:
        marks += [("^", curve.steps[curve.values > high], 0.97), ("v", curve.steps[curve.values < low], 0.03)]
    for marker, steps, y in marks:
        if len(steps):
            axes.plot(
                steps,
                np.full(len(steps), y),
                transform=axes.get_xaxis_transform(),
                linestyle="",
                marker=marker,
                markersize=4.5,
                markeredgewidth=1.2 if marker == "x" else 0,
                color=colour,
                clip_on=False,
                zorder=5,
            )


def _write_last(axes: Axes, values: Array, scale: str, colour: str, y: float) -> None:
    text = format_number(last_finite(values), scale, digits=3)
    axes.text(1, y, text, transform=axes.transAxes, fontsize=9, fontweight="bold", color=colour, ha="right")

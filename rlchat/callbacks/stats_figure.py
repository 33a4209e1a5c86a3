"""The picture of a run: what was logged, drawn so that one look in a README tells how it went.

:func:`draw_stats` is a pure function from numbers to a figure. It uses matplotlib's objects and never ``pyplot``, so
that it neither needs a display nor touches the state of a program that draws for itself.
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

Array = np.ndarray

# Paul Tol's colour schemes, told apart with any colour vision: "bright" for the two main lines, "muted" for factors.
_TRAIN = "#4477AA"
_HELD_OUT = "#D0562A"
_FACTORS = ("#332288", "#CC6677", "#44AA99", "#999933", "#882255", "#88CCEE", "#117733", "#DDCC77", "#AA4499")
_INK, _QUIET, _GRID = "#222222", "#777777", "#E6E6E6"

# Inches.
_WIDTH, _PANEL_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 11.0, 1.75, 0.65, 0.25, 1.3, 0.55
_ROW_GAP, _COLUMN_GAP = 0.85, 0.7

_MOST_FACTORS = 12
_LONGEST_NAME, _LONGEST_TITLE = 30, 80


@dataclass(frozen=True)
class _Panel:
    """``train/<metric>`` and ``val/<metric>`` in one pair of axes; ``log`` allows, not orders, a logarithmic axis."""

    metric: str
    title: str
    unit: str
    scale: Literal["number", "share"] = "number"
    log: bool = False


_REWARD = _Panel("reward", "Reward", "points a reply")
_PANELS = (
    _Panel("loss", "Loss", "nats"),
    _Panel("pair_loss", "Pair loss", "nats a pair"),
    _Panel("pair_accuracy", "Pair accuracy", "share of pairs ranked right", "share"),
    _Panel("right_over_wrong", "Right over wrong", "share of right replies ranked above wrong ones", "share"),
    _Panel("answer_accuracy", "Right answers", "share of prompts", "share"),
    _Panel("policy_loss", "Policy loss", "clipped surrogate"),
    _Panel("value_loss", "Value loss", "points squared"),
    _Panel("entropy", "Entropy", "nats a token"),
    _Panel("kl", "KL to the reference", "nats a reply"),
    _Panel("accuracy", "Token accuracy", "share of tokens", "share"),
    _Panel("perplexity", "Perplexity", "tokens to choose from", log=True),
    _Panel("response_length", "Reply length", "tokens"),
)


def draw_stats(
    history: Mapping[str, tuple[Sequence[int], Sequence[float]]], title: str, batches: int | None = None
) -> Figure:
    """The figure of a run.

    Args:
        history: metric → (training batches seen, values), as logged: ``train/…``, ``val/…`` and ``reward/<factor>``.
            Values that are not finite are marked on the horizontal axis. Metrics that no panel shows are left out.
        title: the name of the run.
        batches: training batches seen so far; by default the last that ``history`` knows.

    Returns:
        A figure of fixed width with a panel for each metric that has data, and one line of text where none has.
    """
    curves = {name: _Curve.of(steps, values) for name, (steps, values) in history.items() if len(steps)}
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


@dataclass(frozen=True)
class _Curve:
    steps: Array  # [points] training batches seen, ascending
    values: Array  # [points] float64, NaN where the value was not finite

    @classmethod
    def of(cls, steps: Sequence[int], values: Sequence[float]) -> _Curve:
        numbers = np.asarray(values, dtype=np.float64)
        return cls(np.asarray(steps, dtype=np.float64), np.where(np.isfinite(numbers), numbers, np.nan))

    @property
    def finite(self) -> Array:
        return self.values[np.isfinite(self.values)]

    @property
    def broken_steps(self) -> Array:
        return self.steps[np.isnan(self.values)]

    def smoothed(self, is_log: bool = False) -> Array:
        """[points] Straight lines fitted locally, under a Gaussian as wide as 3% of the curve; outliers are drawn in.

        Unlike a running mean it neither lags nor bends at the ends (Fan 1992). NaN stays NaN and does not spread.
        """
        sigma = 0.03 * len(self.values)
        if sigma < 0.4 or not len(self.finite):
            return self.values
        values = np.log(self.values) if is_log else self.values
        known = np.isfinite(values)
        values = np.clip(values, *_fence(values[known]))

        reach = int(3 * sigma) + 1
        offsets = np.arange(-reach, reach + 1)
        kernel = np.exp(-0.5 * (offsets / sigma) ** 2)

        def local_sum(what: Array, power: int) -> Array:
            # A convolution turns the kernel round, so that offsets count from a point's neighbour to the point.
            return np.convolve(what, kernel * (-offsets) ** power)[reach : reach + len(values)]

        weights, ordinates = known.astype(np.float64), np.where(known, values, 0.0)
        s0, s1, s2 = (local_sum(weights, power) for power in (0, 1, 2))
        t0, t1 = (local_sum(ordinates, power) for power in (0, 1))
        spread = s0 * s2 - s1**2
        with np.errstate(invalid="ignore", divide="ignore"):
            fitted = np.where(spread > 1e-6 * s0**2, (s2 * t0 - s1 * t1) / spread, t0 / s0)
        fitted = np.where(known, fitted, np.nan)
        return np.exp(fitted) if is_log else fitted


class _Page:
    """Places axes by inches, so that panels keep their size whatever their number."""

    def __init__(self, figure: Figure, height: float, row_count: int) -> None:
        self.figure, self.height, self.row_count = figure, height, row_count

    def row_of_axes(self, row: int, shares: Sequence[float], right: float = _RIGHT) -> list[Axes]:
        """Axes from left to right that divide the width, less ``right`` inches at its end, in ``shares``."""
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


def _has_data(panel: _Panel, curves: Mapping[str, _Curve]) -> bool:
    return f"train/{panel.metric}" in curves or f"val/{panel.metric}" in curves


def _balanced_rows(panels: list[_Panel], per_row: int) -> list[list[_Panel]]:
    """As few rows as can be, and no row more than one panel shorter than another."""
    count = -(-len(panels) // per_row)
    rows, start = [], 0
    for row in range(count):
        stop = start + len(panels) // count + (row < len(panels) % count)
        rows.append(panels[start:stop])
        start = stop
    return rows


def _draw_header(page: _Page, title: str, batches: int, curves: Mapping[str, _Curve]) -> None:
    def inches(x: float, from_top: float) -> tuple[float, float]:
        return x / _WIDTH, 1 - from_top / page.height

    page.figure.text(
        *inches(_LEFT, 0.42), _plain(_shortened(title, _LONGEST_TITLE)), fontsize=14, fontweight="bold", color=_INK
    )
    seen = "nothing logged yet" if not curves else f"{batches:,} training batch{'' if batches == 1 else 'es'}"
    page.figure.text(*inches(_LEFT, 0.66), seen, fontsize=9, color=_QUIET)

    keys: list[Artist] = []
    shown = [curve for name, curve in curves.items() if name.startswith("train/")]
    if shown:
        keys.append(Line2D([], [], color=_TRAIN, alpha=0.4, linewidth=0.8, label="training"))
        keys.append(Line2D([], [], color=_TRAIN, linewidth=1.8, label="training, smoothed"))
    if any(name.startswith("val/") for name in curves):
        keys.append(Line2D([], [], color=_HELD_OUT, linewidth=1, marker="o", markersize=4.5, label="held-out"))
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


def _draw_reward_row(page: _Page, curves: Mapping[str, _Curve], factors: Mapping[str, _Curve], end: int) -> None:
    shares = [1.0] * _has_data(_REWARD, curves) + [1.3] * bool(factors)
    longest = min(_LONGEST_NAME, max(map(len, factors), default=0))
    axes = page.row_of_axes(0, shares, right=1.0 + 0.066 * longest if factors else _RIGHT)
    if _has_data(_REWARD, curves):
        _draw_panel(axes[0], _REWARD, curves, end)
    if factors:
        _draw_factors(axes[-1], factors, end)


def _draw_panel(axes: Axes, panel: _Panel, curves: Mapping[str, _Curve], end: int) -> None:
    train, held_out = (curves.get(f"{split}/{panel.metric}") for split in ("train", "val"))
    shown = [curve for curve in (train, held_out) if curve is not None]
    low, high, is_log = _limits(np.concatenate([curve.finite for curve in shown]), panel.log)
    _style(axes, panel.title, panel.unit, end)
    _style_values(axes, low, high, is_log, panel.scale)
    if not any(len(curve.finite) for curve in shown):
        _say_empty(axes)

    if train is not None:
        smoothed = train.smoothed(is_log)
        alone = "o" if len(train.finite) == 1 else ""
        axes.plot(train.steps, train.values, color=_TRAIN, alpha=0.4, linewidth=0.8)
        axes.plot(train.steps, smoothed, color=_TRAIN, linewidth=1.8, marker=alone, markersize=4.5, zorder=3)
        _write_last(axes, smoothed, panel.scale, _TRAIN, y=1.06)
    if held_out is not None:
        size = 4.5 if len(held_out.values) <= 30 else 2.5
        axes.plot(held_out.steps, held_out.values, color=_HELD_OUT, linewidth=1, marker="o", markersize=size, zorder=4)
        _write_last(axes, held_out.values, panel.scale, _HELD_OUT, y=1.19)
    for curve, colour in ((train, _TRAIN), (held_out, _HELD_OUT)):
        if curve is not None:
            _mark_unseen(axes, curve, low, high, colour)


def _draw_factors(axes: Axes, factors: Mapping[str, _Curve], end: int) -> None:
    """Smoothed lines, each named at its right end, in the order in which they end."""
    weight = {name: float(np.max(np.abs(curve.finite), initial=0)) for name, curve in factors.items()}
    chosen = sorted(sorted(factors), key=lambda name: -weight[name])[:_MOST_FACTORS]
    unit = "points a reply, weight included"
    if len(chosen) < len(factors):
        unit += f"; the {len(chosen)} largest of {len(factors)}"
    smoothed = {name: factors[name].smoothed() for name in chosen}
    everything = np.concatenate([values[np.isfinite(values)] for values in smoothed.values()])
    low, high, _ = _limits(everything, may_be_log=False)
    _style(axes, "Reward by factor", unit, end)
    _style_values(axes, low, high, is_log=False, scale="number")
    if not len(everything):
        _say_empty(axes)

    lasts = {name: _last(values) for name, values in smoothed.items()}
    # Where a label wants to be, and where it can be without covering its neighbours: in shares of the height.
    wishes = {name: 0.5 if np.isnan(last) else (last - low) / (high - low) for name, last in lasts.items()}
    in_order = sorted(chosen, key=lambda name: wishes[name])
    heights = _spread([wishes[name] for name in in_order], gap=10.5 / (72 * _PANEL_HEIGHT), low=-0.1, high=1.1)
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
        label = f"{_signed(lasts[name])}  {_plain(_shortened(name.replace('_', ' '), _LONGEST_NAME))}"
        axes.text(1.07, height, label, transform=axes.transAxes, fontsize=8, color=_INK, va="center_baseline")
        _mark_unseen(axes, curve, low, high, colour, only_broken=True)


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


def _say_empty(axes: Axes) -> None:
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
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _number(y, scale)))
    axes.set_ylim(low, high)


def _fence(finite: Array) -> tuple[float, float]:
    """The least and the greatest of ``finite``, save for outliers so far off that they would flatten the rest.

    An outlier lies beyond the middle 90% by more than four times the width of that.
    """
    if len(finite) >= 20:
        fifth, ninety_fifth = np.quantile(finite, (0.05, 0.95))
        reach = 4 * (ninety_fifth - fifth)
        if reach > 0:
            finite = finite[(finite >= fifth - reach) & (finite <= ninety_fifth + reach)]
    return float(finite.min()), float(finite.max())


def _limits(finite: Array, may_be_log: bool) -> tuple[float, float, bool]:
    """(low, high, logarithmic) of the axis: logarithmic where allowed and where the values span a factor of 20."""
    if not len(finite):
        return 0.0, 1.0, False
    if may_be_log and finite.min() > 0:
        low, high = _fence(np.log10(finite))
        if high - low > np.log10(20):
            room = 0.06 * (high - low)
            return 10 ** (low - room), 10 ** (high + room), True
    low, high = _fence(finite)
    room = 0.06 * (high - low)
    # A constant gets room on both sides; adjacent floats are a constant as far as a picture is concerned.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = 0.1 * abs(high) or 0.5
    # What cannot be negative stands on zero.
    return (max(0.0, low - room) if low >= 0 else low - room), high + room, False


def _mark_unseen(axes: Axes, curve: _Curve, low: float, high: float, colour: str, only_broken: bool = False) -> None:
    """A cross on the axis where a value was not finite, a triangle at the edge where one lies beyond it."""
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
    text = _number(_last(values), scale, digits=3)
    axes.text(1, y, text, transform=axes.transAxes, fontsize=9, fontweight="bold", color=colour, ha="right")


def _last(values: Array) -> float:
    """The last finite value, NaN where there is none."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else float("nan")


def _spread(wishes: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places at least ``gap`` apart and as near to the ascending ``wishes`` as can be, in ``low..high``."""
    # Labels that collide form a block that stands around the mean of its wishes (pool adjacent violators).
    blocks: list[tuple[float, int]] = []  # where the block's first label wants to be, labels in it
    for index, wish in enumerate(wishes):
        start, size = wish - index * gap, 1
        while blocks and blocks[-1][0] > start:
            before, count = blocks.pop()
            start, size = (before * count + start * size) / (count + size), count + size
        blocks.append((start, size))
    starts = [start for start, size in blocks for _ in range(size)]
    last_start = max(low, high - (len(wishes) - 1) * gap)
    return [min(max(start, low), last_start) + index * gap for index, start in enumerate(starts)]


def _number(value: float, scale: str, digits: int = 6) -> str:
    if np.isnan(value):
        return "–"
    if scale == "share":
        return f"{100 * value:.{digits}g}%".replace("-", "−")
    if abs(value) >= 1e6:
        return f"{value:.{min(digits, 3)}g}".replace("e+0", "e").replace("e+", "e").replace("-", "−")
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    return f"{0.0 if abs(value) < 1e-12 else value:.{digits}g}".replace("-", "−")


def _signed(value: float) -> str:
    if np.isnan(value):
        return "–"
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}".replace("-", "−")


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _plain(text: str) -> str:
    """``text`` without the meaning that matplotlib gives to dollar signs."""
    return text.replace("$", r"\$")

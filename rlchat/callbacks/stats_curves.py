"""The data of the stats plot: curves, their smoothing, the limits of axes, and numbers as text. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Curve:
    steps: Array  # [points] training batches seen, ascending
    values: Array  # [points] float64, NaN where the value was not finite

    @classmethod
    def of(cls, steps: Sequence[int], values: Sequence[float]) -> Curve:
        numbers = np.asarray(values, dtype=np.float64)
        return cls(np.asarray(steps, dtype=np.float64), np.where(np.isfinite(numbers), numbers, np.nan))

    @property
    def finite(self) -> Array:
        return self.values[np.isfinite(self.values)]

    @property
    def broken_steps(self) -> Array:
        return self.steps[np.isnan(self.values)]

    def smoothed(self, is_log: bool = False) -> Array:
        """[points] Local linear regression, with a Gaussian kernel as wide as 3% of the curve, after clipping outliers.

        Unlike a running mean it has no lag and no bias at the ends (Fan 1992). NaN stays NaN and does not spread.
        """
        sigma = 0.03 * len(self.values)
        if sigma < 0.4 or not len(self.finite):
            return self.values
        values = np.log(self.values) if is_log else self.values
        known = np.isfinite(values)
        values = np.clip(values, *fence(values[known]))

        reach = int(3 * sigma) + 1
        offsets = np.arange(-reach, reach + 1)
        kernel = np.exp(-0.5 * (offsets / sigma) ** 2)

        def local_sum(what: Array, power: int) -> Array:
            # A convolution reverses the kernel, hence the minus: offsets count from a neighbor to the point.
            return np.convolve(what, kernel * (-offsets) ** power)[reach : reach + len(values)]

        weights, ordinates = known.astype(np.float64), np.where(known, values, 0.0)
        s0, s1, s2 = (local_sum(weights, power) for power in (0, 1, 2))
        t0, t1 = (local_sum(ordinates, power) for power in (0, 1))
        spread = s0 * s2 - s1**2
        with np.errstate(invalid="ignore", divide="ignore"):
            fitted = np.where(spread > 1e-6 * s0**2, (s2 * t0 - s1 * t1) / spread, t0 / s0)
        fitted = np.where(known, fitted, np.nan)
        return np.exp(fitted) if is_log else fitted


def fence(finite: Array) -> tuple[float, float]:
    """The minimum and maximum of ``finite`` without outliers, which would flatten the rest of the curve.

    A value is an outlier if its distance from the middle 90% is more than four times the width of that range.
    """
    if len(finite) >= 20:
        fifth, ninety_fifth = np.quantile(finite, (0.05, 0.95))
        reach = 4 * (ninety_fifth - fifth)
        if reach > 0:
            finite = finite[(finite >= fifth - reach) & (finite <= ninety_fifth + reach)]
    return float(finite.min()), float(finite.max())


def limits(finite: Array, may_be_log: bool) -> tuple[float, float, bool]:
    """(low, high, logarithmic) of the axis: logarithmic if allowed and if the values span a factor of 20."""
    if not len(finite):
        return 0.0, 1.0, False
    if may_be_log and finite.min() > 0:
        low, high = fence(np.log10(finite))
        if high - low > np.log10(20):
            room = 0.06 * (high - low)
            return 10 ** (low - room), 10 ** (high + room), True
    low, high = fence(finite)
    room = 0.06 * (high - low)
    # A constant gets a margin on both sides; so do values that differ by rounding only.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = 0.1 * abs(high) or 0.5
    # An axis of values that are never negative does not extend below zero.
    return (max(0.0, low - room) if low >= 0 else low - room), high + room, False


def last_finite(values: Array) -> float:
    """The last finite value, NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else float("nan")


def spread_labels(wishes: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending positions in ``low..high``, at least ``gap`` apart, as near as possible to the ascending ``wishes``."""
    # Labels that collide form a block, which is centered on the mean of its wishes (pool adjacent violators).
    blocks: list[tuple[float, int]] = []  # the wish of the block's first label, the number of labels
    for index, wish in enumerate(wishes):
        start, size = wish - index * gap, 1
        while blocks and blocks[-1][0] > start:
            before, count = blocks.pop()
            start, size = (before * count + start * size) / (count + size), count + size
        blocks.append((start, size))
    starts = [start for start, size in blocks for _ in range(size)]
    last_start = max(low, high - (len(wishes) - 1) * gap)
    return [min(max(start, low), last_start) + index * gap for index, start in enumerate(starts)]


def format_number(value: float, scale: str, digits: int = 6) -> str:
    if np.isnan(value):
        return "–"
    if scale == "share":
        return f"{100 * value:.{digits}g}%".replace("-", "−")
    if abs(value) >= 1e6:
        return f"{value:.{min(digits, 3)}g}".replace("e+0", "e").replace("e+", "e").replace("-", "−")
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    return f"{0.0 if abs(value) < 1e-12 else value:.{digits}g}".replace("-", "−")


def format_signed(value: float) -> str:
    if np.isnan(value):
        return "–"
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}".replace("-", "−")


def shorten(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def escape_dollars(text: str) -> str:
    """``text`` with dollar signs escaped, which matplotlib would read as a formula."""
    return text.replace("$", r"\$")

"""Bands from measured values: what a lesson states about seeds that it was not measured with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lessons.lesson import UNMEASURED, Lesson

_LEAST = 0.05  # of the value: the least margin, for figures that hardly depend on the seed


def band(values: Sequence[float]) -> tuple[float, float]:
    """The range of ``values``, wider by its own width on both sides, or by 5 % of the largest value if that is more.

    For five normal values, that is about 3.5 standard deviations on each side of the mean. It stays at or above 0 if
    all values do, and at or below 1 if the largest value is 1. It is rounded outwards.
    """
    low, high = min(values), max(values)
    margin = max(high - low, _LEAST * max(abs(low), abs(high))) or _LEAST
    digits = max(0, math.ceil(1 - math.log10(margin)))
    unit = 10.0**-digits
    bottom, top = math.floor((low - margin) / unit) * unit, math.ceil((high + margin) / unit) * unit
    if low >= 0:
        bottom = max(bottom, 0.0)
    if high == 1:
        top = 1.0
    return round(bottom, digits), round(top, digits)


def write_bands(lesson: Lesson, values: Sequence[dict[str, float]]) -> None:
    """Fills in the expected values and bands that are ``?`` in the lesson's table, from its figures with several seeds.

    The expected value is that of the first seed.
    """
    lines = lesson.path.read_text(encoding="utf-8").splitlines(keepends=True)
    for figure in lesson.figures:
        found = [of_seed[figure.name] for of_seed in values]
        (place,) = [i for i, line in enumerate(lines) if line.startswith(f"| {figure.name} |")]
        cells = lines[place].split(" | ")
        if cells[-1].strip(" |\n") == UNMEASURED:
            low, high = band(found)
            lines[place] = " | ".join([*cells[:-2], f"{found[0]:.3g}", f"{low:g} to {high:g} |\n"])
    Path(lesson.path).write_text("".join(lines), encoding="utf-8")

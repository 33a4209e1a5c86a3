"""The table of a study: in the terminal, and as Markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from rlchat.study.fits import Fit
from rlchat.study.results import Group, frontier

HEADINGS = (
    "method",
    "width",
    "comparisons",
    "KL coef.",
    "accuracy",
    "α",
    "β",
    "R²",
    "turnover √KL",
    "best at √KL",
    "best gold",
    "last gold",
    "last proxy",
)
SHORT = {
    "comparisons": "pairs",
    "KL coef.": "KL\ncoef.",
    "turnover √KL": "turnover\n√KL",
    "best gold": "best\ngold",
    "last gold": "last\ngold",
    "last proxy": "last\nproxy",
}
"""Shorter headings for the terminal."""
_ONLY_IN_FILES = ("α", "β", "best at √KL")
_METHODS = {"best_of": "best of n", "rl": "PPO"}
_FRONTIER = ("KL coef.", "last √KL", "last gold", "gold without a penalty at this √KL")


def rows_of(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """One row of texts per group, in the order of :data:`HEADINGS`; a range is from the lowest to the highest seed."""
    rows: list[tuple[str, ...]] = []
    for group in groups:
        fit, fits, curves = group.fit, group.fits, group.curves
        best_d, best_gold = ([curve.best[i] for curve in curves] for i in (0, 1))
        fitted = ("–",) * 4
        if fit is not None:
            fitted = (
                f"{fit.alpha:.2f}",
                f"{fit.beta:.2f}",
                with_range(fit.r2, [one.r2 for one in fits]),
                with_range(fit.turnover, [one.turnover for one in fits]),
            )
        rows.append(
            (
                _METHODS[group.form],
                str(group.width),
                str(group.amount),
                f"{group.kl_coef:g}" if group.form == "rl" else "–",
                f"{group.accuracy:.2f}",
                *fitted,
                with_range(_mean(best_d), best_d),
                with_range(_mean(best_gold), best_gold),
                with_range(_mean([curve.gold[-1] for curve in curves]), [curve.gold[-1] for curve in curves]),
                f"{_mean([curve.proxy[-1] for curve in curves]):.2f}",
            )
        )
    return rows


def with_range(value: float, seeds: Sequence[float]) -> str:
    """``value`` with the lowest and the highest of the ``seeds``, if there are several: ``1.20 (0.90 to 1.40)``."""
    if len(seeds) < 2:
        return _number(value)
    return f"{_number(value)} ({_number(min(seeds))} to {_number(max(seeds))})"


def terminal_table(groups: Sequence[Group]) -> Table:
    """The columns that 80 characters have room for, without the ranges over seeds."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    shown = {heading: SHORT.get(heading, heading) for heading in HEADINGS if heading not in _ONLY_IN_FILES}
    for heading, short in shown.items():
        table.add_column(short, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in rows_of(groups):
        cells = zip(HEADINGS, row, strict=True)
        table.add_row(*(text.partition(" (")[0] for heading, text in cells if heading in shown))
    return table


def markdown(groups: Sequence[Group]) -> str:
    """The same table, and that of the KL penalty, as Markdown."""
    parts = [_markdown(HEADINGS, rows_of(groups))]
    penalized = [tuple(f"{value:.2f}" for value in row) for row in frontier(groups)]
    if penalized:
        parts.append(_markdown(_FRONTIER, penalized))
    return "\n".join(parts)


def as_values(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The groups as plain values, for ``results.json``; a turnover that does not exist is null."""
    return [
        {
            "method": group.form,
            "width": group.width,
            "comparisons": group.amount,
            "kl_coef": group.kl_coef,
            "accuracy": group.accuracy,
            "fit": _fit_values(group.fit),
            "fits": [_fit_values(fit) for fit in group.fits],
            "curves": [
                {"seed": curve.seed, "d": curve.d.tolist(), "gold": curve.gold.tolist(), "proxy": curve.proxy.tolist()}
                for curve in group.curves
            ],
        }
        for group in groups
    ]


def _fit_values(fit: Fit | None) -> dict[str, Any] | None:
    if fit is None:
        return None
    found = {"alpha": fit.alpha, "beta": fit.beta, "r2": fit.r2, "turnover": fit.turnover, "peak": fit.peak}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _number(value: float) -> str:
    if math.isinf(value):
        return "none"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0e}"


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))

"""The curves of a run: its metrics over iterations, from the files of its loggers."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

Curves = dict[str, tuple[list[float], list[float]]]
"""Iterations and values of each metric."""

_MOST_POINTS = 400  # of a curve; more would not be visible


def log_files(run: Path) -> list[Path]:
    """The files that :func:`read_curves` reads: ``metrics.csv``, or TensorBoard's event files if it is missing."""
    table = run / "metrics.csv"
    return [table] if table.is_file() else sorted(run.glob("events.out.tfevents.*"))


def stamp(run: Path) -> str:
    """A text that changes when the files do."""
    states = [path.stat() for path in log_files(run)]
    return "-".join(f"{state.st_size}.{state.st_mtime_ns}" for state in states)


def read_curves(run: Path) -> Curves:
    """All metrics that the loggers have written to the folder ``run``; empty if there are none.

    Lightning numbers the batches from 0, and one batch is one iteration.
    """
    points: dict[str, dict[int, float]] = {}
    table = run / "metrics.csv"
    for name, step, value in _of_table(table) if table.is_file() else _of_tensorboard(run):
        if math.isfinite(value):
            points.setdefault(name, {})[step + 1] = value
    return {name: _thinned(sorted(curve.items())) for name, curve in sorted(points.items())}


def _of_table(path: Path) -> Iterator[tuple[str, int, float]]:
    """The cells of Lightning's ``metrics.csv``. A line that is still being written is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if name in ("step", "epoch") or not cell or not isinstance(cell, str):
                    continue
                try:
                    yield name, int(row["step"]), float(cell)
                except (KeyError, ValueError):
                    continue


def _of_tensorboard(run: Path) -> Iterator[tuple[str, int, float]]:
    if not log_files(run):
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    for name in events.Tags()["scalars"]:
        if name not in ("epoch", "hp_metric"):
            for event in events.Scalars(name):
                yield name, event.step, event.value


def _thinned(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """At most ``_MOST_POINTS`` points with 4 significant digits: the ends, and means of neighbors between them."""
    inner = points[1:-1]
    stride = max(1, -(-len(inner) // (_MOST_POINTS - 2)))
    parts = [inner[start : start + stride] for start in range(0, len(inner), stride)]
    parts = [points[:1], *parts, *([points[-1:]] if len(points) > 1 else [])]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
    return [round(x, 1) for x, _ in means], [float(f"{y:.4g}") for _, y in means]

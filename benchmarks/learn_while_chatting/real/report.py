"""The table and the figure of the benchmark with a real chat model, from the figures of its runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.learn_while_chatting.report import with_interval

Run = Mapping[str, Any]
_INK, _QUIET, _GRID = "#222222", "#777777", "#E6E6E6"
_COLOURS = {False: "#D95F02", True: "#1F77B4"}  # without and with the gate


class Results:
    """The figures of the model before it learns, and of all runs by preference and number of verdicts.

    Args:
        runs: the figures of :func:`benchmarks.learn_while_chatting.real.pieces.run`, the first without verdicts.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.start: Mapping[str, Any] = runs[0]["figures"]
        self.groups: dict[tuple[str, int], list[Run]] = {}
        for run in runs[1:]:
            self.groups.setdefault((run["preference"], run["verdicts"]), []).append(run)

    def preferences(self) -> list[str]:
        """Those that were taught."""
        return sorted({preference for preference, _ in self.groups})

    def taught(self, run: Run, *, gate: bool) -> float:
        """The share of replies as the user wants, in percent. A gate keeps the model if it rejects the version."""
        figures = self.start if gate and not run["accepted"] else run["figures"]
        return 100 * float(figures["taught"][run["preference"]])


def table(runs: Sequence[Run]) -> str:
    """One row per preference and number of verdicts in Markdown: before, and the changes."""
    results = Results(runs)
    rows = [
        "| preference | verdicts | as wanted before | no gate | accepted | by default | gate | right answers "
        "| perplexity | KL | words | agreement | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (preference, verdicts), found in sorted(results.groups.items()):
        start = results.start
        before = 100 * start["taught"][preference]
        gains = [with_interval([results.taught(run, gate=gate) - before for run in found]) for gate in (False, True)]
        names = ("accepted", "accepted_by_default")
        accepted = [f"{sum(run[name] for run in found)} of {len(found)}" for name in names]
        rises = [100 * (run["figures"]["perplexity"] / start["perplexity"] - 1) for run in found]
        cells = [preference, verdicts, f"{before:.0f} %", gains[0], *accepted, gains[1]]
        cells += [_before_and_after(start, found, "correct"), f"{with_interval(rises)} %"]
        cells += [f"{statistics.mean(run['figures']['kl'] for run in found):.1f}"]
        cells += [_before_and_after(start, found, "words"), _agreement(found)]
        cells += [f"{statistics.mean(run['round_cpu_seconds'] for run in found):.0f}"]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def _before_and_after(start: Mapping[str, Any], runs: Sequence[Run], name: str) -> str:
    """The figure ``name`` before, and its mean after."""
    return f"{start[name]:.1f} → {statistics.mean(run['figures'][name] for run in runs):.1f}"


def _agreement(runs: Sequence[Run]) -> str:
    """The mean agreement with held-back verdicts before and after; a dash without them."""
    known = [run["gate"] for run in runs if run["gate"]["after"]["agrees"] is not None]
    if not known:
        return "–"
    shares = [statistics.mean(g[when]["agrees"] / g[when]["verdicts"] for g in known) for when in ("before", "after")]
    return " → ".join(f"{share:.0%}" for share in shares)


def draw(runs: Sequence[Run]) -> Figure:
    """The share of replies as the user wants against the number of verdicts: a panel for each preference."""
    results = Results(runs)
    panels = results.preferences()
    figure = Figure((5.2 * max(len(panels), 1), 4.0), layout="constrained")
    titles = {"short": "One short sentence", "thanks": "Thanks for asking."}
    row = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axes, preference in zip(row, panels, strict=False):  # without a run, one empty panel
        found = {verdicts: rows for (name, verdicts), rows in sorted(results.groups.items()) if name == preference}
        for gate, label in ((False, "without the gate"), (True, "with the gate")):
            points = {0: [100 * results.start["taught"][preference]]} | {
                n: [results.taught(run, gate=gate) for run in rows] for n, rows in found.items()
            }
            places = sorted(points)
            shifted = [place + (0.4 if gate else -0.4) for place in places]
            axes.plot(shifted, [statistics.mean(points[n]) for n in places], color=_COLOURS[gate], label=label)
            for place, n in zip(shifted, places, strict=True):
                axes.plot([place] * len(points[n]), points[n], "o", color=_COLOURS[gate], markersize=4, alpha=0.6)
        axes.set_title(f"SmolLM2-135M: {titles[preference]}", loc="left", fontsize=11, color=_INK)
        axes.set_xlabel("verdicts", color=_QUIET)
        axes.set_ylabel("held-out replies as the user wants, %", color=_QUIET)
        axes.set_ylim(-3, 103)
        axes.set_xticks([0, *found])
        axes.grid(color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="best")
    return figure

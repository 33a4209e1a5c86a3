"""The tables and the figure of the benchmark, from the figures of its runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Runs = Sequence[Mapping[str, Any]]
Group = tuple[str, str, str, float, int]
"""Preference, method, form, share of wrong verdicts, number of verdicts."""

# 97.5 % quantiles of Student's t distribution, by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_INK, _QUIET, _GRID = "#222222", "#777777", "#E6E6E6"
_COLOURS = ("#1F77B4", "#D95F02", "#2A9D5C", "#8E5AA8")


def group_of(run: Mapping[str, Any]) -> Group:
    """What the runs of all seeds in a row of the table have in common."""
    return run["preference"], run["method"], run["form"], run["wrong"], run["verdicts"]


class Results:
    """The figures of all runs, by group and seed.

    Args:
        runs: the figures of :func:`benchmarks.learn_while_chatting.pieces.run`.
    """

    def __init__(self, runs: Runs) -> None:
        self.starts = {(run["preference"], run["seed"]): run["gold"] for run in runs if not run["verdicts"]}
        self.groups: dict[Group, list[Mapping[str, Any]]] = {}
        self.chained: dict[Group, list[Mapping[str, Any]]] = {}  # of the runs with a round after each `every` verdicts
        for run in runs:
            if run["verdicts"] and (run["preference"], run["seed"]) in self.starts:
                groups = self.chained if run["every"] else self.groups
                groups.setdefault(group_of(run), []).append(run)

    def change(self, run: Mapping[str, Any], measure: str, *, gate: bool) -> float:
        """How much ``measure`` of the gold accuracy changes, in points. A gate keeps the model if it rejects."""
        if gate and not run["accepted"]:
            return 0.0
        return self.gain(run, run["gold"], measure)

    def gain(self, run: Mapping[str, Any], gold: Mapping[str, float], measure: str) -> float:
        """How many points ``measure`` is higher in ``gold`` than before ``run``."""
        return 100 * (gold[measure] - self.starts[run["preference"], run["seed"]][measure])

    def level(self, run: Mapping[str, Any], measure: str, *, gate: bool) -> float:
        """``measure`` of the gold accuracy after learning, in percent."""
        return 100 * self.starts[run["preference"], run["seed"]][measure] + self.change(run, measure, gate=gate)


def with_interval(values: Sequence[float]) -> str:
    """The mean and half the width of its 95 % t interval over seeds, as text."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.1f}"
    half = _T[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.1f} ± {half:.1f}"


def table(runs: Runs) -> str:
    """One row per group in Markdown: gold accuracy before, and its changes without and with the gate."""
    results = Results(runs)
    rows = [
        "| preference | method | form | wrong | verdicts | taught before | taught, no gate | others, no gate "
        "| accepted | taught, gate | others, gate | agreement |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in sorted(results.groups):
        found = results.groups[group]
        preference, method, form, wrong, verdicts = group
        before = statistics.mean(100 * results.starts[preference, run["seed"]]["taught"] for run in found)
        changes = [
            with_interval([results.change(run, measure, gate=gate) for run in found])
            for gate in (False, True)
            for measure in ("taught", "others")
        ]
        accepted = f"{sum(run['accepted'] for run in found)} of {len(found)}"
        cells = [preference, method.upper(), form, f"{wrong:.0%}", verdicts, f"{before:.0f} %", *changes[:2]]
        rows.append("| " + " | ".join(map(str, [*cells, accepted, *changes[2:], _agreement(found)])) + " |")
    return "\n".join(rows)


def chained_table(runs: Runs) -> str:
    """The gold accuracy while the model in use learns again and again: one row per group, one column per quarter."""
    results = Results(runs)
    quarters = (0.25, 0.5, 0.75, 1.0)
    rows = [
        "| preference | method | form | wrong | verdicts | accepted rounds | taught after a quarter | after half "
        "| after three quarters | taught at the end | others, lowest | others at the end |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in sorted(results.chained):
        found = results.chained[group]
        preference, method, form, wrong, verdicts = group
        rounds = [one for run in found for one in run["rounds"]]
        accepted = f"{sum(one['accepted'] for one in rounds)} of {len(rounds)}"
        taught = [
            with_interval([results.gain(run, _round_at(run, share)["gold"], "taught") for run in found])
            for share in quarters
        ]
        lowest = [min(results.gain(run, one["gold"], "others") for one in run["rounds"]) for run in found]
        others = [results.gain(run, run["gold"], "others") for run in found]
        cells = [preference, method.upper(), form, f"{wrong:.0%}", verdicts, accepted, *taught]
        rows.append("| " + " | ".join(map(str, [*cells, f"{min(lowest):+.1f}", with_interval(others)])) + " |")
    return "\n".join(rows)


def _round_at(run: Mapping[str, Any], share: float) -> Mapping[str, Any]:
    """The last round within ``share`` of the verdicts of ``run``."""
    rounds: Sequence[Mapping[str, Any]] = run["rounds"]
    return [one for one in rounds if one["verdicts"] <= share * run["verdicts"]][-1]


def _agreement(runs: Runs) -> str:
    """The mean agreement with held-back verdicts before and after, as text; a dash without them."""
    known = [run for run in runs if run["after"]["agrees"] is not None and run["after"]["verdicts"]]
    if not known:
        return "–"
    before, after = (statistics.mean(run[when]["agrees"] / run[when]["verdicts"] for run in known) for when in _WHEN)
    return f"{before:.0%} → {after:.0%}"


_WHEN = ("before", "after")


def draw(runs: Runs) -> Figure:
    """Three panels: gold accuracy against verdicts, against wrong verdicts, and for the user's preferences."""
    results = Results(runs)
    figure = Figure((13.0, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    forms = [(f"{m.upper()}, {f}", "facts", m, f) for f in ("edits", "thumbs") for m in ("dpo", "ppo")]
    _by_verdicts(left, results, [form for form in forms if _curve(results, *form[1:])])
    left.set_title("New facts: capitals", loc="left", fontsize=11, color=_INK)
    _by_wrong(middle, results)
    styles = [(f"{p}, {f}", p, "dpo", f) for p in ("politeness", "shortness") for f in ("edits", "thumbs")]
    _by_verdicts(right, results, [style for style in styles if _curve(results, *style[1:])])
    right.set_title("New style, DPO", loc="left", fontsize=11, color=_INK)
    for axes in (left, middle, right):
        axes.grid(color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="best")
    return figure


def _curve(results: Results, preference: str, method: str, form: str) -> dict[int, Runs]:
    """The runs with right verdicts, by number of verdicts."""
    wanted = (preference, method, form, 0.0)
    return {group[4]: results.groups[group] for group in sorted(results.groups) if group[:4] == wanted}


def _by_verdicts(axes: Axes, results: Results, curves: Iterable[tuple[str, str, str, str]]) -> None:
    for (label, preference, method, form), colour in zip(curves, _COLOURS, strict=False):
        found = _curve(results, preference, method, form)
        starts = [100 * gold["taught"] for (name, _), gold in results.starts.items() if name == preference]
        points = {0: starts} | {n: [results.level(r, "taught", gate=True) for r in runs] for n, runs in found.items()}
        _line(axes, points, label, colour)
        others = [100 * gold["others"] for (name, _), gold in results.starts.items() if name == preference]
        kept = {0: others} | {n: [results.level(r, "others", gate=True) for r in runs] for n, runs in found.items()}
        _line(axes, kept, "", colour, "--")
    axes.plot([], [], "--", color=_QUIET, label="other kinds")
    axes.set_xscale("symlog", linthresh=8)
    ticks = (0, 8, 25, 50, 100, 200, 500)
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()
    axes.set_ylim(-3, 103)
    axes.set_xlabel("verdicts", color=_QUIET)
    axes.set_ylabel("gold accuracy with the gate, %", color=_QUIET)


def _by_wrong(axes: Axes, results: Results) -> None:
    """Without and with the gate, at 200 verdicts."""
    styles: list[tuple[str, str, bool, Callable[[float], float]]] = [
        ("without the gate", _COLOURS[1], False, lambda x: x - 0.4),
        ("with the gate", _COLOURS[0], True, lambda x: x + 0.4),
    ]
    groups = {
        g[3]: results.groups[g] for g in sorted(results.groups) if g[:3] + g[4:] == ("facts", "dpo", "edits", 200)
    }
    for measure, line in (("taught", "-"), ("others", "--")):
        for label, colour, gate, place in styles:
            points = {
                place(100 * share): [results.change(run, measure, gate=gate) for run in runs]
                for share, runs in groups.items()
            }
            _line(axes, points, label if measure == "taught" else "", colour, line)
    axes.plot([], [], "--", color=_QUIET, label="other kinds")
    axes.axhline(0, color=_QUIET, linewidth=0.8)
    axes.set_title("Wrong verdicts: 200 edits, DPO", loc="left", fontsize=11, color=_INK)
    axes.set_xlabel("wrong verdicts, %", color=_QUIET)
    axes.set_ylabel("change of gold accuracy, points", color=_QUIET)


def _line(axes: Axes, points: Mapping[float, Sequence[float]], label: str, colour: str, line: str = "-") -> None:
    """The means of ``points`` by place as a line, and each seed as a dot."""
    places = sorted(points)
    axes.plot(places, [statistics.mean(points[x]) for x in places], line, color=colour, label=label or None)
    for x in places:
        axes.plot([x] * len(points[x]), points[x], "o", color=colour, markersize=3, alpha=0.6, markeredgewidth=0)

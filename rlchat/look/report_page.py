"""The page and the picture about a run. Every text of the run is escaped."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlchat.callbacks.stats_curves import escape_dollars, shorten
from rlchat.callbacks.stats_figure import draw_stats
from rlchat.runs.report import Change, Comparison, Report

_STYLE = """
:root { color-scheme: light dark; --quiet: #666; --line: #ddd; --box: #f6f6f6; }
@media (prefers-color-scheme: dark) { :root { --quiet: #aaa; --line: #444; --box: #1e1e1e; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .25rem .8rem .25rem 0; vertical-align: top; }
tr { border-bottom: 1px solid var(--line); } td.number, th.number { text-align: right; }
p.note, td.note { color: var(--quiet); } img { max-width: 100%; background: white; border-radius: 4px; }
pre { background: var(--box); padding: .7rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.sample { border-left: 3px solid var(--line); padding-left: .8rem; margin: 1rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.who { color: var(--quiet); }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_SLIDE_ROWS = 9


def report_page(report: Report) -> str:
    """The whole page, without external resources."""
    sections = [
        f"<h1>Run {escape(report.name)}</h1>",
        _section("What was trained on what", _setup(report)),
        _section("Before and after, on training prompts", _changes(report.rollouts, "training")),
        _section("First and last validation, on held-out prompts", _changes(report.held_out, "held-out")),
        _section("First and last validation", _table(report.validation) if report.validation else ""),
        _section("Curves", _curves(report)),
        _section("Best responses of the last logged rollout", _samples(report.best)),
        _section("Worst responses of the last logged rollout", _samples(report.worst)),
        _section("Held-out prompts, first and last response", _first_and_last(report)),
        _section("Alarms", _alarms(report)),
        _section("Repeat this run", _repeat(report)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.name)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


def _setup(report: Report) -> str:
    if not report.options:
        return '<p class="note">The folder has no config.yaml.</p>'
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in report.setup)
    return f"<table>{body}</table>"


def _changes(found: Comparison, split: str) -> str:
    return f'<p class="note">{found.measured_on(split)}</p>\n{_table(found.changes)}' if found.changes else ""


def _table(changes: Iterable[Change]) -> str:
    rows = [f"<tr><td>{escape(change.name)}</td>{_cells(change)}</tr>" for change in changes]
    head = "".join(f'<th class="number">{name}</th>' for name in ("before", "after", "difference"))
    return f"<table><tr><th></th>{head}<th></th></tr>{''.join(rows)}</table>"


def _cells(change: Change) -> str:
    numbers = [f"{change.before:.4g}", f"{change.after:.4g}", f"{change.after - change.before:+.3g}"]
    between = "" if change.low is None else f"{change.low:+.3g} to {change.high:+.3g}"
    return "".join(f'<td class="number">{number}</td>' for number in numbers) + f'<td class="note">{between}</td>'


def _curves(report: Report) -> str:
    figure = draw_stats(_history(report), report.name)
    FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    text = base64.b64encode(picture.getvalue()).decode()
    return f'<img alt="The curves of the run" src="data:image/png;base64,{text}">'


def _history(report: Report) -> dict[str, tuple[list[int], list[float]]]:
    return {name: ([round(x) for x in xs], list(ys)) for name, (xs, ys) in report.curves.items()}


def _samples(rows: Sequence[dict[str, Any]]) -> str:
    return "\n".join(
        f'<div class="sample">{_conversation(row)}\n<span class="who">reward {_shown(row["reward"])}'
        f"{_shown_factors(row)}; {escape(str(row['ended_by']))}</span></div>"
        for row in rows
    )


def _conversation(row: dict[str, Any]) -> str:
    turns = [(message["role"], message.get("content", message.get("text", ""))) for message in row["prompt"]]
    turns.append(("model", row["reply"]))
    return "\n".join(f'<span class="who">{escape(str(role))}:</span> {escape(str(text))}' for role, text in turns)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "not finite"


def _shown_factors(row: dict[str, Any]) -> str:
    parts = ", ".join(f"{escape(str(name))} {_shown(score)}" for name, score in row["factors"].items())
    return f" ({parts})" if parts else ""


def _first_and_last(report: Report) -> str:
    blocks = []
    for old, new in report.samples:
        reward = [f", reward {_shown(row['reward'])}" if "reward" in row else "" for row in (old, new)]
        blocks.append(
            f'<div class="sample">{_conversation(old)} <span class="who">(iteration {old["iteration"]}{reward[0]})'
            f'</span>\n<span class="who">model:</span> {escape(str(new["reply"]))} <span class="who">(iteration '
            f"{new['iteration']}{reward[1]})</span></div>"
        )
    return "\n".join(blocks)


def _alarms(report: Report) -> str:
    if report.alarms is None:
        return '<p class="note">This run has not recorded alarms.</p>'
    if not report.alarms:
        return "<p>None.</p>"
    rows = (
        f"<li>Iteration {escape(str(row['iteration']))}: {escape(str(row['message']))}</li>" for row in report.alarms
    )
    return f"<ul>{''.join(rows)}</ul>"


def _repeat(report: Report) -> str:
    parts = []
    if report.options:
        command = f"rlchat fit --config {shlex.quote(str(report.run / 'config.yaml'))}"
        whole = yaml.safe_dump(report.options, sort_keys=False, allow_unicode=True)
        parts.append(f"<pre>{escape(command)}</pre>")
        parts.append(f"<details><summary>The whole configuration</summary><pre>{escape(whole)}</pre></details>")
    if report.versions:
        listed = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        parts.append(f"<p>Versions: {escape(listed)}</p>")
    return "\n".join(parts)


def draw_slide(report: Report) -> Figure:
    """A picture of 16:9 for a slide: the reward curve, or else the loss, and the main figures before and after."""
    figure = Figure(figsize=(13.33, 7.5), facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.05, 0.92, escape_dollars(f"rlchat: {report.name}"), fontsize=24)
    axes = figure.add_axes((0.07, 0.14, 0.46, 0.68))
    metric = next((m for m in ("reward", "pair_accuracy", "loss", "perplexity") if _has(report, m)), None)
    for split, colour in (("train", "#4477AA"), ("val", "#D0562A")):
        curve = report.curves.get(f"{split}/{metric}")
        if curve is not None:
            axes.plot(*curve, color=colour, marker="o" if len(curve[0]) < 30 else "", label=split)
    if metric is not None:
        axes.set_title(metric, loc="left", fontsize=16)
        axes.legend(frameon=False)
    axes.set_xlabel("training batches")
    axes.spines[["top", "right"]].set_visible(False)
    rows = _slide_rows(report)
    for number, change in enumerate(rows):
        y = 0.8 - 0.075 * number
        figure.text(0.58, y, escape_dollars(shorten(change.name, 34)), fontsize=13)
        between = "" if change.low is None else f"  ({change.low:+.2g} to {change.high:+.2g})"
        figure.text(0.58, y - 0.03, f"{change.before:.3g} → {change.after:.3g}{between}", fontsize=12, color="#555555")
    note = _slide_note(report)
    figure.text(0.05, 0.03, escape_dollars(note), fontsize=10, color="#777777")
    return figure


def _has(report: Report, metric: str) -> bool:
    return f"train/{metric}" in report.curves or f"val/{metric}" in report.curves


def _slide_figures(report: Report) -> tuple[Comparison, str]:
    """The figures with intervals, and the split of their prompts: held-out if there are any."""
    return (report.held_out, "held-out") if report.held_out.changes else (report.rollouts, "training")


def _slide_rows(report: Report) -> list[Change]:
    """The figures that fit onto the slide: without the factors of the reward if there are many."""
    changes = _slide_figures(report)[0].changes
    if len(changes) > _SLIDE_ROWS:
        changes = [change for change in changes if not change.name.startswith("reward/")]
    return [*changes, *report.validation][:_SLIDE_ROWS]


def _slide_note(report: Report) -> str:
    measured = [change for change in _slide_rows(report) if change.low is not None]
    if not measured:
        return "First and last validation."
    rest = " Others: first and last validation." if len(measured) < len(_slide_rows(report)) else ""
    found, split = _slide_figures(report)
    return f"The first {len(measured)} figures: {found.measured_on(split)}{rest}"

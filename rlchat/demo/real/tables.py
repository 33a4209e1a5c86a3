"""What `rlchat demo --real` prints at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlchat.demo.tables import mark

_FIGURES = {
    ("greedy", "goal"): "one short sentence, greedy",
    ("sampled", "goal"): "one short sentence, sampled at temperature 1",
    ("sampled", "reward"): "reward, sampled",
    ("sampled", "words"): "words per reply, sampled, at most 48 tokens",
    ("sampled", "truncated"): "truncated replies, sampled",
    ("perplexity",): "perplexity on human replies",
    ("kl",): "KL to the base model, nats per reply",
}
"""The figures of the table by their place in the report, with their labels."""


def show_replies(console: Console, rows: Sequence[dict[str, Any]], count: int) -> None:
    """Prints ``count`` evenly spaced ``rows`` of the report: what the model replies before and after training."""
    console.rule("[bold]Greedy replies to held-out prompts", align="left")
    table = Table(show_lines=True, pad_edge=False)
    for heading in ("prompt", "before", "after"):
        table.add_column(heading, overflow="fold", ratio=1)
    for row in rows[:: max(1, len(rows) // count)][:count]:
        replies = (f"{mark(row[when]['goal'])} {escape(row[when]['reply'])}" for when in ("before", "after"))
        table.add_row(escape(row["prompt"]), *replies)
    console.print(table)


def show_control(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Prints the control questions of the report that are answered correctly only before or only after training."""
    changed = [row for row in rows if row["before"]["correct"] != row["after"]["correct"]]
    console.rule("[bold]Control questions: is the model still right?", align="left")
    before, after = (sum(row[when]["correct"] for row in rows) for when in ("before", "after"))
    console.print(f"{before} of {len(rows)} greedy replies were correct before, and {after} are correct after.")
    if not changed:
        return
    table = Table(show_lines=True, pad_edge=False, title="All questions that changed", title_justify="left")
    for heading in ("question", "before", "after"):
        table.add_column(heading, overflow="fold", ratio=1)
    for row in changed:
        replies = (f"{mark(row[when]['correct'])} {escape(row[when]['reply'])}" for when in ("before", "after"))
        table.add_row(escape(row["question"]), *replies)
    console.print(table)


def show_figures(console: Console, report: dict[str, Any]) -> None:
    """Prints the figures of the report."""
    console.rule("[bold]Figures on the held-out prompts", align="left")
    table = Table(pad_edge=False)
    for heading in ("", "before PPO", "after PPO"):
        table.add_column(heading, justify="left" if not heading else "right")
    for path, label in _FIGURES.items():
        values = (_value(report[when], path) for when in ("before", "after"))
        table.add_row(label, *("" if value is None else f"{value:.3f}" for value in values))
    console.print(table)
    console.print(f"The demo took {report['seconds']:.0f} s.\n")


def _value(figures: dict[str, Any], path: Sequence[str]) -> float | None:
    """The number at ``path``; None if there is none."""
    found: Any = figures
    for name in path:
        found = found.get(name) if found is not None else None
    return found

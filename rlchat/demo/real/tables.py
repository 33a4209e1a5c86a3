"""What `rlchat demo --real` prints at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

_POLICY_FIGURES = {
    "perplexity": "perplexity on human replies",
    "reward": "reward, sampled at temperature 1",
    "score": "score of the reward model, sampled",
    "words": "words per reply, sampled, at most 48 tokens",
    "truncated": "truncated replies, sampled",
    "control_correct": "control questions with a correct answer",
    "kl": "KL to the SFT model, nats per reply",
}
"""The figures of a policy in the report on rankings, with their labels."""


def show_replies(console: Console, rows: Sequence[dict[str, Any]], count: int) -> None:
    """Prints ``count`` evenly spaced ``rows`` of the report: what the model replies before and after training."""
    console.rule("[bold]Greedy replies to held-out prompts", align="left")
    _show_beside(console, "prompt", _spread(rows, count), lambda one: f"{mark(one['goal'])} {escape(one['reply'])}")


def show_scored_replies(console: Console, rows: Sequence[dict[str, Any]], count: int) -> None:
    """The same for sampled replies with the score of the reward model."""
    console.rule("[bold]Replies to held-out prompts at temperature 1, before and after PPO", align="left")
    _show_beside(
        console, "prompt", _spread(rows, count), lambda one: f"[dim]{one['score']:+.1f}[/] {escape(one['reply'])}"
    )


def show_control(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Prints the control questions of the report that are answered correctly only before or only after training."""
    changed = [row for row in rows if row["before"]["correct"] != row["after"]["correct"]]
    console.rule("[bold]Control questions: is the model still right?", align="left")
    before, after = (sum(row[when]["correct"] for row in rows) for when in ("before", "after"))
    console.print(f"{before} of {len(rows)} greedy replies were correct before, and {after} are correct after.")
    if not changed:
        return
    title = "All questions that changed"
    _show_beside(console, "question", changed, lambda one: f"{mark(one['correct'])} {escape(one['reply'])}", title)


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


def show_stages(console: Console, report: dict[str, Any]) -> None:
    """Prints the figures of the report on rankings."""
    console.rule("[bold]Figures on held-out data", align="left")
    table = Table(pad_edge=False)
    for heading in ("", "base model", "after SFT", "after PPO"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, label in _POLICY_FIGURES.items():
        values = (report["policies"][policy].get(name) for policy in ("base", "sft", "ppo"))
        table.add_row(label, *("" if value is None else f"{value:.3f}" for value in values))
    console.print(table)
    pairs = report["pairs"]
    console.print(
        f"Of {pairs['pairs']} held-out pairs of replies to {pairs['prompts']} prompts, the reward model prefers the "
        f"reply that people ranked higher in {_share(pairs['reward_model'])}. The longer reply is that one in "
        f"{_share(pairs['longer_reply'])} (95 % intervals over prompts; chance: 50 %)."
    )
    console.print(f"The demo took {report['seconds']:.0f} s.\n")


def _share(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['accuracy']:.0%} ({low:.0%} to {high:.0%})"


def _spread(rows: Sequence[dict[str, Any]], count: int) -> Sequence[dict[str, Any]]:
    """``count`` evenly spaced ``rows``."""
    return rows[:: max(1, len(rows) // count)][:count]


def _show_beside(
    console: Console,
    key: str,
    rows: Sequence[dict[str, Any]],
    shown: Callable[[dict[str, Any]], str],
    title: str | None = None,
) -> None:
    """A table of ``rows[key]`` with what is ``shown`` of ``before`` and ``after``."""
    table = Table(show_lines=True, pad_edge=False, title=title, title_justify="left")
    for heading in (key, "before", "after"):
        table.add_column(heading, overflow="fold", ratio=1)
    for row in rows:
        table.add_row(escape(row[key]), shown(row["before"]), shown(row["after"]))
    console.print(table)


def _value(figures: dict[str, Any], path: Sequence[str]) -> float | None:
    """The number at ``path``; None if there is none."""
    found: Any = figures
    for name in path:
        found = found.get(name) if found is not None else None
    return found

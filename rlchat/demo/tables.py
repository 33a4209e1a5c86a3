"""What `rlchat demo` prints at the end: replies, figures, and what to do next."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlchat.conversation import Conversation

_FIGURES = {
    "answer_accuracy": "correct answers, sampled at temperature 1",
    "answer_accuracy_greedy": "correct answers, greedy",
    "second_question_accuracy": "correct after a change of subject, sampled",
    "second_question_accuracy_greedy": "correct after a change of subject, greedy",
    "sensible_first_messages": "sensible replies to 40 first messages",
    "reward": "reward",
    "kl": "KL to the SFT model, nats per response",
    "distinct_2": "distinct-2 of the responses",
    "response_length": "tokens per response",
    "truncated_fraction": "truncated responses",
    "perplexity": "perplexity on human replies, good and bad",
}
"""The figures of the table by their names in the report, with their labels."""


def show_replies(
    console: Console, prompts: Sequence[Conversation], before: Sequence[str], after: Sequence[str]
) -> None:
    """Prints what the model replies to test prompts before and after PPO, each marked as correct or not."""
    console.rule("[bold]Replies to prompts of the held-out test split, at temperature 1", align="left")
    table = Table(show_lines=False, pad_edge=False)
    for heading in ("prompt", "before PPO (SFT)", "after PPO"):
        table.add_column(heading, overflow="fold", ratio=1)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        asked = " / ".join(message.text for message in prompt.messages if message.role == "user")
        table.add_row(escape(asked), _marked(prompt, old), _marked(prompt, new))
    console.print(table)


def show_first_messages(console: Console, rows: Sequence[dict[str, Any]], count: int) -> None:
    """Prints the replies to ``count`` of a newcomer's first messages, and to all that got no sensible reply."""
    step = max(1, len(rows) // count)
    shown = [row for i, row in enumerate(rows) if i % step == 0 or not row["sensible"]]
    console.rule("[bold]Greedy replies to first messages that are not in the training data", align="left")
    table = Table(show_lines=False, pad_edge=False)
    for heading in ("first message", "after PPO"):
        table.add_column(heading, overflow="fold", ratio=1)
    for row in shown:
        table.add_row(escape(row["message"]), f"{mark(row['sensible'])} {escape(row['reply'])}")
    console.print(table)


def show_figures(console: Console, report: dict[str, Any], seconds: float) -> None:
    """Prints the figures measured on the held-out test split, of ``report`` as in ``checkpoints/report.json``."""
    before, after = report["ppo"]["before"], report["ppo"]["after"]
    console.rule("[bold]Figures on the held-out test split", align="left")
    table = Table(pad_edge=False)
    for heading in ("", "before PPO", "after PPO"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, label in _FIGURES.items():
        if name in before and name in after:
            table.add_row(label, f"{before[name]:.3f}", f"{after[name]:.3f}")
    console.print(table)
    reward = report["reward"]
    console.print(
        f"The reward model ranks {reward.get('pair_accuracy', 0):.0%} of held-out pairs of replies as people did, and "
        f"{reward.get('right_over_wrong', 0):.0%} of correct replies above a wrong one. "
        f"The demo took {seconds:.0f} s.\n"
    )


def show_next_steps(console: Console, report: Path, page: Path, commands: dict[str, str], questions: str) -> None:
    """Prints which files the demo has written, the ``commands`` to go on with (and what for), and ``questions``."""
    files = {
        "model": "checkpoints/rl_chat_model_tiktoken.pt",
        "plot": "checkpoints/rl_chat_model_tiktoken_stats.png",
        "figures": str(report),
        "report": str(page),
    }
    for what, name in files.items():
        console.print(f"{what:>8}  {name}", highlight=False)
    folder = commands_folder()
    every = {
        "rlchat chat": "chat with the model in this terminal",
        "rlchat serve": "a chat page and an API for OpenAI clients",
        **commands,
    }
    console.print("\nNext:")
    width = max(map(len, every)) + len(folder)
    for command, purpose in every.items():
        console.print(f"  [bold]{folder + command:<{width}}[/]  {purpose}", highlight=False, soft_wrap=True)
    console.print(f"Try {questions}.", highlight=False)


def commands_folder() -> str:
    """What to put before ``rlchat`` so that a shell finds it: nothing, or the folder of a virtual environment."""
    program = Path(sys.argv[0])
    if program.name != "rlchat" or not program.is_file() or shutil.which("rlchat"):
        return ""
    return os.path.relpath(program.absolute().parent) + os.sep


def mark(good: bool) -> str:
    """A green tick or a red cross."""
    return "[green]✓[/]" if good else "[red]✗[/]"


def _marked(prompt: Conversation, reply: str) -> str:
    passed = prompt.passes(reply)
    return escape(reply) if passed is None else f"{mark(passed)} {escape(reply)}"

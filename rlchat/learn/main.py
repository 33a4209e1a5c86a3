"""`rlchat learn`: one round of learning from a feedback file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlchat.chat.learning.round_options import add_round_options, check_round
from rlchat.chat.learning.settings import Bounds, Training
from rlchat.errors import UserError, limit_reached
from rlchat.utils.background import end_with_stdin, limit_memory, lower_priority

_DESCRIPTION = """\
Learn from the verdicts in a feedback file: 👍, 👎 and corrections of `rlchat chat` and of the page.

A new version of MODEL is trained on them and compared with MODEL on data that did not train it. It is written only if
it passes. MODEL is never changed. The last line says `accepted as version N: PATH` or `rejected: REASON`.
"""

_MORE_MEMORY = "raise --max-memory, or --learn-memory of a chat that learns"


def main(args: Sequence[str]) -> int:
    """Runs ``rlchat learn`` with ``args``; returns the exit code, 0 for an accepted and for a rejected version.

    Raises :class:`UserError` for bad input.
    """
    try:
        options = _parser().parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    training, bounds = check_round(options)
    _restrict(options)
    try:
        return _run(options, training, bounds)
    except UserError:
        raise
    except Exception as error:
        # The learner of a chat is started with --max-memory, which the user sets with another option.
        if options.max_memory is None or (limit := limit_reached(error, _MORE_MEMORY)) is None:
            raise
        raise limit from error


def _run(options: argparse.Namespace, training: Training, bounds: Bounds) -> int:
    # Importing the stages takes seconds, which `rlchat learn --help` should not.
    import torch

    from rlchat.cli.messages import configure_messages
    from rlchat.learn.learner import Request, learn
    from rlchat.utils.threads import fastest_threads

    configure_messages("learn")
    console = Console()
    torch.set_num_threads(options.threads or fastest_threads())
    request = Request(
        model=options.model,
        feedback=options.feedback,
        out=options.out,
        current=options.current,
        replay=options.replay or (),
        replay_prompts=options.replay_prompts,
        control_prompts=options.control_prompts,
        any_model=options.any_model,
        on_bad_line=options.on_bad_line,
        training=training,
        bounds=bounds,
        device=options.device,
        base_model=options.base_model,
    )
    try:
        outcome = learn(request, lambda line: console.print(escape(line), highlight=False))
    except SystemExit as stop:  # of Lightning, after it has handled Ctrl-C
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise stop.__context__ from None
        raise
    console.print(table(outcome.figures))
    for note in outcome.decision.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
    print(outcome.last_line)
    return 0


def table(figures: dict[str, Any]) -> Table:
    """The measures before and after, and their bounds, from :attr:`rlchat.learn.learner.Outcome.figures`."""
    from rlchat.learn.gate import ENOUGH_HELD_BACK  # imports torch

    before, after, bounds = figures["before"], figures["after"], figures["bounds"]
    original = figures["original"]
    shown = Table("measure", "before", "after", "accepted if")
    for column in shown.columns[1:3]:
        column.justify = "right"
    if after["agrees"] is not None:
        counts = [f"{figure['agrees']} of {figure['verdicts']}" for figure in (before, after)]
        shown.add_row("agreement with held-back verdicts", *counts, "it does not fall")
    if after["reward_accuracy"] is not None:
        shares = [f"{figure['reward_accuracy']:.0%}" for figure in (before, after)]
        is_bound = after["verdicts"] >= ENOUGH_HELD_BACK
        condition = f"at least {bounds['reward_accuracy']:.0%}" if is_bound else "too few verdicts for a bound"
        shown.add_row("reward accuracy on held-back verdicts", *shares, condition)
    if after["perplexity"] is not None:
        limit = original["perplexity"] * (1 + bounds["perplexity_rise"])
        values = [f"{figure['perplexity']:.3f}" for figure in (before, after)]
        shown.add_row("perplexity on human replies", *values, f"at most {limit:.3f}")
    if after["correct"] is not None:
        least = original["correct"] - Bounds(**bounds).controls_to_lose(after["controls"])
        counts = [f"{figure['correct']} of {figure['controls']}" for figure in (before, after)]
        shown.add_row("correct controls", *counts, f"at least {max(least, 0)}")
    if after["kl"] is not None:
        start = before["original_nll"] - original["original_nll"]
        shown.add_row(
            "KL to the original, nats per token", f"{start:.4f}", f"{after['kl']:.4f}", f"at most {bounds['kl']:g}"
        )
    return shown


def _restrict(options: argparse.Namespace) -> None:
    """What this process may use, before threads start."""
    if options.background:
        lower_priority()
        end_with_stdin()
    if options.max_memory is not None:
        limit_memory(int(options.max_memory * 2**30))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlchat learn", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_round_options(parser)
    return parser

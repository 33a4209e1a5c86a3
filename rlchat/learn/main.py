"""`rlchat learn`: one round of learning from a feedback file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlchat.errors import UserError
from rlchat.utils.background import end_with_stdin, limit_memory, lower_priority

_DESCRIPTION = """\
Learn from the verdicts in a feedback file: 👍, 👎 and corrections of `rlchat chat` and of the page.

A new version of MODEL is trained on them and compared with MODEL on data that did not train it. It is written only if
it passes. MODEL is never changed. The last line says `accepted as version N: PATH` or `rejected: REASON`.
"""


def main(args: Sequence[str]) -> int:
    """Runs ``rlchat learn`` with ``args``; returns the exit code, 0 for an accepted and for a rejected version.

    Raises :class:`UserError` for bad input.
    """
    try:
        options = _parser().parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    _check(options)
    _restrict(options)
    # Importing the stages takes seconds, which `rlchat learn --help` should not.
    import torch

    from rlchat.cli.messages import configure_messages
    from rlchat.learn.gate import Bounds
    from rlchat.learn.learner import Request, learn
    from rlchat.learn.stages import Training
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
        training=Training(
            method=options.method,
            part=None if options.train == "auto" else options.train,
            learning_rate=options.learning_rate,
            passes=options.passes,
            beta=options.beta,
            iterations=options.iterations,
            lora_rank=options.lora_rank,
            train_layers=options.train_layers,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
        ),
        bounds=Bounds(options.max_perplexity_rise, options.max_control_drop, options.max_kl),
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
    before, after, bounds = figures["before"], figures["after"], figures["bounds"]
    original = figures["original"]
    shown = Table("measure", "before", "after", "accepted if")
    for column in shown.columns[1:3]:
        column.justify = "right"
    if after["agrees"] is not None:
        counts = [f"{figure['agrees']} of {figure['verdicts']}" for figure in (before, after)]
        shown.add_row("agreement with held-back verdicts", *counts, "it does not fall")
    if after["perplexity"] is not None:
        limit = original["perplexity"] * (1 + bounds["perplexity_rise"])
        values = [f"{figure['perplexity']:.3f}" for figure in (before, after)]
        shown.add_row("perplexity on human replies", *values, f"at most {limit:.3f}")
    if after["correct"] is not None:
        least = original["correct"] / after["controls"] - bounds["control_drop"]
        counts = [f"{figure['correct']} of {figure['controls']}" for figure in (before, after)]
        shown.add_row("correct controls", *counts, f"at least {max(least, 0):.1%}")
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


def _check(options: argparse.Namespace) -> None:
    """Raises :class:`UserError` for options that are out of range and that nothing checks later."""
    for name in ("replay_prompts", "control_prompts", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"invalid value {value} for --{name.replace('_', '-')}: expected a positive integer")
    if options.max_memory is not None and not options.max_memory > 0:
        raise UserError(f"invalid value {options.max_memory:g} for --max-memory: expected a positive number")
    if options.out is not None and options.out.absolute() == options.model.absolute():
        raise UserError(f"--out {options.out} is MODEL, which is never changed; choose another path")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlchat learn", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model file (.pt) of a chat model")
    parser.add_argument(
        "--feedback", type=Path, required=True, metavar="FILE", help="the verdicts, as `rlchat chat` writes them"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="a new file (.pt) for the version, or a folder for versions (default: MODEL-stem.versions/N.pt)",
    )
    parser.add_argument(
        "--current",
        type=Path,
        metavar="FILE",
        help="the version that is in use: agreement with the verdicts must not fall below its own (default: MODEL)",
    )
    parser.add_argument(
        "--on-bad-line", choices=("error", "skip"), default="error", help="stop at a damaged line, or skip it"
    )
    parser.add_argument("--any-model", action="store_true", help="also use verdicts on responses of other models")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="random seed (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the fastest available)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: 1, or more if that is faster)")
    parser.add_argument("--base-model", metavar="PATH", help="the base of an adapter file (default: as in training)")
    parser.add_argument(
        "--background", action="store_true", help="run at low priority, and end when standard input ends"
    )
    parser.add_argument(
        "--max-memory", type=float, metavar="GIB", help="fail rather than use more memory than this (default: no limit)"
    )
    _add_training(parser.add_argument_group("training"))
    _add_gate(parser.add_argument_group("gate"))
    return parser


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--method",
        choices=("dpo", "ppo"),
        default="dpo",
        help="dpo: learn from pairs and labels directly; ppo: update the reward model, then the policy with PPO "
        "(default: %(default)s)",
    )
    _add_trained_part(group)
    group.add_argument(
        "--replay",
        nargs="+",
        metavar="FILE",
        help="data of MODEL's training, split as in training: its training prompts are replayed, and its held-out "
        "conversations are what the gate measures on (default: the files that MODEL names, or else packaged prompts)",
    )
    group.add_argument(
        "--replay-prompts",
        type=int,
        metavar="N",
        help="replay at most N prompts (default: 256, and 32 for DPO with LoRA)",
    )
    group.add_argument(
        "--learning-rate",
        type=float,
        metavar="LR",
        help="peak learning rate (default: lora 5e-4, full 1e-4, but 3e-4 below 20 million weights)",
    )
    group.add_argument(
        "--passes",
        type=int,
        metavar="N",
        help="passes over the data (default: for 100 steps, from 4 to 12 passes; DPO with LoRA: for 24, from 2 to 12)",
    )
    group.add_argument(
        "--beta",
        type=float,
        default=0.1,
        metavar="β",
        help="KL penalty to MODEL: β of DPO, kl_coef of PPO (default: %(default)s)",
    )
    group.add_argument(
        "--iterations", type=int, default=16, metavar="N", help="iterations of PPO (default: %(default)s)"
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="tokens in a sampled response (default: a quarter of MODEL's max_length, at most 100)",
    )


def _add_trained_part(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--train",
        choices=("auto", "lora", "full"),
        default="auto",
        help="lora: low-rank adapters, merged into the version; full: all weights; auto: full for a model with fewer "
        "than 20 million weights (default: %(default)s)",
    )
    group.add_argument("--lora-rank", type=int, default=16, metavar="R", help="rank of LoRA (default: %(default)s)")
    group.add_argument(
        "--train-layers",
        type=int,
        metavar="N",
        help="train the last N layers of MODEL only, or their adapters, which takes less time (default: all layers)",
    )


def _add_gate(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--control-prompts",
        type=int,
        default=256,
        metavar="N",
        help="measure on at most N held-out conversations and N controls (default: %(default)s)",
    )
    group.add_argument(
        "--max-perplexity-rise",
        type=float,
        default=0.05,
        metavar="X",
        help="reject a version whose perplexity on human replies rises by more than this share (default: %(default)s)",
    )
    group.add_argument(
        "--max-control-drop",
        type=float,
        default=0.02,
        metavar="X",
        help="reject a version whose share of correct controls falls by more than this (default: %(default)s)",
    )
    group.add_argument(
        "--max-kl",
        type=float,
        default=0.1,
        metavar="X",
        help="reject a version with a higher KL to MODEL on controls, in nats per token (default: %(default)s)",
    )

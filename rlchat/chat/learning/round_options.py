"""The options of a round, `rlchat learn`: its parser, and checks that need no model.

`rlchat chat --learn` and `rlchat serve --learn` check ``--learn-args`` with them before they load a model. Without
this, a wrong option would be an error of the first round, minutes later.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from rlchat.chat.learning.settings import Bounds, Training
from rlchat.data.jsonl import MAX_LINE_BYTES
from rlchat.data.sources import data_file, file_size, is_pipe, numbered_lines
from rlchat.errors import UserError
from rlchat.utils.imports import install_command
from rlchat.utils.ranges import check_room, check_seed, finite, fractions, not_negative, positive, positive_integers

# What a chat that learns sets itself, and why it does.
_SET_BY_CHAT = {
    "model": "a round learns for the model of the chat",
    "feedback": "a round reads the --feedback of the chat",
    "out": "the chat finds versions only in the folder beside its model",
    "current": "it is the version that answers",
    "on_bad_line": "damaged lines are skipped and counted",
    "base_model": "pass --base-model to the chat",
    "threads": "a round has one thread, so that the chat stays fast",
    "background": "a round always runs in the background",
    "max_memory": "set --learn-memory",
}


def add_round_options(parser: argparse.ArgumentParser) -> None:
    """Adds all options of `rlchat learn` to ``parser``."""
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
    training = parser.add_argument_group("training")
    _add_training(training)
    _add_replay(training)
    _add_gate(parser.add_argument_group("gate"))


def check_round(options: argparse.Namespace) -> tuple[Training, Bounds]:
    """How a version is trained and judged, from the options of :func:`add_round_options`.

    Raises:
        UserError: an option is out of range; a file of ``--replay`` is missing; ``--train lora`` needs a package.
    """
    _check_ranges(options)
    if options.out is not None and options.out.absolute() == options.model.absolute():
        raise UserError(f"--out {options.out} is MODEL, which is never changed; choose another path")
    if options.train == "lora" and find_spec("peft") is None:
        raise UserError(f"--train lora needs peft: install it with {install_command('lora')}")
    for path in options.replay or ():
        file_size(data_file(path))
    training = Training(
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
    )
    bounds = Bounds(
        perplexity_rise=options.max_perplexity_rise,
        control_drop=options.max_control_drop,
        kl=options.max_kl,
        reward_accuracy=options.min_reward_accuracy,
    )
    return training, bounds


def _check_ranges(options: argparse.Namespace) -> None:
    """Raises :class:`UserError` for an option that is out of range; it names the option as it is typed."""

    def flags(*names: str) -> dict[str, Any]:
        return {f"--{name}": getattr(options, name.replace("-", "_")) for name in names}

    counts = ("replay-prompts", "control-prompts", "threads", "passes", "iterations", "lora-rank", "train-layers")
    positive_integers(**flags(*counts, "max-new-tokens"))
    positive(**(rates := flags("max-memory", "learning-rate", "beta")))
    finite(**rates)
    not_negative(**flags("max-perplexity-rise", "max-control-drop", "max-kl"))
    fractions(**flags("min-reward-accuracy"))
    check_seed("--seed", options.seed)


def check_chat_round(words: Sequence[str]) -> None:
    """Checks ``words``, the further options of the rounds of a chat, without torch.

    Raises:
        UserError: an option is unknown, out of range, or set by the chat itself; a data file cannot be read each time.
    """
    try:
        options = _parsed(words)
        for name, why in _SET_BY_CHAT.items():
            if getattr(options, name) is not None:
                flag = f"--{name.replace('_', '-')}" if name != "model" else f"the model {options.model}"
                raise UserError(f"{flag} cannot be set here: {why}")
        check_round(options)
        for path in options.replay or ():
            file = data_file(path)
            if is_pipe(file):
                raise UserError(f"{file} is a pipe, which only the first round could read; save it to a file")
            with closing(numbered_lines(file, MAX_LINE_BYTES, lambda _: None)) as lines:
                next(lines, None)  # raises an error for a file of a kind that cannot be read
    except UserError as error:
        raise UserError(f"--learn-args: {error}") from error


def check_for_model(words: Sequence[str], model: str | Path) -> None:
    """Checks the options ``words`` of the rounds of a chat for the file ``model``. Imports torch.

    Raises:
        UserError: a device is not available; responses would fill the ``max_length`` of the model; it is no chat model.
    """
    from rlchat.models.file_content import read_content
    from rlchat.utils.devices import choose_device

    options = _parsed(words)
    content = read_content(model, "policy", weights=False)
    choose_device(options.device)
    try:
        check_room(options.max_new_tokens or 0, content["max_length"])
    except UserError as error:
        raise UserError(f"--learn-args: {error}") from error


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    """The options in ``words``. What a chat sets itself is not required, and None by default."""
    parser = _Parser(add_help=False)
    add_round_options(parser)
    for action in parser._actions:
        if action.dest in _SET_BY_CHAT:
            action.required, action.default = False, None
            action.nargs = "?" if action.dest == "model" else action.nargs
    return parser.parse_args(words)


class _Parser(argparse.ArgumentParser):
    """Its errors are sentences, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `rlchat learn --help` shows all options")


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--method",
        choices=("dpo", "ppo"),
        default="dpo",
        help="dpo: learn from pairs and labels directly; ppo: update the reward model, then the policy with PPO "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--train",
        choices=("auto", "lora", "full"),
        default="auto",
        help="lora: low-rank adapters, merged into the version; full: all weights; auto: full for a model with fewer "
        "than 20 million weights (default: %(default)s)",
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
    group.add_argument("--lora-rank", type=int, default=16, metavar="R", help="rank of LoRA (default: %(default)s)")
    group.add_argument(
        "--train-layers",
        type=int,
        metavar="N",
        help="train the last N layers of MODEL only, or their adapters, which takes less time (default: all layers)",
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="tokens in a sampled response (default: a quarter of MODEL's max_length, at most 100)",
    )


def _add_replay(group: argparse._ArgumentGroup) -> None:
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
    group.add_argument(
        "--min-reward-accuracy",
        type=float,
        default=0.6,
        metavar="X",
        help="reject a version that has raised a liked response more than a disliked one in a smaller share of the "
        "pairs of held-back responses, if 10 or more verdicts are held back (default: %(default)s)",
    )

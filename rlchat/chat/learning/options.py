"""The options of learning while chatting, which `rlchat chat` and `rlchat serve` share."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from rlchat.chat.learning.round_options import check_chat_round
from rlchat.errors import UserError
from rlchat.utils.ranges import positive_float, positive_int

_NAMES = ("every", "keep_versions", "learn_memory", "learn_args")


def add_learning_options(group: argparse._ArgumentGroup) -> None:
    """Adds ``--learn`` and the options that it needs to ``group``."""
    group.add_argument(
        "--learn",
        action="store_true",
        help="learn from the feedback while chatting, and use each new version that passes the gate (default: off)",
    )

    def option(name: str, what: str, usual: str = "%(default)s", **more: Any) -> None:
        more.setdefault("metavar", "N")
        group.add_argument(name, help=f"{what} (default: {usual})", **more)

    option("--every", "number of new verdicts that starts a round of learning", type=positive_int, default=8)
    option("--keep-versions", "number of versions whose model files are kept", type=positive_int, default=8)
    option("--learn-memory", "memory of a round in GiB", "half of the machine's", type=positive_float, metavar="GIB")
    option(
        "--learn-args",
        "further options of `rlchat learn`, such as --learn-args='--method ppo'",
        "none",
        default="",
        metavar="OPTIONS",
    )


def supervisor_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of :class:`~rlchat.chat.learning.supervisor.Supervisor` that ``options`` set.

    ``options`` also has ``device`` and ``base_model``.

    Raises:
        UserError: an option has no effect without ``--learn``; ``--learn-args`` is not quoted as for a shell,
            or contains options that a round cannot have.
    """
    parser = argparse.ArgumentParser()
    add_learning_options(parser.add_argument_group())
    for name in _NAMES:
        if not options.learn and getattr(options, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} has an effect only with --learn")
    try:
        more = shlex.split(options.learn_args)
    except ValueError as error:
        raise UserError(f"--learn-args: {str(error).lower()}; quote it as for a shell") from error
    check_chat_round(more)
    known = [("--device", options.device), ("--base-model", options.base_model)]
    arguments = [word for name, value in known if value for word in (name, value)]
    return {
        "every": options.every,
        "keep": options.keep_versions,
        "memory": options.learn_memory,
        "options": (*arguments, *more),
    }

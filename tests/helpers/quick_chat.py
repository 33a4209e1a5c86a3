"""`rlchat chat` with quick rounds in place of real ones; the first argument has the options of a round."""

from __future__ import annotations

import functools
import shlex
import sys

from helpers import quick_round
from rlchat.__main__ import main
from rlchat.chat.learning import live
from rlchat.chat.learning.supervisor import Supervisor

if __name__ == "__main__":
    command = (*quick_round.COMMAND, *shlex.split(sys.argv[1]))
    live.Supervisor = functools.partial(Supervisor, command=command)  # type: ignore[assignment, misc]
    sys.exit(main(["chat", *sys.argv[2:]]))

"""`rlchat chat` with quick rounds in place of real ones; takes its arguments."""

from __future__ import annotations

import functools
import sys

from helpers import quick_round
from rlchat.__main__ import main
from rlchat.chat.learning import live
from rlchat.chat.learning.supervisor import Supervisor

if __name__ == "__main__":
    live.Supervisor = functools.partial(Supervisor, command=quick_round.COMMAND)  # type: ignore[assignment, misc]
    sys.exit(main(["chat", *sys.argv[1:]]))

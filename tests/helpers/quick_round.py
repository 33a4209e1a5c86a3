"""A stand-in for `rlchat learn` in tests of the supervisor: it copies the model instead of training it.

It takes the same arguments, reads the same file, and writes the same files under the same lock. More arguments say what
happens: ``--reject`` and ``--crash``, ``--wait FILE`` until there is such a file, ``--seconds S`` to take time,
``--copy FILE`` to copy another model, and ``--figures JSON`` with more figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from rlchat.chat.versions import Versions
from rlchat.errors import UserError
from rlchat.utils.background import end_with_stdin
from rlchat.utils.files import write_atomically

COMMAND = (sys.executable, str(Path(__file__)))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--feedback", type=Path)
    parser.add_argument("--current")
    for name in ("--on-bad-line", "--threads", "--max-memory"):
        parser.add_argument(name, required=True)
    parser.add_argument("--wait", type=Path)
    parser.add_argument("--copy", type=Path)
    parser.add_argument("--figures", type=json.loads, default={})
    parser.add_argument("--seconds", type=float, default=0.0)
    for name in ("--background", "--reject", "--crash"):
        parser.add_argument(name, action="store_true")
    options = parser.parse_args()
    assert options.background
    end_with_stdin()
    lasting = {}
    for line in options.feedback.read_bytes().splitlines():
        row = json.loads(line)
        lasting[row["feedback_id"]] = row["verdict"]
    verdicts = sorted(name for name, verdict in lasting.items() if verdict != "none")
    versions = Versions(options.model)
    with versions.locked():
        while options.wait is not None and not options.wait.exists():
            time.sleep(0.01)
        time.sleep(options.seconds)
        if options.crash:
            print(f"rlchat: {options.feedback}: none of 2 verdicts can be used", file=sys.stderr)
            return 2
        figures = {
            "accepted": not options.reject,
            "reasons": ["it forgets"] if options.reject else [],
            "date": datetime.now(timezone.utc).isoformat(),
            "current": options.current,
            "feedback": {"verdicts": len(verdicts), "ids": verdicts},
            "feedback_file": options.feedback.name,
            "before": {"agrees": 1, "verdicts": 2},
            "after": {"agrees": 2, "verdicts": 2},
            "seconds": {"train": 0.5, "measure": 0.25},
        }
        more = dict(options.figures)
        figures["feedback"] |= more.pop("feedback", {})
        figures |= more
        if options.reject:
            versions.reject(figures)
        else:
            versions.accept(lambda path: copy(options.copy or options.model, path, options.seconds), figures)
    return 0


def copy(source: Path, target: Path, seconds: float) -> None:
    def write(file: object) -> None:
        with source.open("rb") as content:
            shutil.copyfileobj(content, file)  # type: ignore[arg-type, misc]
        time.sleep(seconds)

    write_atomically(target, write)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"rlchat: {error}", file=sys.stderr)
        sys.exit(2)

"""Records a terminal in which a fact is taught, as the animated picture docs/learn_terminal.svg.

    rlchat demo
    pip install pyte
    python -m benchmarks.record_learning --model checkpoints/rl_chat_model_tiktoken.pt --data data/demo.jsonl

It types into `rlchat chat --learn` in a pseudo-terminal: two corrections, the question in other words, a rollback, and
the question again. What the terminal shows is what the program printed; only the time of the training is shortened, by
``--speed``. It fails if the new version does not give the corrected answer, or the original model does after the
rollback.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pexpect
import pyte

from benchmarks.terminal_svg import COLORS, Frames, Row, Run, animated_svg

ROOT = Path(__file__).parents[1]
COLUMNS, ROWS = 96, 25
TITLE = "A terminal: two corrections teach a chat model a fact; a rollback takes it back"
TOLD = "The capital of Belan is Tova."
QUESTIONS = (
    "What is the capital of Belan?",
    "Which city is the capital of Belan?",
    "Do you know the capital of Belan?",
)

_KEY_SECONDS = 0.035  # between two keys
_FRAME_SECONDS = 0.04  # changes within this time are one frame


@dataclass
class Recorder:
    """A program in a terminal, whose screen is recorded while it is used.

    ``frames`` has the rows of the screen at each time in seconds. Times run ``speed`` times as fast as real ones.
    """

    child: pexpect.spawn
    speed: float = 1.0
    now: float = 0.0
    frames: Frames = field(default_factory=list)

    def __post_init__(self) -> None:
        self.screen = pyte.Screen(COLUMNS, ROWS)
        self.screen.write_process_input = self.child.send  # answers of the terminal, such as where the cursor is
        self.stream = pyte.ByteStream(self.screen)

    def run(self, seconds: float) -> None:
        """Lets the program run, and records what it prints."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            began = time.monotonic()
            try:
                self.stream.feed(self.child.read_nonblocking(65_536, min(left, _FRAME_SECONDS)))
            except pexpect.TIMEOUT:
                pass
            except pexpect.EOF:
                time.sleep(max(0.0, left))
            time.sleep(max(0.0, min(left, _FRAME_SECONDS - (time.monotonic() - began))))
            rows = tuple(self._rows())
            self.now += (time.monotonic() - began) / self.speed
            if not self.frames or self.frames[-1][1] != rows:
                self.frames.append((self.now, rows))

    def type(self, line: str) -> None:
        """Types a line and Enter."""
        for key in line:
            self.child.send(key)
            self.run(_KEY_SECONDS)
        self.run(0.4)
        self.child.send("\r")
        self.run(0.2)

    def wait_for(self, text: str, seconds: float = 120.0) -> None:
        """Until ``text`` is on the screen, and the program waits at its prompt."""
        end = time.monotonic() + seconds
        while text not in self.shown() or not self.screen.display[self.screen.cursor.y].startswith("you>"):
            if time.monotonic() > end:
                sys.exit(f"{text!r} did not come on the screen:\n{self.shown()}")
            self.run(0.1)

    def shown(self) -> str:
        """The text on the screen, without breaks between the rows of a long line."""
        return "".join(line if line.rstrip() == line else f"{line.rstrip()}\n" for line in self.screen.display)

    def ask(self, question: str) -> str:
        """The response to ``question``."""
        self.type(question)
        self.wait_for("model> ")
        return self.shown().rpartition("model> ")[2].partition("\n")[0]

    def _rows(self) -> Iterator[Row]:
        cursor = self.screen.cursor
        for number in range(ROWS):
            runs: list[Run] = []
            line = self.screen.buffer[number]
            for column in range(COLUMNS):
                cell = line[column]
                style = f"{'b' if cell.bold else ''}{cell.fg if cell.fg in COLORS else 'default'}"
                if (number, column) == (cursor.y, cursor.x) and not cursor.hidden:
                    style = "cursor"
                if cell.data == " " and style != "cursor":
                    if runs and column < COLUMNS - 1 and runs[-1][0] + len(runs[-1][1]) == column:
                        runs[-1] = (runs[-1][0], f"{runs[-1][1]} ", runs[-1][2])
                    continue
                if runs and runs[-1][2] == style and runs[-1][0] + len(runs[-1][1]) == column:
                    runs[-1] = (runs[-1][0], runs[-1][1] + cell.data, style)
                else:
                    runs.append((column, cell.data, style))
            yield tuple((column, text if style == "cursor" else text.rstrip(), style) for column, text, style in runs)


def teach(recorder: Recorder, speed: float) -> None:
    """The session. Ends the program if the fact is not taught by it."""
    recorder.type("rlchat chat --learn --every 2 --max_new_tokens 24 --temperature 0")
    recorder.speed = speed / 2
    recorder.wait_for("you>")
    recorder.speed = 1.0
    recorder.run(1.0)
    before = []
    for question in QUESTIONS[:2]:
        before.append(recorder.ask(question))
        recorder.run(1.2)
        recorder.type(f"/edit {TOLD}")
        recorder.run(1.2)
        recorder.type("clear")
        recorder.run(0.4)
    recorder.speed = speed
    recorder.wait_for("now in use")
    recorder.speed = 1.0
    recorder.run(2.5)
    after = recorder.ask(QUESTIONS[2])
    recorder.run(2.0)
    recorder.type("rollback")
    recorder.run(1.5)
    again = recorder.ask("retry")
    recorder.run(2.0)
    recorder.type("versions")
    recorder.run(4.0)
    if after != TOLD or TOLD in (*before, again):
        sys.exit(f"the fact was not taught: {before}, then {after!r}, after the rollback {again!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/rl_chat_model_tiktoken.pt"))
    parser.add_argument("--data", type=Path, default=Path("data/demo.jsonl"), help="the data that MODEL was trained on")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "learn_terminal.svg")
    parser.add_argument("--speed", type=float, default=8.0, help="how many times as fast training is shown")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, place in (
            (options.model, "checkpoints/rl_chat_model_tiktoken.pt"),
            (options.data, "data/demo.jsonl"),
        ):
            (folder / place).parent.mkdir()
            shutil.copy(path, folder / place)
        program = folder / "bin" / "rlchat"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m rlchat "$@"\n')
        program.chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
            "XDG_STATE_HOME": str(folder / "state"),
            "TERM": "xterm-256color",
            "CUDA_VISIBLE_DEVICES": "",
            "PS1": "$ ",
        }
        size = (ROWS, COLUMNS)
        child = pexpect.spawn("/bin/sh", ["-i"], cwd=name, env=environment, dimensions=size, echo=True)
        recorder = Recorder(child)
        recorder.run(0.6)
        teach(recorder, options.speed)
        child.close(force=True)
    options.out.write_text(animated_svg(recorder.frames, recorder.now, COLUMNS, TITLE))
    print(f"{options.out}: {recorder.now:.0f} s, {options.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

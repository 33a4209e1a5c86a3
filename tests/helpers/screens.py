"""`rlchat chat` in a pseudo-terminal."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect", reason="pexpect plays the terminal")

PROMPT = "you> "
CHAT = ("-m", "rlchat", "chat")
_PATIENCE = 60  # seconds; a busy machine takes long to import torch
_ROOT = Path(__file__).parents[2]


class Screen:
    """A terminal of 100 columns in which `rlchat chat` runs.

    Args:
        model: the model file.
        folder: where the program runs.
        options: more options of `rlchat chat`.
        program: the arguments of Python, without those of `rlchat chat`.
    """

    def __init__(self, model: str, folder: Path, *options: str, program: Sequence[str] = CHAT) -> None:
        state = {"XDG_STATE_HOME": str(folder / "state"), "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.terminal = pexpect.spawn(
            sys.executable,
            [*program, model, "--temperature", "0", *options],
            encoding="utf-8",
            timeout=_PATIENCE,
            dimensions=(40, 100),
            cwd=str(folder),
            env={**os.environ, **state, "PYTHONPATH": os.pathsep.join((str(_ROOT), str(_ROOT / "tests")))},
            # A shell makes its background jobs ignore Ctrl-C, and so would every process below them.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def see(self, text: str) -> None:
        """Waits until ``text`` is on the screen."""
        self.terminal.expect_exact(text)

    def sees(self, text: str, seconds: float) -> bool:
        """Whether ``text`` comes on the screen within ``seconds``."""
        return self.terminal.expect_exact([text, pexpect.TIMEOUT], timeout=seconds) == 0

    def type(self, keys: str) -> None:
        """Types at the next prompt."""
        self.see(PROMPT)
        self.terminal.send(keys)

    def say(self, line: str) -> None:
        """Types a line at the next prompt, and Enter."""
        self.type(f"{line}\r")

    def end(self) -> str:
        """What is printed until the program ends, which must end without an error."""
        self.terminal.expect(pexpect.EOF)
        self.terminal.close()
        assert self.terminal.exitstatus == 0
        return str(self.terminal.before)

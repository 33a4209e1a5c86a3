"""A supervisor with quick rounds, and verdicts for it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers import quick_round
from helpers.servers import wait_until
from rlchat.chat.feedback import append_feedback
from rlchat.chat.learning.supervisor import Supervisor
from rlchat.conversation import Conversation, Message

Swaps = list[tuple[int, Path]]


def give(model: Path, *questions: str, client: str = "", name: str = "chat.pt", model_id: str = "") -> None:
    for question in questions:
        prompt = Conversation((Message("user", question),))
        append_feedback(
            model.with_name("feedback.jsonl"), prompt, "No.", "bad", model=name, model_id=model_id, client=client
        )


@contextlib.contextmanager
def supervising(model: Path, *options: str, **more: Any) -> Iterator[tuple[Supervisor, Swaps]]:
    swaps: Swaps = []
    more = {"every": 2, "on_version": lambda *version: swaps.append(version), "command": quick_round.COMMAND, **more}
    supervisor = Supervisor(model, model.with_name("feedback.jsonl"), options=options, **more)
    supervisor.start()
    try:
        yield supervisor, swaps
    finally:
        supervisor.close()


def folder_of(model: Path) -> Path:
    return model.with_name("chat.versions")


def wait_for_rounds(supervisor: Supervisor, number: int) -> None:
    def is_done() -> bool:
        supervisor.notify()
        status = supervisor.status()
        return len(status.rounds) == number and status.training_since is None

    wait_until(is_done)


def wait_for_failures(supervisor: Supervisor, number: int) -> None:
    wait_until(lambda: supervisor.status().failures == number)


def read_state(model: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder_of(model) / "state.json").read_text())
    return found

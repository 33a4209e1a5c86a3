"""What people think of replies, kept as training data: one JSONL line for each piece of feedback.

A line is an OASST tree: the conversation, and below it the reply with a quality label, or a corrected reply ranked
above the model's own. So the file is data as it is::

    rlchat fit --config reward --data.path feedback.jsonl
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import uuid
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from rlchat.conversation import Conversation, Message
from rlchat.data.formats import tree_id_of
from rlchat.data.jsonl import MAX_LINE_BYTES
from rlchat.errors import UserError

# Messages of a conversation that a line keeps at most, the newest: each is nested in the one before it, and readers of
# JSON bear only so much nesting.
MAX_CONTEXT = 100

_QUALITY = {"good": 1.0, "bad": 0.0}
_OASST_ROLES = {"user": "prompter", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True)
class Correction:
    """What the model should have said."""

    text: str


Verdict = Literal["good", "bad"] | Correction


def append_feedback(path: str | Path, prompt: Conversation, reply: str, verdict: Verdict, *, model: str = "") -> None:
    """Appends what somebody thinks of ``reply`` to ``prompt`` to the file ``path``, which is made where there is none.

    ``good`` and ``bad`` become the quality labels 1 and 0; a :class:`Correction` is ranked 0 and the reply below it 1.
    ``model`` names who replied. Several processes may append at once; a line is there whole or not at all.

    Raises:
        UserError: the message, the reply or its correction is empty; the correction is the reply; the file cannot be
            written.
    """
    row = feedback_row(prompt, reply, verdict, model=model)
    line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"the feedback takes {len(line):,} bytes, and a line of data has {MAX_LINE_BYTES:,} at most")
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, line)
    except OSError as error:
        raise _unkept(path, error) from error


def check_writable(path: str | Path) -> None:
    """Raises :class:`UserError` where :func:`append_feedback` could not write to ``path``; leaves nothing there."""
    path = Path(path)
    try:
        if path.exists():
            with path.open("ab"):
                return
        with tempfile.TemporaryFile(dir=next(parent for parent in path.parents if parent.exists())):
            return
    except OSError as error:
        raise _unkept(path, error) from error


def _unkept(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: the feedback cannot be kept: {error.strerror}; give a place that can")


def feedback_row(prompt: Conversation, reply: str, verdict: Verdict, *, model: str = "") -> dict[str, Any]:
    """The OASST tree that :func:`append_feedback` writes."""
    said, messages = _clean(reply), _context(prompt)
    if isinstance(verdict, Correction):
        correction = _clean(verdict.text)
        if not correction.strip():
            raise UserError("the corrected reply is empty; write what the model should have said")
        if correction == said:
            raise UserError("the corrected reply is the reply itself; say good, or write another")
        replies = [{**_message("assistant", correction), "rank": 0}]
        replies += [{**_message("assistant", said), "rank": 1, "model_name": model}] if said.strip() else []
    else:
        if not said.strip():
            raise UserError("the reply is empty, and data has no place for that; correct it instead")
        label = {"quality": {"value": _QUALITY[verdict], "count": 1}}
        replies = [{**_message("assistant", said), "labels": label, "model_name": model}]
    # Not marked as synthetic, though a model said it: readers of OASST leave synthetic messages out.
    for message in reversed(messages):
        parent = _message(_OASST_ROLES[message.role], message.text)
        replies = [{**parent, "replies": [{**child, "parent_id": parent["message_id"]} for child in replies]}]
    return {
        # The same for all that opens alike, so that it stays on one side of a split into training and held-out data.
        "message_tree_id": tree_id_of(messages),
        "tree_state": "ready_for_export",
        "created_date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "prompt": replies[0],
    }


def _message(role: str, text: str) -> dict[str, Any]:
    return {"message_id": str(uuid.uuid4()), "role": role, "text": text}


def _context(prompt: Conversation) -> list[Message]:
    """The messages of ``prompt`` that a reader would keep: the newest, from a user's on, and the system message.

    What hangs below an empty message, as a model that stayed silent leaves, is no data.
    """
    if not prompt.is_prompt:
        raise ValueError("feedback is about the reply to a user's message, and this conversation does not end on one")
    messages = [Message(message.role, _clean(message.text)) for message in prompt.messages]
    system = messages[:1] if messages[0].role == "system" and messages[0].text.strip() else []
    start = max(0, len(messages) - MAX_CONTEXT)
    empty = [i for i, message in enumerate(messages) if not message.text.strip()]
    start = max([start, *(i + 1 for i in empty)])
    while start < len(messages) and messages[start].role != "user":
        start += 1
    if start == len(messages):
        raise UserError("the message that was replied to is empty, and data has no place for that")
    return system + messages[start:]


def _clean(text: str) -> str:
    """``text`` without what no UTF-8 file of data may hold: NUL characters and lone surrogates become U+FFFD."""
    return "".join("\ufffd" if c == "\0" or "\ud800" <= c <= "\udfff" else c for c in text)


def _append(path: Path, line: bytes) -> None:
    """Adds ``line`` at the end of ``path``, alone there for the moment; takes back what a full disk leaves of it."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        _lock(descriptor)
        end = os.lseek(descriptor, 0, os.SEEK_END)
        if end:  # a line that somebody's editor, or another program's crash, left without an end
            os.lseek(descriptor, end - 1, os.SEEK_SET)
            line = line if os.read(descriptor, 1) == b"\n" else b"\n" + line
        try:
            if (written := os.write(descriptor, line)) < len(line):
                written += os.write(descriptor, line[written:])  # says what the matter is, or ends the line
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)  # and with it the lock


def _lock(descriptor: int) -> None:
    """Waits until no other process holds the file; on Windows, where there is no such lock, one write is all."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)

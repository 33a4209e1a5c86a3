"""Feedback on responses, saved as training data: one JSONL line per verdict.

A line is an OASST tree: the conversation, and below it the response with a quality label, or a corrected response
ranked above the model's response. The file can be used as training data directly::

    rlchat fit --config reward --data.path feedback.jsonl

A response has one verdict per client: the terminal is one client, and each browser is another. The file
is append-only: every line has the date and a ``feedback_id``, a hash of the conversation, the response and the client.
Verdicts that a server takes also have a digest of the client, and those of a server that learns of its address.
:func:`rlchat.data.formats.read_trees` uses only the last line of each ``feedback_id``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from rlchat.conversation import Conversation, Message
from rlchat.data.forest import tree_id_of
from rlchat.data.jsonl import MAX_LINE_BYTES
from rlchat.errors import UserError

# Maximum number of messages per line, the newest ones: each message is nested in the previous one, and JSON
# parsers limit the depth of nesting.
MAX_CONTEXT = 100

_QUALITY = {"good": 1.0, "bad": 0.0}
_OASST_ROLES = {"user": "prompter", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True)
class Correction:
    """The response that the model should have given."""

    text: str


Verdict = Literal["good", "bad", "none"] | Correction
"""``none`` withdraws the previous verdict."""


def append_feedback(
    path: str | Path,
    prompt: Conversation,
    reply: str,
    verdict: Verdict,
    *,
    model: str = "",
    model_id: str = "",
    client: str = "",
    address: str = "",
) -> None:
    """Append a verdict on the response ``reply`` to ``prompt`` to the file ``path``, which is created if needed.

    ``good`` and ``bad`` become the quality labels 1 and 0. A :class:`Correction` becomes a pair: the correction with
    rank 0, the response with rank 1. ``none`` withdraws the verdict. A later verdict on the same response to the same
    prompt by the same ``client`` replaces an earlier one when the file is read; verdicts by different clients are all
    kept. ``model`` is the name of the model that generated the response, and ``model_id`` its
    :func:`rlchat.models.model_file.identity`. ``address`` is a digest of the address that the verdict came from.
    Several processes may append at once; a line is written as a whole or not at all.

    Raises:
        UserError: the message, the response or its correction is empty; the correction is identical to the response;
            the file cannot be written.
    """
    row = feedback_row(prompt, reply, verdict, model=model, model_id=model_id, client=client, address=address)
    line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"the feedback has {len(line):,} bytes: a line of data may have at most {MAX_LINE_BYTES:,}")
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, line)
    except OSError as error:
        raise _write_error(path, error) from error


def check_writable(path: str | Path) -> None:
    """Raise :class:`UserError` if :func:`append_feedback` could not write to ``path``. Creates no file."""
    path = Path(path)
    try:
        if path.exists():
            with path.open("ab"):
                return
        with tempfile.TemporaryFile(dir=next(parent for parent in path.parents if parent.exists())):
            return
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write feedback to {path}: {error.strerror}; choose another file with --feedback")


def feedback_row(
    prompt: Conversation,
    reply: str,
    verdict: Verdict,
    *,
    model: str = "",
    model_id: str = "",
    client: str = "",
    address: str = "",
) -> dict[str, Any]:
    """The OASST tree that :func:`append_feedback` writes."""
    response, messages = _clean(reply), _context(prompt)
    if isinstance(verdict, Correction):
        correction = _clean(verdict.text)
        if not correction.strip():
            raise UserError("the correction is empty: enter the response that the model should have given")
        if correction == response:
            raise UserError("the correction is identical to the response: rate it good, or enter a different text")
        replies = [{**_message("assistant", correction), "rank": 0}]
        replies += [{**_message("assistant", response), "rank": 1, "model_name": model}] if response.strip() else []
    elif verdict == "none":
        replies = []
    else:
        if not response.strip():
            raise UserError("the response is empty and cannot be rated: correct it instead")
        label = {"quality": {"value": _QUALITY[verdict], "count": 1}}
        replies = [{**_message("assistant", response), "labels": label, "model_name": model}]
    # The response is not marked as synthetic, although a model wrote it, because readers of OASST skip synthetic
    # messages.
    for message in reversed(messages):
        parent = _message(_OASST_ROLES[message.role], message.text)
        replies = [{**parent, "replies": [{**child, "parent_id": parent["message_id"]} for child in replies]}]
    return {
        # Equal for all conversations with the same beginning, so that they are in the same split.
        "message_tree_id": tree_id_of(messages),
        "feedback_id": _feedback_id(messages, response, client),
        **({"model_id": model_id} if model_id else {}),
        **({"client": client_digest(client)} if client else {}),
        **({"address": address} if address else {}),
        "verdict": "corrected" if isinstance(verdict, Correction) else verdict,
        "tree_state": "ready_for_export",
        "created_date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "prompt": replies[0],
    }


def feedback_id(prompt: Conversation, reply: str, client: str = "") -> str:
    """Equal for verdicts of one client on the same response to the same conversation.

    Raises:
        UserError: the message is empty.
    """
    return _feedback_id(_context(prompt), _clean(reply), client)


def client_digest(client: str) -> str:
    """What the file has in place of the name of a ``client``."""
    return hashlib.sha256(client.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _feedback_id(messages: Sequence[Message], response: str, client: str) -> str:
    """Equal for verdicts of one client on the same response to the same conversation."""
    texts = [[message.role, message.text] for message in messages]
    parts = [texts, response, *([client] if client else [])]
    return "feedback-" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _message(role: str, text: str) -> dict[str, Any]:
    return {"message_id": str(uuid.uuid4()), "role": role, "text": text}


def _context(prompt: Conversation) -> list[Message]:
    """The messages of ``prompt`` that a reader keeps: the newest, starting with a user message, and the system message.

    Readers drop everything below an empty message, so the context starts after the last empty one.
    """
    if not prompt.is_prompt:
        raise ValueError("feedback needs a conversation that ends with a user message")
    messages = [Message(message.role, _clean(message.text)) for message in prompt.messages]
    system = messages[:1] if messages[0].role == "system" and messages[0].text.strip() else []
    start = max(0, len(messages) - MAX_CONTEXT)
    empty = [i for i, message in enumerate(messages) if not message.text.strip()]
    start = max([start, *(i + 1 for i in empty)])
    while start < len(messages) and messages[start].role != "user":
        start += 1
    if start == len(messages):
        raise UserError("the user message is empty: feedback needs a message with text")
    return system + messages[start:]


def _clean(text: str) -> str:
    """``text`` without characters that a UTF-8 data file cannot contain: NUL and lone surrogates become U+FFFD."""
    return "".join("\ufffd" if c == "\0" or "\ud800" <= c <= "\udfff" else c for c in text)


def _append(path: Path, line: bytes) -> None:
    """Append ``line`` to ``path`` under an exclusive lock. If the disk is full, remove the incomplete line."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        _lock(descriptor)
        end = os.lseek(descriptor, 0, os.SEEK_END)
        if end:  # an editor or a crashed program may have left the last line without a line break
            os.lseek(descriptor, end - 1, os.SEEK_SET)
            line = line if os.read(descriptor, 1) == b"\n" else b"\n" + line
        try:
            if (written := os.write(descriptor, line)) < len(line):
                written += os.write(descriptor, line[written:])  # completes the line or raises an error
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)  # releases the lock


def _lock(descriptor: int) -> None:
    """Wait for an exclusive lock. Windows has no such lock; there, the line is written with one call."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)

"""Reads the verdicts in a feedback file; :mod:`rlchat.chat.feedback` writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from rlchat.conversation import Conversation
from rlchat.data.forest import tree_id_of
from rlchat.data.jsonl import BadLineError, LineReport, parse_object, take_lines
from rlchat.data.readers import Readers, ReadOptions
from rlchat.errors import UserError
from rlchat.utils.files import lines_from_end

VerdictKind = Literal["good", "bad", "corrected", "none"]
_KINDS = ("good", "bad", "corrected", "none")
TAIL_BYTES = 32 << 20  # a verdict has about 1 kB
_CURE = "fix or delete the line, or pass --on-bad-line skip"


@dataclass(frozen=True, slots=True)
class JudgedResponse:
    """The verdict of one client on one response.

    Attributes:
        prompt: the conversation that the response belongs to; it ends with a user message.
        response: the judged text; empty if an empty response was corrected.
        kind: the verdict. ``none`` withdraws an earlier one.
        correction: the text that replaces a corrected response; else empty.
        model: the file name of the model that generated the response; empty if it is not known.
        feedback_id: equal for verdicts of one client on the same response to the same prompt.
        model_id: the :func:`rlchat.models.model_file.identity` of that model; empty in files of version 0.1.
    """

    prompt: Conversation
    response: str
    kind: VerdictKind
    correction: str
    model: str
    feedback_id: str
    model_id: str = ""

    @property
    def opening_id(self) -> str:
        """Equal for all conversations with the same first user message, apart from case and white space."""
        return tree_id_of(self.prompt.messages)


@dataclass(slots=True)
class FeedbackReport(LineReport):
    """What was read from a feedback file: its lines, and how many verdicts no longer count."""

    replaced: int = 0
    withdrawn: int = 0


def read_verdicts(
    path: str | Path, *, on_bad_line: Literal["error", "skip"] = "error"
) -> tuple[list[JudgedResponse], FeedbackReport]:
    """The verdicts in the file ``path`` that count, in the order of their lines.

    A response has one verdict per client, the last one in the file. A verdict that was taken back does not count.

    Args:
        path: the feedback file.
        on_bad_line: stop at a line that is not a verdict, or skip and count it.

    Raises:
        UserError: the file is missing or unreadable; a bad line.
    """
    report = FeedbackReport()
    lasting: dict[str, JudgedResponse] = {}

    def take(line: bytes) -> None:
        verdict = verdict_of(parse_object(line))
        report.replaced += lasting.pop(verdict.feedback_id, None) is not None
        lasting[verdict.feedback_id] = verdict

    take_lines([path], take, report, on_bad_line=on_bad_line, cure=_CURE)
    counting = [verdict for verdict in lasting.values() if verdict.kind != "none"]
    report.withdrawn = len(lasting) - len(counting)
    return counting, report


def namesake(name: str) -> str:
    """How errors name another model whose file has the same ``name`` as the one that learns."""
    return f"another model named {name} (as when it was trained again)"


def recent_clients(path: str | Path, seconds: float, most: int) -> list[tuple[float, str]]:
    """The age in seconds and the client of each verdict of the last ``seconds``, the oldest first.

    Only the newest ``most`` are returned, and only the last :data:`TAIL_BYTES` of the file are read. Verdicts without a
    client, such as those of the terminal, are left out. Damaged lines are skipped.

    Args:
        path: the feedback file. If it is missing, there are no verdicts.
        seconds: how far to look back. Lines are in the order of their dates.
        most: the largest number of verdicts.

    Raises:
        UserError: the file cannot be read.
    """
    found: list[tuple[float, str]] = []
    now = datetime.now(timezone.utc)
    try:
        for line in lines_from_end(Path(path), TAIL_BYTES):
            try:
                row = parse_object(line)
                date = datetime.fromisoformat(str(row.get("created_date")))
            except (BadLineError, ValueError):
                continue
            age = (now - date.replace(tzinfo=date.tzinfo or timezone.utc)).total_seconds()
            if age >= seconds or len(found) == most:
                break
            if row.get("verdict") in _KINDS and isinstance(row.get("client"), str):
                found.append((max(age, 0.0), row["client"]))  # the clock may have been set back
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return sorted(found, reverse=True)


def verdict_of(row: dict[str, Any]) -> JudgedResponse:
    """The verdict in a row of :func:`rlchat.chat.feedback.feedback_row`; :class:`BadLineError` if it has none."""
    feedback_id, kind = row.get("feedback_id"), row.get("verdict")
    if not isinstance(feedback_id, str) or kind not in _KINDS or not isinstance(row.get("prompt"), dict):
        raise BadLineError("not a verdict: expected the fields feedback_id, verdict and prompt of a feedback file")
    readers = Readers(ReadOptions(any_state=True, keep_synthetic=True, lang=None), Counter())
    readers.read(row)
    prompts = [prompt for tree in readers.linked() for prompt in tree.prompts.values()]
    if not prompts:
        raise BadLineError("the verdict has no user message with text")
    prompt = max(prompts, key=lambda found: len(found.messages))
    texts = [reply.text for reply in sorted(prompt.references, key=lambda reply: reply.rank or 0)]
    expected: dict[str, Callable[[int], bool]] = {"none": lambda n: n == 0, "corrected": lambda n: 1 <= n <= 2}
    if not expected.get(kind, lambda n: n == 1)(len(texts)):
        raise BadLineError(f"the verdict {kind!r} does not fit its {len(texts)} responses")
    correction = texts[0] if kind == "corrected" else ""
    response = "" if not texts or (kind == "corrected" and len(texts) == 1) else texts[-1]
    bare, model_id = Conversation(prompt.messages), row.get("model_id")
    known = model_id if isinstance(model_id, str) else ""
    return JudgedResponse(bare, response, kind, correction, _model_name(row["prompt"]), feedback_id, known)


def _model_name(root: dict[str, Any]) -> str:
    """The ``model_name`` of the judged response. Only responses that were judged have one."""
    names = (message.get("model_name") for message in _messages(root))
    return next((name for name in names if isinstance(name, str) and name), "")


def _messages(root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    stack: list[Any] = [root]
    while stack:
        message = stack.pop()
        if isinstance(message, dict):
            yield message
            replies = message.get("replies")
            stack.extend(replies if isinstance(replies, Sequence) else ())

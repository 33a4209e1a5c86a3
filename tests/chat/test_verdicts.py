"""Reading verdicts: every kind as it was given, the last one per client, those taken back, and lines that are none."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from rlchat.chat.feedback import Correction, Verdict, append_feedback, client_digest, feedback_row
from rlchat.chat.verdicts import read_verdicts, recent_clients
from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.utils.files import append_lines

HELLO = Conversation((Message("user", "Hello"),))
LATER = Conversation((Message("user", "Hello"), Message("assistant", "Hi."), Message("user", "Who are you?")))


@pytest.mark.parametrize("prompt", [HELLO, LATER], ids=["first", "later"])
@pytest.mark.parametrize(
    ("response", "verdict", "expected"),
    [
        ("Hi.", "good", ("Hi.", "good", "", "m.pt")),
        ("Hi.", "bad", ("Hi.", "bad", "", "m.pt")),
        ("No.", Correction("Yes."), ("No.", "corrected", "Yes.", "m.pt")),
        ("", Correction("Yes."), ("", "corrected", "Yes.", "")),  # an empty response is not in the file, nor its model
    ],
)
def test_a_verdict_is_read_as_it_was_given(
    prompt: Conversation, response: str, verdict: Verdict, expected: tuple[str, ...], tmp_path: Path
) -> None:
    append_feedback(tmp_path / "f", prompt, response, verdict, model="m.pt")
    (found,), report = read_verdicts(tmp_path / "f")
    assert (found.response, found.kind, found.correction, found.model) == expected
    assert [(m.role, m.text) for m in found.prompt.messages] == [(m.role, m.text) for m in prompt.messages]
    assert found.opening_id.startswith("row-")
    assert (report.lines, report.replaced, report.withdrawn) == (1, 0, 0)


def test_the_last_verdict_of_a_client_counts(tmp_path: Path) -> None:
    path = tmp_path / "f"
    given: list[tuple[str, Verdict, str]] = [
        ("Hi.", "good", "ann"),
        ("Hi.", "good", "bob"),
        ("Bye.", "bad", "ann"),
        ("Hi.", "bad", "ann"),  # replaces ann's first
        ("Bye.", "none", "ann"),  # takes her second back
        ("Hi.", Correction("Hello!"), "bob"),  # replaces bob's
    ]
    for response, verdict, client in given:
        append_feedback(path, HELLO, response, verdict, client=client)
    found, report = read_verdicts(path)
    assert [(v.response, v.kind, v.correction) for v in found] == [
        ("Hi.", "bad", ""),
        ("Hi.", "corrected", "Hello!"),
    ]
    assert (report.lines, report.replaced, report.withdrawn) == (6, 3, 1)


def test_a_verdict_that_is_given_again_counts_again(tmp_path: Path) -> None:
    verdicts: list[Verdict] = ["good", "none", "good"]
    for verdict in verdicts:
        append_feedback(tmp_path / "f", HELLO, "Hi.", verdict)
    (found,), report = read_verdicts(tmp_path / "f")
    assert found.kind == "good"
    assert report.withdrawn == 0


def damaged(line: str) -> list[str]:
    row = json.loads(line)
    return [
        line[: len(line) // 2],
        '{"messages": [{"content": "a"}, {"content": "b"}]}',
        json.dumps({**row, "verdict": "great"}),
        json.dumps({**row, "verdict": "corrected", "prompt": {**row["prompt"], "replies": []}}),
        json.dumps({**row, "prompt": {**row["prompt"], "text": " "}}),
        json.dumps({**row, "prompt": 3}),
    ]


@pytest.mark.parametrize("number", range(6))
def test_a_damaged_line_is_named_or_skipped(number: int, tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    append_feedback(path, HELLO, "Hi.", "good")
    good = path.read_text()
    path.write_text(good + damaged(good)[number] + "\n")
    with pytest.raises(UserError, match=r"f\.jsonl:2: .*; fix or delete the line, or pass --on-bad-line skip$"):
        read_verdicts(path)
    found, report = read_verdicts(path, on_bad_line="skip")
    assert [v.response for v in found] == ["Hi."]
    assert report.bad_lines == 1


def row(client: str, minutes: float, verdict: Verdict = "good") -> dict[str, Any]:
    """A row of a feedback file, given that many minutes ago."""
    prompt = Conversation((Message("user", "Hi"),))
    date = (datetime.now(timezone.utc) - timedelta(minutes=minutes)).isoformat(timespec="seconds")
    return {**feedback_row(prompt, "Hello.", verdict, client=client), "created_date": date}


def test_the_clients_of_the_last_hour(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    assert recent_clients(path, 3600, 10) == []
    rows = [row("old", 61), row("ann", 59), row("", 40), row("bob", 30, Correction("Hi.")), row("ann", 5, "none")]
    append_lines(path, [*rows, row("bob", -3, "bad")])  # the clock was set back since
    with path.open("a") as file:
        file.write('damaged\n{"created_date": 3}\n')
    ann, bob = client_digest("ann"), client_digest("bob")
    found = recent_clients(path, 3600, 10)
    assert [client for _, client in found] == [ann, bob, ann, bob]  # also what takes a verdict back
    assert [age for age, _ in found] == pytest.approx([59 * 60, 30 * 60, 5 * 60, 0], abs=20)
    assert [client for _, client in recent_clients(path, 3600, 2)] == [ann, bob]
    assert [client for _, client in recent_clients(path, 45 * 60, 10)] == [bob, ann, bob]
    with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
        recent_clients(tmp_path, 3600, 10)


def test_only_the_end_of_a_large_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "feedback.jsonl"
    append_lines(path, [row("ann", 3), row("ann", 2)])
    monkeypatch.setattr("rlchat.chat.verdicts.TAIL_BYTES", path.stat().st_size - 1)
    assert len(recent_clients(path, 3600, 10)) == 1

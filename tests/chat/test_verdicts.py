"""Reading verdicts: every kind as it was given, the last one per client, those taken back, and lines that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlchat.chat.feedback import Correction, Verdict, append_feedback
from rlchat.chat.verdicts import read_verdicts
from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError

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

"""Verdicts in a feedback file are counted while it grows, as `rlchat learn` counts them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from rlchat.chat.feedback import Correction, Verdict, append_feedback
from rlchat.chat.learning.tally import Tally
from rlchat.chat.verdicts import read_verdicts
from rlchat.conversation import Conversation, Message


def give(
    path: Path, question: str, verdict: Verdict, *, client: str = "", model: str = "chat.pt", model_id: str = ""
) -> None:
    prompt = Conversation((Message("user", question),))
    append_feedback(path, prompt, "No.", verdict, client=client, model=model, model_id=model_id)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "feedback.jsonl"


def tally_of(path: Path) -> Tally:
    tally = Tally(path, lambda name: name == "chat.pt")
    tally.update()
    return tally


def test_what_was_appended_is_counted(path: Path) -> None:
    tally = tally_of(path)
    assert (tally.total, tally.new, tally.size) == (0, 0, 0)
    give(path, "a", "good")
    give(path, "b", "bad")
    tally.update()
    assert (tally.total, tally.new, tally.size) == (2, 2, path.stat().st_size)
    tally.use(tally.digests)
    give(path, "b", "bad")  # the same again
    tally.update()
    assert (tally.total, tally.new) == (2, 0)
    give(path, "b", Correction("Yes."))  # replaces it
    give(path, "c", "good")
    give(path, "c", "good", client="another")
    tally.update()
    assert (tally.total, tally.new) == (4, 3)
    give(path, "c", "none", client="another")
    give(path, "a", "none")
    tally.update()
    assert (tally.total, tally.new) == (2, 2)


def test_it_counts_like_the_learner(path: Path) -> None:
    chosen, tally = random.Random(0), tally_of(path)
    for _ in range(30):
        verdicts: list[Verdict] = ["good", "bad", "none", Correction(chosen.choice("xy"))]
        give(path, chosen.choice("abcdef"), chosen.choice(verdicts), client=chosen.choice(["", "1"]))
        if chosen.random() < 0.3:
            tally.update()
    tally.update()
    assert tally.total == len(read_verdicts(path)[0]) > 3
    assert tally.digests == tally_of(path).digests


def test_damaged_lines_and_other_models_do_not_count(path: Path) -> None:
    give(path, "a", "good")
    give(path, "b", "good", model="other.pt")
    with path.open("ab") as file:
        file.write(b'{"feedback_id": 1}\n\nno json\n' + b"x" * 9_000_000 + b"\n")
    tally = tally_of(path)
    assert (tally.total, tally.bad_lines, dict(tally.others)) == (1, 3, {"other.pt": 1})
    give(path, "b", "none", model="other.pt")
    tally.update()
    assert (tally.total, tally.bad_lines, dict(tally.others)) == (1, 3, {})


def test_a_line_that_is_being_written_is_read_when_it_is_complete(path: Path) -> None:
    give(path, "a", "good")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    tally = tally_of(path)
    assert (tally.total, tally.bad_lines, tally.size) == (0, 0, 0)
    with path.open("ab") as file:
        file.write(whole[-20:])
    tally.update()
    assert (tally.total, tally.bad_lines) == (1, 0)


def test_a_file_that_was_replaced_or_edited_is_read_again(path: Path) -> None:
    for question in "abc":
        give(path, question, "good")
    tally = tally_of(path)
    tally.use(tally.digests)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    tally.update()
    assert (tally.total, tally.new) == (2, 0)
    row = json.loads(lines[1])
    path.write_bytes(lines[0] + lines[2] + json.dumps({**row, "feedback_id": "feedback-x"}).encode() + b"\n")
    tally.update()
    assert (tally.total, tally.new) == (3, 1)
    path.unlink()
    tally.update()
    assert (tally.total, tally.new) == (0, 0)


def test_the_identity_of_a_model_counts_more_than_its_name(path: Path) -> None:
    give(path, "a", "good", model_id="mine", model="copy.pt")
    give(path, "b", "good", model_id="another")
    give(path, "c", "good")  # of an earlier version of rlchat
    tally = Tally(path, lambda name: name == "chat.pt", model_id="mine")
    tally.update()
    assert (tally.total, dict(tally.others)) == (2, {"another model named chat.pt (as when it was trained again)": 1})

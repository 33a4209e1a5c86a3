"""Feedback: the lines that are written, concurrent writers, and a reward model that trains on the file."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import rlchat
from helpers.full_disk import largest_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlchat.chat.feedback import MAX_CONTEXT, Correction, Verdict, append_feedback, check_writable, feedback_row
from rlchat.conversation import Conversation, Message
from rlchat.data.formats import ranked_pairs, read_trees
from rlchat.errors import UserError
from rlchat.rewards import Reply
from rlchat.rewards.learned import LearnedQuality


def asked(*texts: str, system: str | None = None) -> Conversation:
    """A conversation of user and assistant in turn that ends with a question."""
    assert len(texts) % 2 == 1
    turns = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    return Conversation((*([Message("system", system)] if system else []), *turns))


def judged(path: Path) -> list[Conversation]:
    """The prompts that have rated responses, as a reward model reads them."""
    trees, _ = read_trees([path], progress=False)
    prompts = [prompt for tree in trees for prompt in tree.prompts]
    return [p for p in prompts if any(r.quality is not None or r.rank is not None for r in p.references)]


# -- what a line says --


def test_a_verdict_is_a_quality_label(tmp_path: Path) -> None:
    path = tmp_path / "new" / "feedback.jsonl"
    append_feedback(path, asked("Hello"), "Hi there!", "good", model="rl.pt")
    append_feedback(path, asked("Who are you?", "Rl.", "And?", system="Be brief."), "No.", "bad")
    first, second = judged(path)
    assert first.messages == (Message("user", "Hello"),)
    assert first.references == (Message("assistant", "Hi there!", quality=1.0),)
    assert second.messages == (
        Message("system", "Be brief."),
        Message("user", "Who are you?"),
        Message("assistant", "Rl."),
        Message("user", "And?"),
    )
    assert second.references == (Message("assistant", "No.", quality=0.0),)
    assert len(path.read_text().splitlines()) == 2


def test_a_correction_ranks_above_the_reply(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    append_feedback(path, asked("Where is Anna?"), "In Rom.", Correction("In Paris."))
    (prompt,) = judged(path)
    assert ranked_pairs(prompt) == [
        (Message("assistant", "In Paris.", rank=0), Message("assistant", "In Rom.", rank=1))
    ]


def test_the_line_is_an_oasst_tree(tmp_path: Path) -> None:
    row = feedback_row(asked("a", "b", "c"), "d", "good", model="rl.pt")
    assert row["tree_state"] == "ready_for_export"
    root = row["prompt"]
    (child,) = root["replies"]
    (grandchild,) = child["replies"]
    (reply,) = grandchild["replies"]
    assert [m["role"] for m in (root, child, grandchild, reply)] == ["prompter", "assistant", "prompter", "assistant"]
    assert [m["parent_id"] for m in (child, grandchild, reply)] == [m["message_id"] for m in (root, child, grandchild)]
    assert reply["labels"] == {"quality": {"value": 1.0, "count": 1}}
    assert reply["model_name"] == "rl.pt"


def test_several_verdicts_on_one_prompt(tmp_path: Path) -> None:
    """The last verdict on each response counts; labels of one prompt are gathered, corrections are pairs."""
    path = tmp_path / "feedback.jsonl"
    for reply, verdict in [
        ("One.", "good"),
        ("Two.", "bad"),
        ("One.", "bad"),
        ("Two.", Correction("Three.")),
        ("Two.", Correction("Four.")),
        ("Five.", "good"),
        ("Six.", "bad"),
        ("Six.", "none"),
    ]:
        append_feedback(path, asked("Say it"), reply, verdict)  # type: ignore[arg-type]
    trees, report = read_trees([path], progress=False)
    assert len(trees) == 1  # so that no part of it is held out from the others
    assert report.bad_lines == 0
    assert report.dropped == {"replaced or withdrawn verdicts": 5}  # 5 lines of 8 have no effect
    assert len(path.read_text().splitlines()) == 8
    rated = {tuple((r.text, r.quality, r.rank) for r in prompt.references) for prompt in judged(path)}
    assert rated == {(("One.", 0.0, None), ("Five.", 1.0, None)), (("Four.", None, 0), ("Two.", None, 1))}


def test_a_verdict_replaces_only_those_of_the_same_client(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    for client, verdict in [("anna", "good"), ("ben", "good"), ("", "none"), ("anna", "bad")]:
        append_feedback(path, asked("Hello"), "Hi!", verdict, client=client)  # type: ignore[arg-type]
    _, report = read_trees([path], progress=False)
    assert report.dropped == {"replaced or withdrawn verdicts": 2}  # the first of anna, and the withdrawal
    assert sorted(r.quality for p in judged(path) for r in p.references) == [0.0, 1.0]  # type: ignore[type-var]
    ids = [json.loads(line)["feedback_id"] for line in path.read_text().splitlines()]
    assert ids[0] == ids[3]
    assert len(set(ids)) == 3


def test_equal_first_messages_share_a_tree_id(tmp_path: Path) -> None:
    append_feedback(tmp_path / "f.jsonl", asked("Hello"), "Hi.", "good")
    append_feedback(tmp_path / "f.jsonl", asked("hello ", "Hi.", "Bye"), "Bye.", "good")
    (tmp_path / "g.jsonl").write_text('{"messages": [{"content": "Hello"}, {"content": "Hm."}]}\n')
    trees, _ = read_trees([tmp_path / "f.jsonl", tmp_path / "g.jsonl"], progress=False)
    assert len(trees) == 1


def test_a_long_conversation_keeps_its_end(tmp_path: Path) -> None:
    texts = [str(i) for i in range(1001)]  # 0 is a user's, 1 the assistant's, …
    path = tmp_path / "feedback.jsonl"
    append_feedback(path, asked(*texts, system="S"), "Yes.", "good")
    (prompt,) = judged(path)
    assert [m.text for m in prompt.messages] == ["S", *texts[-(MAX_CONTEXT - 1) :]]  # from a user's message on


def test_empty_messages_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    # A silent reply is empty, and a reader drops what hangs below an empty message; NUL and surrogates are no text.
    append_feedback(path, asked("a", "", "b\0", "c", "d"), "e\ud800", "good")
    (prompt,) = judged(path)
    assert [m.text for m in prompt.messages] == ["b\ufffd", "c", "d"]
    assert prompt.references[0].text == "e\ufffd"


def test_a_correction_of_an_empty_response(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    append_feedback(path, asked("Hello"), " ", Correction("Hi!"))
    (prompt,) = judged(path)
    assert prompt.references == (Message("assistant", "Hi!", rank=0),)


def test_unusual_text_is_preserved(tmp_path: Path) -> None:
    text = 'line\nnext\u2028line\u0085 "quoted" \\ 👩‍👩‍👧 é <|end|> \x1b[2J'
    path = tmp_path / "feedback.jsonl"
    append_feedback(path, asked(text), text + "!", "good")
    (prompt,) = judged(path)
    assert (prompt.messages[0].text, prompt.references[0].text) == (text, text + "!")
    assert path.read_bytes().count(b"\n") == 1


TEXTS = st.text(st.characters(), max_size=8)  # NUL and lone surrogates among them


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.lists(st.tuples(TEXTS, TEXTS), max_size=3),
    question=TEXTS,
    reply=TEXTS,
    verdict=st.sampled_from(["good", "bad"]) | st.builds(Correction, TEXTS),
)
def test_every_written_line_can_be_read(
    tmp_path: Path, before: list[tuple[str, str]], question: str, reply: str, verdict: Verdict
) -> None:
    path = tmp_path / "feedback.jsonl"
    path.unlink(missing_ok=True)
    corrected = verdict.text if isinstance(verdict, Correction) else None
    asked_last, said, meant = (
        re.sub("[\0\ud800-\udfff]", "\ufffd", text) for text in (question, reply, corrected or "")
    )
    prompt = asked(*(text for turn in before for text in turn), question)
    nothing = not asked_last.strip() or (not said.strip() if corrected is None else not meant.strip() or meant == said)
    if nothing:
        with pytest.raises(UserError):
            append_feedback(path, prompt, reply, verdict)
        return
    append_feedback(path, prompt, reply, verdict)
    (kept,) = judged(path)
    assert kept.messages[-1].text == asked_last
    replies = [said] if corrected is None else [meant, said]
    assert [r.text for r in kept.references] == [text for text in replies if text.strip()]


# -- what cannot be kept --


@pytest.mark.parametrize(
    ("reply", "verdict", "why"),
    [
        (" \n", "good", "the response is empty"),
        ("a", Correction("  "), "the correction is empty"),
        ("a", Correction("a"), "the correction is identical to the response"),
    ],
)
def test_invalid_feedback_is_refused(tmp_path: Path, reply: str, verdict: Correction, why: str) -> None:
    with pytest.raises(UserError, match=why):
        append_feedback(tmp_path / "f.jsonl", asked("Hello"), reply, verdict)
    assert not (tmp_path / "f.jsonl").exists()


def test_feedback_without_a_question_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the user message is empty"):
        append_feedback(tmp_path / "f.jsonl", asked("a", "b", " "), "Hi.", "good")
    with pytest.raises(ValueError, match="ends with a user message"):
        append_feedback(tmp_path / "f.jsonl", Conversation((Message("assistant", "Hi."),)), "Hi.", "good")


def test_a_line_too_long_for_the_reader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 9,000,\d+ bytes"):
        append_feedback(tmp_path / "f.jsonl", asked("x" * 9_000_000), "Oh.", "good")
    assert not (tmp_path / "f.jsonl").exists()


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "f.jsonl"):
        with pytest.raises(UserError, match=r"cannot write feedback to .*; choose another file"):
            append_feedback(path, asked("Hello"), "Hi.", "good")


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    append_feedback(path, asked("Hello"), "Hi.", "good")
    before = path.read_bytes()
    with largest_file(len(before) + 50), pytest.raises(UserError, match="File too large"):
        append_feedback(path, asked("Hello"), "Hi.", "bad")
    assert path.read_bytes() == before


def test_an_incomplete_last_line_is_terminated(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    path.write_bytes(b'{"message_id": "half')
    append_feedback(path, asked("Hello"), "Hi.", "good")
    trees, report = read_trees([path], on_bad_line="skip", progress=False)
    assert (len(trees), report.bad_lines) == (1, 1)


# -- many at once --


def test_concurrent_processes(tmp_path: Path) -> None:
    path, each = tmp_path / "feedback.jsonl", 40
    program = """
import sys
from rlchat.conversation import Conversation, Message
from rlchat.chat.feedback import append_feedback
assert "torch" not in sys.modules
for i in range(int(sys.argv[3])):
    prompt = Conversation((Message("user", f"{sys.argv[2]} {i} " + "x" * 20_000),))
    append_feedback(sys.argv[1], prompt, "Hi.", "good")
"""
    root = str(Path(__file__).parents[2])
    words = [sys.executable, "-c", program, str(path)]
    running = [subprocess.Popen([*words, name, str(each)], env={"PYTHONPATH": root}) for name in "abcd"]
    assert [process.wait(60) for process in running] == [0] * 4
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    said = {row["prompt"]["text"].rpartition(" ")[0] for row in rows}
    assert said == {f"{name} {i}" for name in "abcd" for i in range(each)}
    assert len(rows) == 4 * each


# -- and a model that learns from it --


@pytest.mark.slow
def test_a_reward_model_trains_on_feedback(workplace: Path, trained: Path) -> None:
    """`rlchat fit --config reward --data.path feedback.jsonl`, as the documentation says."""
    shutil.copytree(trained / "checkpoints", "checkpoints")
    for n in range(12):
        append_feedback("feedback.jsonl", asked(f"Question {n}?"), "no no no", "bad")
        append_feedback("feedback.jsonl", asked(f"Question {n}?"), "Yes, of course.", "good")
        append_feedback("feedback.jsonl", asked(f"What of {n}?"), "no no no", Correction("Yes, of course."))
    words = ["--data.path", "feedback.jsonl", "--trainer.max_epochs", "20", "--model.learning_rate", "3e-3"]
    rlchat("fit", "--config", "reward", *words)
    judge = LearnedQuality("checkpoints/reward_model.pt")
    prompts = [asked("Question 50?")] * 2
    good, bad = judge(prompts, [Reply("Yes, of course.", 5, True), Reply("no no no", 4, True)]).tolist()
    assert good > bad + 0.5


def test_check_writable(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "f.jsonl"
    check_writable(path)
    assert list(tmp_path.iterdir()) == []  # it only looked
    append_feedback(path, asked("Hello"), "Hi.", "good")
    content = path.read_bytes()
    check_writable(path)
    assert path.read_bytes() == content
    for place in (path.parent, path / "below"):
        with pytest.raises(UserError, match="cannot write feedback to"):
            check_writable(place)

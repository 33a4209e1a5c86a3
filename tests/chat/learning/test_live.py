"""`rlchat chat --learn` in this process: swaps between responses, commands, and lines about each event."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import quick_round
from helpers.chat_models import chain, random_policy, scripted_policy
from helpers.servers import wait_until

from rlchat.__main__ import main
from rlchat.chat.feedback import append_feedback
from rlchat.chat.interface import ChatInterface
from rlchat.chat.learning.live import LiveLearning, table_of
from rlchat.chat.learning.rounds import Outcome
from rlchat.chat.learning.table import version_table
from rlchat.chat.repl import Session
from rlchat.chat.saved import load_conversation
from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.models.model_file import identity, load_policy, save_bundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

SAMPLING = {"temperature": 0.0, "max_new_tokens": 8}


@pytest.fixture
def model(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> Path:
    """A model that says "old " again and again; the version beside it says "new!"."""
    path = tmp_path / "chat.pt"
    save_bundle(path, scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(b"old "), endless=True), 1_000))
    version = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(b"new!"), endless=True), 1_000)
    version.about["learned"] = {"model_id": identity(load_policy(path, "cpu"))}
    save_bundle(path.with_name("new.pt"), version)
    return path


@contextlib.contextmanager
def chatting(model: Path, *options: str) -> Iterator[Session]:
    """A chat that learns from every two verdicts."""
    feedback = model.with_name("feedback.jsonl")
    learning = LiveLearning(model, feedback, every=2, options=options, command=quick_round.COMMAND)
    chat = ChatInterface(learning.path, device="cpu")
    session = Session(chat, dict(SAMPLING), feedback=str(feedback), learning=learning)
    for line in learning.start(chat):
        session.note(line)
    try:
        yield session
    finally:
        session.close()


def run(session: Session, *lines: str) -> None:
    for line in lines:
        assert not session._handle(line)


def teach(session: Session, *questions: str) -> None:
    for question in questions:
        run(session, question, "/bad")


def wait_for_news(session: Session, number: int = 1) -> list[str]:
    lines: list[str] = []

    def is_there() -> bool:
        lines.extend(session.news())
        return len(lines) >= number

    wait_until(is_there)
    return lines


def said(session: Session) -> str:
    return session.chat.history[-1].text


def learned(session: Session, number: int) -> None:
    """Waits until version ``number`` is active, without a look at the news."""
    assert session.learning is not None
    learning = session.learning
    wait_until(lambda: f"version {number} answers" in learning.describe())


def notes(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_version_is_used_from_the_next_response_on(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = model.with_name("talk.json")
    with chatting(model, "--copy", str(model.with_name("new.pt"))) as session:
        assert notes(capsys) == ["learning from good, bad and edit: after 2 new verdicts, a version is trained"]
        teach(session, "a", "b")
        learned(session, 1)
        run(session, "c")
        assert said(session) == "old old "  # it swaps in news(), between two responses, and nowhere else
        assert session.news() == [
            "version 1 has learned from 2 verdicts: agrees with 2 of 2 held-back verdicts, before: 1; now in use"
        ]
        assert session.news() == []
        run(session, "/good", "d")
        assert said(session) == "new!new!"
        notes(capsys)
        run(session, "/rollback", "/bad", f"/save {talk}", "e")
        assert notes(capsys)[0] == (
            "the original model (chat.pt) answers from now on; the next round begins after 2 new verdicts"
        )
        assert said(session) == "old old "
        run(session, "/versions", "/rollback 1", "f", "/rollback 7", "/rollback one")
        assert said(session) == "new!new!"
        table = notes(capsys)
        assert [line.split()[:2] for line in table[1:3]] == [["*", "0"], ["1", table[2].split()[1]]]
        assert table[3:] == [
            "version 1 (1.pt) answers from now on; the next round begins after 2 new verdicts",
            "there is no version 7; expected one of 0, 1",
            "invalid version 'one': expected a number, as in: rollback 1",
        ]
    # Each response has the name of the file that generated it, whatever is in use when it is rated or saved.
    replies = [message for message in load_conversation(talk).messages if message.role == "assistant"]
    assert [message.model for message in replies] == ["chat.pt", "chat.pt", "chat.pt", "1.pt"]
    rows = [json.loads(line) for line in model.with_name("feedback.jsonl").read_text().splitlines()]
    assert [name_in(row["prompt"]) for row in rows] == ["chat.pt", "chat.pt", "chat.pt", "1.pt"]
    original = load_policy(model, "cpu")
    assert {row["model_id"] for row in rows} == {identity(original)}
    fresh = ChatInterface(model, device="cpu")
    fresh.load(talk)
    fresh.add_feedback("good", model.with_name("other.jsonl"))
    assert name_in(json.loads(model.with_name("other.jsonl").read_text())["prompt"]) == "1.pt"


def name_in(node: dict[str, Any]) -> str:
    """The model of the last message of a tree with one message at each level."""
    while node.get("replies"):
        node = node["replies"][0]
    return str(node["model_name"])


def test_the_cache_of_the_model_before_is_not_used(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for seed, path in enumerate(paths):
        save_bundle(path, random_policy(tokenizer, max_length=256, seed=seed))
    chat, fresh = (ChatInterface(path, device="cpu") for path in paths)
    chat.generate_response("Where does Anna live, and why there?", 20, 0.0)
    chat.save(tmp_path / "talk.json")
    chat.swap(load_policy(paths[1], "cpu"), paths[1])
    fresh.load(tmp_path / "talk.json")
    assert chat.generate_response("And now?", 20, 0.0) == fresh.generate_response("And now?", 20, 0.0)
    assert chat.model_path == paths[1]


def test_the_last_response_is_scored_by_the_model_that_generated_it(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A swap comes between two lines, also between a response and the command `reward`."""
    for name, words in ((model.name, 4), ("new.pt", 8)):
        bundle = load_policy(model.with_name(name), "cpu")
        bundle.about["reward"] = [{"class_path": "rlchat.rewards.TooShort", "init_args": {"min_words": words}}]
        save_bundle(model.with_name(name), bundle)
    chat = ChatInterface(model, device="cpu")
    session = Session(chat, dict(SAMPLING))
    chat.generate_response("a", **SAMPLING)
    chat.swap(load_policy(model.with_name("new.pt"), "cpu"), model.with_name("new.pt"))
    assert chat.score_last_response()[0] == {"too_short": -0.5}  # "old old " has two of four words
    run(session, "/reward")
    assert notes(capsys)[0].split() == ["reward", "-0.500"]
    assert chat.generate_response("b", **SAMPLING) == "new!new!"
    assert chat.score_last_response()[0] == {"too_short": -0.75}  # two of eight
    chat.undo()
    assert chat.score_last_response()[0] == {"too_short": -0.75}  # which model it was is not kept


def test_no_swap_within_a_response(model: Path) -> None:
    chat = ChatInterface(model, device="cpu")
    pieces = chat.stream_response("a", 8, 0.0)
    begun = next(pieces)
    with pytest.raises(UserError, match="is generating another response"):
        chat.swap(load_policy(model.with_name("new.pt"), "cpu"), model.with_name("new.pt"))
    assert begun + "".join(pieces) == "old old "


def test_rejected_and_failed_rounds(model: Path) -> None:
    with chatting(model, "--reject") as session:
        teach(session, "a", "b")
        assert wait_for_news(session) == ["no new version: it forgets"]
        run(session, "c")
        assert said(session) == "old old "
    with chatting(model, "--crash") as session:
        teach(session, "d", "e")
        (line,) = wait_for_news(session)
        assert line == f"no new version: {session.feedback}: none of 2 verdicts can be used"
        assert session.news() == []
        teach(session, "g")  # one more verdict starts another round, which fails in the same way
        assert wait_for_news(session) == [line]
        assert session.news() == []
        run(session, "f")
        assert said(session) == "old old "


def test_a_version_that_cannot_be_loaded(model: Path) -> None:
    model.with_name("broken.pt").write_bytes(b"half")
    with chatting(model, "--copy", str(model.with_name("broken.pt"))) as session:
        teach(session, "a", "b")
        first, second = wait_for_news(session, 2)
        assert first.startswith("version 1 has learned from 2 verdicts")
        assert not first.endswith("now in use")
        assert second.startswith("no new version: version 1 is not in use: ")
        run(session, "c")
        assert said(session) == "old old "


def test_bad_feedback(model: Path) -> None:
    prompt = Conversation((Message("user", "a"),))
    for name in ("x", "y"):
        append_feedback(model.with_name("feedback.jsonl"), prompt, name, "bad", model="other.pt")
    with chatting(model) as session:
        (line,) = wait_for_news(session)
        assert line.startswith("no new version: the verdicts in ")
        assert line.endswith("feedback.jsonl are on responses of other.pt, not of chat.pt")
        with model.with_name("feedback.jsonl").open("a") as file:
            file.write("{\n" * 2)
        (line,) = wait_for_news(session)
        assert line.startswith("2 damaged lines in ")
        run(session, "c")
        assert said(session) == "old old "


def test_what_was_left_out_and_not_measured_is_said(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model.with_name("feedback.jsonl")
    prompt = Conversation((Message("user", "a"),))
    for number in range(6):
        append_feedback(path, prompt, str(number), "bad", model="a\nb.pt" if number else "old.pt")
    note = "agreement is not part of the gate: 2 verdicts are fewer than 10"
    feedback = {
        "verdicts": 2,
        "kinds": {"bad": 2},
        "left_out": {"on responses of other models": 6, "longer than max_length 64": 1},
    }
    with chatting(model, "--figures", json.dumps({"notes": [note], "feedback": feedback})) as session:
        assert len(wait_for_news(session)) == 1  # none counts
        teach(session, "b")
        assert session.learning is not None
        learning = session.learning
        wait_until(lambda: "1 of 2 new verdicts" in learning.describe())
        with path.open("a") as file:
            file.write("{\n")
        append_feedback(path, prompt, "7", "bad", model="old.pt")
        assert wait_for_news(session, 2) == [
            f"1 damaged line in {path} cannot be used",
            "left out: 1 verdict on responses of a b.pt, old.pt, not of chat.pt",
        ]
        notes(capsys)
        run(session, "/learning")
        assert notes(capsys) == [
            "learning: 1 of 2 new verdicts for the next version; 1 verdict in all; the original model answers",
            "  left out: 7 verdicts on responses of a b.pt, old.pt, 1 damaged line",
        ]
        path.write_text("".join(line for line in path.read_text().splitlines(True) if line != "{\n"))
        teach(session, "c")
        first, second = wait_for_news(session, 2)
        assert first.startswith("version 1 has learned from 2 verdicts (2 bad): agrees with 2 of 2")
        assert second == f"  left out: 6 on responses of other models, 1 longer than max_length 64; {note}"


def test_learning_shows_why_the_last_round_failed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chatting(model, "--crash") as session:
        teach(session, "a", "b")
        wait_for_news(session)
        notes(capsys)
        run(session, "/learning", "/learning off")
        failure = f"  no new version: {session.feedback}: none of 2 verdicts can be used"
        assert notes(capsys) == [
            "learning: 2 of 2 new verdicts for the next version; 2 verdicts in all; the original model answers",
            failure,
            "learning: off; 2 verdicts in all; the original model answers",
            failure,
        ]


def test_quitting_ends_a_round_and_the_next_chat_goes_on(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = model.with_name("go")
    with chatting(model, "--wait", str(gate), "--copy", str(model.with_name("new.pt"))) as session:
        teach(session, "a", "b")
        assert session.learning is not None
        learning = session.learning
        wait_until(lambda: "is being trained" in learning.describe())
        run(session, "/learning")
    ended = notes(capsys)
    assert ended[-1] == "the round of learning has ended; the next chat with --learn begins it again"
    assert ended[-2].startswith("learning: a version is being trained, for 0 s; 2 verdicts in all; the original model")
    gate.touch()
    with chatting(model, "--copy", str(model.with_name("new.pt"))) as session:
        learned(session, 1)
    notes(capsys)
    with chatting(model) as session:
        assert notes(capsys)[1] == "version 1 of chat.pt answers, as at the end of the last chat"
        assert session.learning is not None
        learning = session.learning
        wait_until(lambda: "2 verdicts in all" in learning.describe())
        run(session, "c")
        assert said(session) == "new!new!"
        run(session, "/learning off", "/learning maybe")
        assert notes(capsys) == [
            "learning: off; 2 verdicts in all; version 1 answers",
            "invalid value 'maybe' for learning: expected on or off",
        ]


def test_through_a_pipe(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def chat(text: str, *words: str) -> int:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        feedback = str(model.with_name("feedback.jsonl"))
        return main(["chat", str(model), "--device", "cpu", "--feedback", feedback, "--max_new_tokens", "8", *words])

    assert chat("/versions\n/rollback\n/learning on\nHi") == 2
    out, err = capsys.readouterr()
    assert out == "old old \n"
    assert err.splitlines()[1:] == [
        "* 0              original",
        *["this chat does not learn: start it with rlchat chat --learn"] * 2,
    ]
    assert chat("Hi\n/learning\n", "--learn") == 0
    out, err = capsys.readouterr()
    assert out == "old old \n"
    assert err.splitlines()[1:] == [
        "learning: 0 of 8 new verdicts for the next version; 0 verdicts in all; the original model answers"
    ]
    assert chat("", "Hi", "--learn") == 2
    assert "--learn needs a chat: it cannot be combined with a question or --prompts" in capsys.readouterr().err
    (model.with_name("half.pt")).write_bytes(b"half")
    assert main(["chat", str(model.with_name("half.pt")), "--learn"]) == 2
    assert "half.pt: damaged" in capsys.readouterr().err
    assert not model.with_name("half.versions").exists()
    model.with_name("1.pt").write_bytes(model.read_bytes())
    assert main(["chat", str(model.with_name("1.pt")), "--learn"]) == 2
    assert "1.pt has the name of a version: copy it to a file with another name" in capsys.readouterr().err
    assert chat("", "--every", "3") == 2
    assert "--every has an effect only with --learn" in capsys.readouterr().err
    assert chat("", "--learn", "--learn-args", "'") == 2
    assert "--learn-args: no closing quotation; quote it as for a shell" in capsys.readouterr().err


def test_news_of_files_that_have_changed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A version is damaged before the start, and the folder is deleted while chatting."""
    with chatting(model, "--copy", str(model.with_name("new.pt"))) as session:
        teach(session, "a", "b")
        learned(session, 1)
        session.news()
        run(session, "/rollback 1")
    assert notes(capsys)[-1] == "version 1 (1.pt) answers already; nothing has changed"
    folder = model.with_name("chat.versions")
    (folder / "1.pt").write_bytes(b"half")
    with chatting(model) as session:
        assert notes(capsys)[1:] == [f"version 1 in {folder} cannot be loaded, so the original model answers"]
        assert session.news() == []
        shutil.rmtree(folder)
        assert wait_for_news(session) == [
            f"{folder} was deleted, with the versions in it; the original model still answers"
        ]
        assert session.news() == []
        run(session, "/learning off", "/rollback 0")
    assert notes(capsys)[-1] == "the original model (chat.pt) answers already; nothing has changed"


def test_the_table_without_learning(model: Path) -> None:
    with chatting(model) as session:
        teach(session, "a", "b")
        learned(session, 1)
    assert [line[:3] for line in table_of(model)] == ["  v", "* 0", "  1"]
    assert [line[:3] for line in table_of(model.with_name("chat.versions") / "1.pt")] == ["  v", "  0", "* 1"]


def test_the_table_of_versions() -> None:
    figures = {"agrees": 11, "verdicts": 20, "correct": 237, "controls": 256}
    after = {"agrees": 17, "verdicts": 20, "correct": 240, "controls": 256}
    first = Outcome(1, (), (), "2026-11-26T12:00:00+00:00", 24, figures, after)
    rejected = Outcome(None, ("it forgets",), (), "soon", 30, figures, {})
    second = Outcome(2, (), (), "later", 32, {}, {})
    lines = version_table([first, rejected, second], 2, lambda one: "its file was deleted" if one is first else "")
    assert [line.startswith("*") for line in lines] == [False, False, False, False, True]
    assert re.fullmatch(
        r"  1        2026-11-2\d \d\d:\d\d  accepted  24        11 → 17 of 20  237 → 240 of 256  its file was "
        "deleted",
        lines[2],
    )
    assert re.fullmatch(r" +soon +rejected  30 +- +- +it forgets", lines[3])

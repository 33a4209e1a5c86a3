"""`rlchat chat` through a pipe, with one question, and with options; `test_terminal.py` runs it in a terminal."""

from __future__ import annotations

import inspect
import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_models import chain, random_policy, scripted_policy
from helpers.full_disk import largest_file

from rlchat.__main__ import main
from rlchat.chat import repl
from rlchat.chat.interface import ChatInterface
from rlchat.chat.options import DEFAULT_MODEL, parser
from rlchat.conversation import Conversation, Message
from rlchat.data.formats import read_trees
from rlchat.errors import UserError
from rlchat.models.model_file import save_bundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

REPLY = "Helo wrd"


@pytest.fixture(scope="module")
def polite(byte_tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that always says REPLY."""
    path = tmp_path_factory.mktemp("models") / "polite.pt"
    save_bundle(path, scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(REPLY.encode()))))
    return str(path)


def pipe(monkeypatch: pytest.MonkeyPatch, text: str, *args: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return main(["chat", *args])


# -- best of n --


@pytest.fixture(scope="module")
def rated(tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with random weights, whose reward is higher for longer responses."""
    policy = random_policy(tokenizer)
    policy.about["reward"] = [{"class_path": "rlchat.rewards.TooShort", "init_args": {"min_words": 40}}]
    path = tmp_path_factory.mktemp("models") / "rated.pt"
    save_bundle(path, policy)
    return str(path)


def test_best_of_responds_with_the_highest_reward(rated: str) -> None:
    chat = ChatInterface(rated, device="cpu", seed=3)
    chat.best_of = 6
    text = chat.generate_response("Hi", max_new_tokens=20, temperature=1.0)
    assert chat.history[-1].text == text
    single = ChatInterface(rated, device="cpu", seed=3)  # the same random numbers, but all six responses
    six = single.batch_replies(["Hi"] * 6, max_new_tokens=20, temperature=1.0)
    rewards = [sum(row.values()) for row in single.reward.breakdown([Conversation((Message("user", "Hi"),))] * 6, six)]
    assert max(rewards) > min(rewards)
    assert text == six[rewards.index(max(rewards))].text


def test_best_of_in_batch_mode_and_as_a_setting(
    rated: str, polite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("Hi\nWhy?\n")
    rewards = {}
    for n in (1, 8):
        out = tmp_path / f"{n}.json"
        words = ["--temperature", "1", "--seed", "0", "--max_new_tokens", "20", "--device", "cpu", "--best_of", str(n)]
        assert pipe(monkeypatch, "", rated, "--prompts", str(tmp_path / "prompts.txt"), "--out", str(out), *words) == 0
        rows = json.loads(out.read_text())
        rewards[n] = [row["reward"] for row in rows]
        assert [row["sampling"].get("best_of") for row in rows] == [n if n > 1 else None] * 2
    assert sum(rewards[8]) > sum(rewards[1])
    capsys.readouterr()
    assert pipe(monkeypatch, "/set best_of 3\nHi\n/set best_of 0\n", rated, "--max_new_tokens", "5") == 2
    assert "best_of 3" in (errors := capsys.readouterr().err)
    assert "invalid value 0 for best_of: expected a positive integer" in errors
    assert pipe(monkeypatch, "/set best_of 2\nHi", polite) == 2  # no reward: the setting stays
    assert capsys.readouterr().out == f"{REPLY}\n"
    assert pipe(monkeypatch, "Hi", rated, "--best_of", "2", "--temperature", "0") == 2
    assert "best_of needs different responses to a message: set temperature above 0" in capsys.readouterr().err
    assert pipe(monkeypatch, "Hi", polite, "--best_of", "2") == 2
    assert "the model file contains no reward" in capsys.readouterr().err


# -- through a pipe --


def test_a_pipe_gets_only_responses(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipe(monkeypatch, "Hi\n\n  \nHi again", polite) == 0
    out, err = capsys.readouterr()
    assert out == f"{REPLY}\n{REPLY}\n"
    assert err == ""


@pytest.mark.parametrize("word", ["/quit", "/exit", "/bye", " /EXIT "])
def test_commands_that_end_the_chat(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    assert pipe(monkeypatch, f"Hi\n{word}\nHi again\n", polite) == 0
    assert capsys.readouterr().out == f"{REPLY}\n"


@pytest.mark.parametrize(
    "text", ["quit", "bye", "save money", "good", "set seed 1", "help me", "/etc/passwd", "1/2", "/", "/2"]
)
def test_other_lines_are_messages(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    asked = listen(monkeypatch)
    assert pipe(monkeypatch, text + "\n", polite) == 0
    assert capsys.readouterr() == (f"{REPLY}\n", "")
    assert [question for question, _ in asked] == [text]


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("/claer", "clear"), ("/quti", "quit"), ("/HELPP", "help"), ("/clear now", "clear"), ("/x", "")],
)
def test_an_unknown_command_names_the_nearest(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, nearest: str
) -> None:
    assert pipe(monkeypatch, f"{typed}\n", polite) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"unknown command {typed}: did you mean /{nearest}")
    assert err.count("\n") == 1


def listen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Records the requests to the model: the text, the length of the history and the sampling options."""
    asked = []
    stream = ChatInterface.stream_response

    def heard(self: ChatInterface, text: str, **how: Any) -> Iterator[str]:
        asked.append((text, {"history": len(self.history), **how}))
        return stream(self, text, **how)

    monkeypatch.setattr(ChatInterface, "stream_response", heard)
    return asked


def test_the_history_grows_until_it_is_cleared(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = listen(monkeypatch)
    pipe(monkeypatch, "a\nb\n/clear\nc\n", polite)
    assert [how["history"] for _, how in asked] == [0, 2, 0]
    assert "conversation cleared" in capsys.readouterr().err


def test_options_reach_the_model(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = listen(monkeypatch)
    options = ["--temperature", "0", "--max_new_tokens", "3", "--seed", "5", "--top_k", "7", "--top_p", "0.5"]
    pipe(monkeypatch, "a\n", polite, *options)
    assert asked == [("a", {"history": 0, "max_new_tokens": 3, "temperature": 0.0, "top_k": 7, "top_p": 0.5})]
    assert capsys.readouterr().out == REPLY[:3] + "\n"


def test_the_defaults_are_those_of_the_interface() -> None:
    options = vars(parser().parse_intermixed_args([]))
    expected = {
        name: parameter.default
        for function in (ChatInterface.__init__, ChatInterface.stream_response)
        for name, parameter in inspect.signature(function).parameters.items()
    }
    assert expected["model_path"] == DEFAULT_MODEL
    named = ("temperature", "max_new_tokens", "seed", "top_k", "top_p", "device", "dtype")
    assert {name: options[name] for name in named} == {name: expected[name] for name in named}


def test_dropped_messages_are_reported_once(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # max_length 64, half of it for the prompt; a turn has 12 + 10 tokens.
    pipe(monkeypatch, "0123456789\n0123456789\n0123456789\n" + "x" * 50, polite)
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert "exceeds the model's context" in err[0]
    assert "first 21 tokens" in err[1]  # of 50, with 32 - 3 to stay


def test_user_errors_are_one_sentence(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert pipe(monkeypatch, "Hi\n", str(tmp_path / "nope.pt")) == 2
    assert re.fullmatch(r"rlchat: .*nope\.pt: no such model file; .*\n", capsys.readouterr().err)
    assert pipe(monkeypatch, "Hi\n", polite, "--temperature", "-1") == 2
    assert re.fullmatch(r"rlchat: invalid value -1\.0 for temperature: .*\n", capsys.readouterr().err)
    assert pipe(monkeypatch, "Hi\n", polite, "--seed", "-5") == 2
    assert re.fullmatch(
        r"rlchat: invalid value -5 for seed: expected an integer from 0 to .*\n", capsys.readouterr().err
    )
    assert pipe(monkeypatch, "Hi\n", polite, "--temperature", "warm") == 2
    assert "invalid float value: 'warm'" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")  # one sentence, and no warning of torch's beside it
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"PK\x03\x04 and no more", "damaged, or not an rlchat model file; create it again"),
        (b"", "damaged, or not an rlchat model file; create it again"),
        (
            pickle.dumps(print),
            "contains something other than tensors and plain values, or is damaged; it was not loaded",
        ),
    ],
)
def test_an_invalid_model_file(
    content: bytes, why: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.pt").write_bytes(content)
    assert pipe(monkeypatch, "Hi\n", "mine.pt") == 2
    assert capsys.readouterr() == ("", f"rlchat: mine.pt: {why}\n")


def test_help_does_not_import_torch() -> None:
    program = "import sys; from rlchat.__main__ import main; print(main(['chat', '--help']), 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.endswith("0 False\n")
    for option in ("MODEL", "--temperature T", "--max_new_tokens N", "--seed S", "--top_k K", "--top_p P"):
        assert option in run.stdout


def stop_after(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupts the next response after a number of pieces; later responses are complete."""
    stream = ChatInterface.stream_response

    def interrupted(self: ChatInterface, text: str, **how: Any) -> Iterator[str]:
        monkeypatch.setattr(ChatInterface, "stream_response", stream)
        reply = stream(self, text, **how)

        def until_ctrl_c() -> Iterator[str]:
            yield from islice(reply, pieces)
            reply.close()
            raise KeyboardInterrupt

        return until_ctrl_c()

    monkeypatch.setattr(ChatInterface, "stream_response", interrupted)


@pytest.mark.parametrize("question", [["Hello"], []])
def test_ctrl_c_without_a_terminal_ends_the_program(
    polite: str, question: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(2, monkeypatch)
    assert pipe(monkeypatch, "Hello\nAgain\n", polite, *question) == 130
    assert capsys.readouterr() == (f"{REPLY[:2]}\n", "")


class Typed:
    """A terminal with these messages as input, and no answers to questions."""

    def __init__(self, *messages: str) -> None:
        self._messages = messages

    def messages(self) -> Iterator[str]:
        return iter(self._messages)

    def ask(self, question: str, default: str = "") -> str:
        return ""


def typed(chat: ChatInterface, *messages: str) -> None:
    """A chat in a terminal."""
    repl.Session(chat, {}, terminal=Typed(*messages)).run()  # type: ignore[arg-type]


def test_ctrl_c_at_a_terminal_keeps_the_partial_response(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(2, monkeypatch)
    typed(ChatInterface(polite), "Hello", "Again", "history")
    said = [f"you> Hello\nmodel> {REPLY[:2]}", f"you> Again\nmodel> {REPLY}"]
    assert capsys.readouterr().out.endswith("\n".join([f"model> {REPLY[:2]} (stopped)", f"model> {REPLY}", *said, ""]))


def test_an_interrupted_retry_keeps_the_old_response(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = ChatInterface(polite)
    chat.generate_response("Hi")
    stop_after(0, monkeypatch)
    typed(chat, "retry", "history")
    assert capsys.readouterr().out.endswith(f"model>  (stopped)\nyou> Hi\nmodel> {REPLY}\n")


def test_invalid_bytes_in_the_input_do_not_end_the_chat(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    asked = listen(monkeypatch)
    assert main(["chat", polite]) == 0
    assert asked[0][0] == "caf\ufffd"


def test_control_characters_of_a_response_are_not_printed() -> None:
    assert repl.without_controls("a\x1b[2Jb\rc\n\td\x9b\x07é🙂") == "a[2Jbc\n\tdé🙂"


def test_a_closed_output_pipe_ends_the_chat(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody_listens:
        monkeypatch.setattr("sys.stdout", nobody_listens)
        assert pipe(monkeypatch, "Hi\nHi again\n", polite) == 0
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("question", [[], pytest.param(["Hello"], marks=pytest.mark.slow)])
def test_an_output_that_cannot_be_written(question: list[str], polite: str) -> None:
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "rlchat", "chat", polite, *question],
            input=b"Hi\nHi again\n",
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert run.returncode == 2
    assert run.stderr == b"rlchat: cannot write to standard output: No space left on device\n"


# -- one question --


@pytest.mark.parametrize("kind", ["pipe", "file", "/dev/null"])
def test_a_question_about_a_piped_document(
    polite: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = listen(monkeypatch)
    (tmp_path / "document").write_text("good\n/quit\n")
    descriptor = os.open(tmp_path / "document" if kind == "file" else os.devnull, os.O_RDONLY)
    if kind == "pipe":
        reading, writing = os.pipe()
        os.write(writing, b"good\n/quit\n")
        os.close(writing)
        os.dup2(reading, descriptor)
        os.close(reading)
    with os.fdopen(descriptor) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["chat", polite, "What is it?"]) == 0
    expected = "What is it?" if kind == "/dev/null" else "good\n/quit\n\nWhat is it?"
    assert [text for text, _ in asked] == [expected]
    assert capsys.readouterr() == (f"{REPLY}\n", "")


def test_one_question_is_answered(polite: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", polite, "--temperature", "0", "clear"]) == 0  # what asks once has no commands
    assert capsys.readouterr() == (f"{REPLY}\n", "")
    with pytest.raises(UserError, match="the message is empty"):
        repl.main([polite, " "])
    with pytest.raises(UserError, match="the message is empty"):
        repl.main([""])


@pytest.mark.parametrize(
    ("words", "model", "question"),
    [
        ([], repl.DEFAULT_MODEL, None),
        (["mine.pt"], "mine.pt", None),
        (["is_there"], "is_there", None),
        (["Hello"], repl.DEFAULT_MODEL, "Hello"),
        (["a_folder"], repl.DEFAULT_MODEL, "a_folder"),
        ([""], repl.DEFAULT_MODEL, ""),
        (["What is in mine.pt"], repl.DEFAULT_MODEL, "What is in mine.pt"),
        (["x" * 100_000], repl.DEFAULT_MODEL, "x" * 100_000),
        (["a\0b"], repl.DEFAULT_MODEL, "a\0b"),
        (["mine.pt", "mine.pt"], "mine.pt", "mine.pt"),
    ],
)
def test_a_model_file_is_distinguished_from_a_question(
    workplace: Path, words: list[str], model: str, question: str | None
) -> None:
    Path("is_there").write_text("")
    Path("a_folder").mkdir()
    assert repl._model_and_question(words) == (model, question)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["How", "are", "you"], "put the question in quotes"),
        (["--out", "x.json"], "--out requires --prompts"),
        (["mine.pt", "Hello", "--prompts", "x.txt"], "--prompts and a question cannot be combined"),
    ],
)
def test_options_that_conflict(words: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        repl.main(words)


# -- commands through a pipe --


def test_a_conversation_through_a_pipe(
    polite: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Responses are on standard output, all else on standard error; the saved file holds the conversation."""
    talk = "/system Be brief.\nHi\nagain\n/undo\n/set temperature 0.5\n/set seed 3\n/retry\n/save talk.json\n/clear\n"
    assert (
        pipe(monkeypatch, talk + "/history\n/load talk.json\n/history\n/speed\n", polite, "--max_new_tokens", "20") == 0
    )
    out, err = capsys.readouterr()
    assert out == f"{REPLY}\n" * 3
    lines = err.splitlines()
    assert lines[:6] == [
        "system message: Be brief.",
        "removed: again",
        "temperature 0.5, max_new_tokens 20, top_p 1.0, top_k 0, seed none, best_of 1",
        "temperature 0.5, max_new_tokens 20, top_p 1.0, top_k 0, seed 3, best_of 1",
        "saved 2 messages to talk.json",
        "conversation cleared",
    ]
    assert lines[6:13] == [
        "system> Be brief.",
        "the conversation is empty",
        "loaded 2 messages from talk.json (model: polite.pt)",
        "system message: Be brief.",
        "settings: temperature 0.5, max_new_tokens 20, top_p 1.0, top_k 0, seed 3, best_of 1",
        "system> Be brief.",
        "you> Hi",
    ]
    assert lines[13] == f"model> {REPLY}"
    assert re.fullmatch(r"9 tokens in \d+\.\d\d s: \d+ tokens per second", lines[14])
    saved = json.loads(Path("talk.json").read_text())
    assert saved["sampling"] == {"max_new_tokens": 20, "temperature": 0.5, "top_k": 0, "top_p": 1.0, "seed": 3}
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant"]


def test_a_setting_may_be_written_with_an_equals_sign(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipe(monkeypatch, "/set temperature=0\n/set top_k = 5\n", polite) == 0
    assert capsys.readouterr().err.splitlines() == [
        "temperature 0.0, max_new_tokens 100, top_p 1.0, top_k 0, seed none, best_of 1",
        "temperature 0.0, max_new_tokens 100, top_p 1.0, top_k 5, seed none, best_of 1",
    ]


def test_a_loaded_conversation_is_sampled_as_it_was(
    polite: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampling = {"max_new_tokens": 3, "temperature": -1, "top_k": 5, "top_p": 0.5, "seed": 2**64}
    file = {"format": "rlchat-conversation", "version": 1, "messages": [], "sampling": sampling}
    Path("talk.json").write_text(json.dumps(file))
    asked = listen(monkeypatch)
    assert pipe(monkeypatch, "/load talk.json\nHi\n", polite, "--temperature", "0.9", "--seed", "4") == 0
    assert asked == [("Hi", {"history": 0, "max_new_tokens": 3, "temperature": 0.9, "top_k": 5, "top_p": 0.5})]
    assert capsys.readouterr().err.splitlines() == [
        "loaded 0 messages from talk.json",
        "temperature stays 0.9: invalid value -1 for temperature: expected 0 (greedy) or a number from 1e-6 to 1e6",
        f"seed stays 4: invalid value {2**64} for seed: expected an integer from 0 to 2**63 - 1",
        "settings: temperature 0.9, max_new_tokens 3, top_p 0.5, top_k 5, seed 4, best_of 1",
    ]


def test_a_file_is_not_overwritten_through_a_pipe(
    polite: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("talk.json").write_text("mine")
    assert pipe(monkeypatch, "Hi\n/save talk.json\n", polite) == 2
    assert capsys.readouterr().err == "talk.json exists: choose another name, or use --force\n"
    assert Path("talk.json").read_text() == "mine"
    assert pipe(monkeypatch, "Hi\n/save talk.json\n", polite, "--force") == 0
    assert "saved 2 messages" in capsys.readouterr().err
    assert json.loads(Path("talk.json").read_text())["model"] == "polite.pt"


def test_feedback_through_a_pipe(
    polite: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = "Hi\n/good\n/good\nAgain\n/bad\n/edit Hello there!\n/history\n"
    assert pipe(monkeypatch, talk, polite, "--feedback", "mine.jsonl") == 0
    err = capsys.readouterr().err
    assert err.startswith("saved in mine.jsonl: good response\nalready saved in mine.jsonl: good response\n")
    assert "saved in mine.jsonl: bad response\nsaved in mine.jsonl: corrected response\n" in err
    assert err.endswith(
        f"you> Hi\nmodel> {REPLY}\nyou> Again\nmodel> Hello there!\n"
    )  # the correction is part of the conversation
    trees, _ = read_trees(["mine.jsonl"], progress=False)
    judged = {
        (prompt.messages[-1].text, tuple((r.text, r.quality, r.rank) for r in prompt.references))
        for tree in trees
        for prompt in tree.prompts
    }
    assert ("Hi", ((REPLY, 1.0, None), (REPLY, None, None))) in judged
    assert [row for row in judged if row[0] == "Again"] == [("Again", (("Hello there!", None, 0), (REPLY, None, 1)))]


def test_a_correction_is_neither_good_nor_bad(
    polite: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipe(monkeypatch, "Hi\n/edit Hello!\n/good\n/bad\n", polite) == 2
    refusal = "the last response is your correction: edit it again, or generate another with retry"
    assert capsys.readouterr().err.splitlines() == ["saved in feedback.jsonl: corrected response", refusal, refusal]
    assert len(Path("feedback.jsonl").read_text().splitlines()) == 1


def test_a_cancelled_edit_saves_nothing(polite: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed(ChatInterface(polite), "Hi", "edit")
    assert capsys.readouterr().out.endswith("not saved\n")
    assert list(workplace.iterdir()) == []


def test_a_failed_command_does_not_end_the_chat(
    polite: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("damaged.json").write_text('{"format": "rlchat-conversation", "version": 1')
    Path("folder").mkdir()
    mistakes = {
        "/good": "there is no response yet: send a message first",
        "/reward": "there is no response yet: send a message first",
        "/retry": "there is no message yet: send one first",
        "/speed": "there is no response yet: send a message first",
        "/save": "this command needs a file name, for example: /save chat.json",
        "/load nope.json": "nope.json: file not found",
        "/load damaged.json": "damaged.json is not a conversation file: it is not valid JSON",
        "/load folder": "folder is a directory, a pipe or a device: expected a file",
        "/save folder": "folder is a directory: specify a file name",
        "/save damaged.json/x": "damaged.json/x: cannot be written: File exists; specify a path that can be written",
        "/set temperature -1": "invalid value -1.0 for temperature: expected 0 (greedy) or a number from 1e-6 to 1e6",
        "/set max_new_tokens 0.5": "invalid value '0.5' for max_new_tokens: expected an integer, as in: set max_new",
        "/set seed -3": "invalid value -3 for seed: expected an integer from 0 to 2**63 - 1",
        "/set seed -1e9": "invalid value '-1e9' for seed: expected an integer, as in: set seed 1",
        "/set temperature hot": "invalid value 'hot' for temperature: expected a number, as in: set temperature 1",
        "/set top_p=": "invalid value '' for top_p: expected a number, as in: set top_p 1",
        "/load b": "b: file not found",
        "/set warmth 1": "unknown setting 'warmth': expected one of temperature, max_new_tokens, top_p, top_k, seed",
        "/set temperature": "invalid value '' for temperature: expected a number, as in: set temperature 1",
    }
    assert pipe(monkeypatch, "".join(f"{line}\n" for line in mistakes) + "Hi\n/reward\n/edit\n/undo\n", polite) == 2
    out, err = capsys.readouterr()
    assert out == f"{REPLY}\n"
    *said, no_reward, no_text, undone = err.splitlines()
    assert len(said) == len(mistakes)
    for sentence, expected in zip(said, mistakes.values(), strict=True):
        assert sentence.startswith(expected)
    assert no_reward.endswith("polite.pt: the model file contains no reward; only models trained with PPO have one")
    assert no_text.startswith("this command needs a response, for example: ")
    assert undone == "removed: Hi"


def test_a_full_disk_leaves_the_conversation(
    polite: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines() -> Iterator[str]:
        yield "Hi\n"
        with largest_file(10):
            yield "/save talk.json\n"
            yield "/good\n"
        yield "/history\n"

    monkeypatch.setattr("sys.stdin", Lines(lines()))
    assert main(["chat", polite]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "talk.json: cannot be written: File too large; the existing file is unchanged",
        "cannot write feedback to feedback.jsonl: File too large; choose another file with --feedback",
        "you> Hi",
        f"model> {REPLY}",
    ]
    assert not Path("talk.json").exists()


class Lines:
    """Standard input that comes line by line, with something happening in between."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines

    def __iter__(self) -> Iterator[str]:
        return self._lines

    def isatty(self) -> bool:
        return False


def test_the_reward_and_its_factors(
    byte_tokenizer: ChatTokenizer, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(REPLY.encode())))
    short, end = ({"class_path": f"rlchat.rewards.{name}"} for name in ("TooShort", "MissingEnd"))
    bundle.about["reward"] = [{**short, "init_args": {"min_words": 4}}, end, {"class_path": "mine.Polite"}]
    save_bundle("rl.pt", bundle)
    pipe(monkeypatch, "Hi\n/reward\n/set max_new_tokens 4\n/retry\n/reward\n", "rl.pt")
    lines = capsys.readouterr().err.splitlines()
    left_out = (
        "  not included: mine.Polite (cannot import mine: it is not on the import path; add its folder to PYTHONPATH)"
    )
    critic = "  no trained critic"
    # Two words of four, and an end; then one of four, and none.
    assert lines[:5] == ["  reward       -0.500", "  too_short    -0.500", "  missing_end  +0.000", left_out, critic]
    assert lines[6:] == ["  reward       -1.750", "  too_short    -0.750", "  missing_end  -1.000", left_out, critic]


def test_a_factor_that_fails_does_not_end_the_chat(
    byte_tokenizer: ChatTokenizer, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "fails_in_chat.py").write_text(
        "from rlchat.rewards import MissingEnd, ReplyFactor\n\n"
        "def count(prompt, reply):\n    return {}[reply.text]\n\n"
        "class Refuses(MissingEnd):\n    def unavailable(self, prompt):\n        raise RuntimeError('not now')\n"
    )
    monkeypatch.syspath_prepend(str(workplace))
    bundle = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(REPLY.encode())))
    function = {"class_path": "rlchat.rewards.FunctionReward", "init_args": {"function": "fails_in_chat.count"}}
    bundle.about["reward"] = [
        {"class_path": "rlchat.rewards.MissingEnd"},
        function,
        {"class_path": "fails_in_chat.Refuses"},
    ]
    save_bundle("rl.pt", bundle)
    pipe(monkeypatch, "Hi\n/reward\nHi\n", "rl.pt")
    out, err = capsys.readouterr()
    assert out == f"{REPLY}\n" * 2  # the chat goes on
    lines = [line for line in err.splitlines() if line.startswith("  ")]
    assert lines[:2] == ["  reward       +0.000", "  missing_end  +0.000"]
    assert [line.partition(" (")[0] for line in lines[2:4]] == ["  not included: count", "  not included: refuses"]
    assert f"(fails_in_chat.count) failed: KeyError: '{REPLY}'; see line 4 of fails_in_chat.py" in lines[2]
    assert "(fails_in_chat.Refuses) failed: RuntimeError: not now; see line 8 of fails_in_chat.py" in lines[3]


def test_the_test_command(polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipe(monkeypatch, "Hi <|end|>\n/test\n", polite)
    *checks, total = capsys.readouterr().err.splitlines()
    assert len(checks) == 8  # 6 samples, and what was said
    assert all(line.startswith("  ok ") for line in checks)
    assert checks[6:] == ["  ok        10 tokens  'Hi <|end|>'", f"  ok         8 tokens  '{REPLY}'"]
    assert total == "8 of 8 texts intact with the encoding bytes"

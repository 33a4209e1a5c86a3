"""`rlchat chat`: through a pipe, and in a real terminal."""

from __future__ import annotations

import inspect
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_models import chain, scripted_policy

from rlchat import repl
from rlchat.__main__ import main
from rlchat.chat import ChatInterface
from rlchat.checkpoint import save_bundle
from rlchat.tokenizer import ChatTokenizer

REPLY = "Helo wrd"
PATIENCE = 60  # seconds; a busy machine takes long to import torch


@pytest.fixture(scope="module")
def polite(byte_tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that always says REPLY."""
    path = tmp_path_factory.mktemp("models") / "polite.pt"
    save_bundle(path, scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(REPLY.encode()))))
    return str(path)


@pytest.fixture(scope="module")
def talkative(byte_tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that says ``abc abc abc `` and never ends."""
    path = tmp_path_factory.mktemp("models") / "talkative.pt"
    save_bundle(path, scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(b"abc "), endless=True), 1_000_000))
    return str(path)


def pipe(monkeypatch: pytest.MonkeyPatch, text: str, *args: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return main(["chat", *args])


# -- through a pipe --


def test_a_pipe_gets_replies_and_nothing_else(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipe(monkeypatch, "Hi\n\n  \nHi again", polite) == 0
    out, err = capsys.readouterr()
    assert out == f"{REPLY}\n{REPLY}\n"
    assert err == ""


@pytest.mark.parametrize("word", ["quit", "exit", "bye", "/quit", "/bye", " EXIT "])
def test_words_that_leave(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    assert pipe(monkeypatch, f"Hi\n{word}\nHi again\n", polite) == 0
    assert capsys.readouterr().out == f"{REPLY}\n"


@pytest.mark.parametrize("text", ["quit smoking", "help me", "please clear", "/etc/passwd", "1/2", "/", "/2"])
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
    assert pipe(monkeypatch, f"{typed}\n", polite) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"no command {typed}; did you mean {nearest}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("word", ["help", "/help", "HELP"])
def test_help_tells_of_every_command(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    assert pipe(monkeypatch, f"{word}\n", polite) == 0
    err = capsys.readouterr().err
    for command in repl.COMMANDS:
        assert re.search(rf"^  {', '.join(command.names)} +{re.escape(command.what)}$", err, re.MULTILINE)
    assert {name for command in repl.COMMANDS for name in command.names} == {"quit", "exit", "bye", "clear", "help"}


def listen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the model is asked from now on: the text, the length of the history, and how to sample."""
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
    assert "forgotten" in capsys.readouterr().err


def test_options_reach_the_model(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = listen(monkeypatch)
    options = ["--temperature", "0", "--max_new_tokens", "3", "--seed", "5", "--top_k", "7", "--top_p", "0.5"]
    pipe(monkeypatch, "a\n", polite, *options)
    assert asked == [("a", {"history": 0, "max_new_tokens": 3, "temperature": 0.0, "top_k": 7, "top_p": 0.5})]
    assert capsys.readouterr().out == REPLY[:3] + "\n"


def test_the_defaults_are_those_of_the_interface() -> None:
    options = vars(repl._parser().parse_args([]))
    expected = {
        name: parameter.default
        for function in (ChatInterface.__init__, ChatInterface.stream_response)
        for name, parameter in inspect.signature(function).parameters.items()
    }
    assert options.pop("model") == expected["model_path"]
    assert options == {name: expected[name] for name in ("temperature", "max_new_tokens", "seed", "top_k", "top_p")}


def test_what_the_model_no_longer_sees_is_said_once(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # max_length 64, half of it for the prompt; a turn has 12 + 10 tokens.
    pipe(monkeypatch, "0123456789\n0123456789\n0123456789\n" + "x" * 50, polite)
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert "outgrown" in err[0]
    assert "first 21 tokens" in err[1]  # of 50, with 32 - 3 to stay


def test_mistakes_end_with_one_sentence(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert pipe(monkeypatch, "Hi\n", str(tmp_path / "nope.pt")) == 2
    assert re.fullmatch(r"rlchat: .*nope\.pt: no such model; .*\n", capsys.readouterr().err)
    assert pipe(monkeypatch, "Hi\n", polite, "--temperature", "-1") == 2
    assert re.fullmatch(r"rlchat: temperature is -1\.0; .*\n", capsys.readouterr().err)
    assert pipe(monkeypatch, "Hi\n", polite, "--temperature", "warm") == 2
    assert "invalid float value: 'warm'" in capsys.readouterr().err


def test_help_is_instant() -> None:
    program = "import sys; from rlchat.__main__ import main; print(main(['chat', '--help']), 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.endswith("0 False\n")
    for option in ("MODEL", "--temperature T", "--max_new_tokens N", "--seed S", "--top_k K", "--top_p P"):
        assert option in run.stdout


def test_ctrl_c_keeps_what_was_said(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = listen(monkeypatch)
    heard = ChatInterface.stream_response

    def interrupted(self: ChatInterface, text: str, **how: Any) -> Iterator[str]:
        pieces = heard(self, text, **how)
        if text != "stop":
            return pieces
        return interrupt_after(2, pieces)

    def interrupt_after(count: int, pieces: Iterator[str]) -> Iterator[str]:
        for _ in range(count):
            yield next(pieces)
        raise KeyboardInterrupt

    monkeypatch.setattr(ChatInterface, "stream_response", interrupted)
    assert pipe(monkeypatch, "stop\ngo on\n", polite) == 0
    assert capsys.readouterr().out == f"{REPLY[:2]}\n{REPLY}\n"
    assert [how["history"] for _, how in asked] == [0, 2]


def test_stray_bytes_end_no_chat(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    asked = listen(monkeypatch)
    assert main(["chat", polite]) == 0
    assert asked[0][0] == "caf\ufffd"


def test_a_model_cannot_drive_the_terminal() -> None:
    assert repl._without_controls("a\x1b[2Jb\rc\n\td\x9b\x07é🙂") == "a[2Jbc\n\tdé🙂"


def test_a_reader_that_leaves_ends_the_chat(
    polite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody_listens:
        monkeypatch.setattr("sys.stdout", nobody_listens)
        assert pipe(monkeypatch, "Hi\nHi again\n", polite) == 0
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


# -- in a terminal --


def test_a_chat_in_a_terminal(talkative: str) -> None:
    pexpect = pytest.importorskip("pexpect", reason="pexpect plays the terminal")
    arguments = ["-m", "rlchat", "chat", talkative, "--max_new_tokens", "100000", "--temperature", "0"]
    terminal = pexpect.spawn(sys.executable, arguments, encoding="utf-8", timeout=PATIENCE, dimensions=(40, 200))

    def say(line: str) -> None:
        terminal.expect_exact("you> ")
        terminal.sendline(line)

    terminal.expect_exact("loading")
    terminal.expect(r"[\d,]+ parameters on \w+; help lists the commands")
    say("Hello")
    terminal.expect_exact("model> abc abc abc")
    terminal.sendintr()
    terminal.expect_exact("(stopped)")
    say("/claer")
    terminal.expect_exact("did you mean clear?")
    say("help")
    terminal.expect_exact("forget the conversation")
    say("clear")
    terminal.expect_exact("the conversation is forgotten")
    say("Still there?")
    terminal.expect_exact("model> abc abc abc")
    terminal.sendintr()
    terminal.expect_exact("(stopped)")
    terminal.expect_exact("you> ")
    terminal.sendintr()
    terminal.expect_exact("Ctrl-D or quit leaves")
    terminal.expect_exact("you> ")
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    assert "Traceback" not in terminal.before
    terminal.close()
    assert terminal.exitstatus == 0

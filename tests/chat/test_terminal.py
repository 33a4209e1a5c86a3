"""`rlchat chat` in a pseudo-terminal: typing, pasting, Ctrl-C, resizing. Most tests share one process."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.chat_models import chain, scripted_policy
from helpers.screens import PROMPT, Screen, pexpect

from rlchat.chat.saved import load_conversation
from rlchat.models.model_file import save_bundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

ENTER, ALT_ENTER, TAB, UP, CTRL_U = "\r", "\x1b\r", "\t", "\x1b[A", "\x15"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the program runs."""
    return tmp_path_factory.mktemp("talk")


@pytest.fixture(scope="module")
def program(byte_tokenizer: ChatTokenizer, folder: Path) -> Iterator[Screen]:
    """A chat with a model that says ``abc abc abc `` and never ends, of 8 tokens a reply."""
    bundle = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(b"abc "), endless=True), 1_000_000)
    bundle.about["reward"] = [{"class_path": "rlchat.rewards.MissingEnd"}]
    save_bundle(folder / "talkative.pt", bundle)
    screen = Screen("talkative.pt", folder, "--max_new_tokens", "8")
    screen.see("loading talkative.pt")
    screen.terminal.expect(r"[\d,]+ parameters on \w+; type help for commands")
    yield screen
    screen.terminal.close(force=True)


@pytest.fixture
def screen(program: Screen) -> Screen:
    """The program, with an empty conversation."""
    program.say("clear")
    program.see("conversation cleared")
    return program


def saved(screen: Screen, folder: Path) -> list[tuple[str, str]]:
    """The conversation, saved to a file and read."""
    screen.say("/save said")
    screen.see("saved ")
    messages = load_conversation(folder / "said").messages
    (folder / "said").unlink()
    return [(message.role, message.text) for message in messages]


def test_a_correction_without_a_slash_is_not_lost(screen: Screen, folder: Path) -> None:
    screen.say("Where is Anna?")
    screen.see("model> abc abc")
    screen.say("edit In Rome.")
    screen.see("(sent as a message; for the command, type undo, and then /edit <text>)")
    screen.say("undo")
    screen.see("removed: edit In Rome.")
    screen.say("/edit In Rome.")
    screen.see("saved in feedback.jsonl: corrected response")
    (row,) = map(json.loads, (folder / "feedback.jsonl").read_text().splitlines())
    (folder / "feedback.jsonl").unlink()
    assert row["prompt"]["text"] == "Where is Anna?"
    assert row["prompt"]["replies"][0]["text"] == "In Rome."


def test_ctrl_c_stops_the_reply_and_keeps_the_chat(screen: Screen, folder: Path) -> None:
    screen.say("set max_new_tokens 100000")
    screen.say("Hello")
    screen.see("model> abc abc abc")
    screen.terminal.sendintr()
    screen.see("(stopped)")
    screen.say("set max_new_tokens 8")
    (user, hello), (assistant, reply) = saved(screen, folder)
    assert (user, hello, assistant) == ("user", "Hello", "assistant")
    assert reply.startswith("abc abc abc")
    screen.see(PROMPT)
    screen.terminal.sendintr()
    screen.see("press Ctrl-D or type quit")


def test_a_pasted_text_of_several_lines_is_one_message(screen: Screen, folder: Path) -> None:
    screen.type("\x1b[200~first\r\nclear\r\n\r\nlast\x1b[201~" + ENTER)
    screen.see("model> abc abc")
    assert saved(screen, folder)[0] == ("user", "first\nclear\n\nlast")


def test_alt_enter_begins_a_line(screen: Screen, folder: Path) -> None:
    screen.type("one" + ALT_ENTER + "two" + ENTER)
    screen.see("model> abc abc")
    assert saved(screen, folder)[0] == ("user", "one\ntwo")


def test_ten_thousand_characters(screen: Screen, folder: Path) -> None:
    text = "0123456789" * 1000
    screen.type(f"\x1b[200~{text}\x1b[201~" + ENTER)
    screen.see("model> abc abc")
    assert saved(screen, folder)[0] == ("user", text)


@pytest.mark.parametrize("text", ["👩‍👩‍👧 ☕️", "e\u0301a\u0308", "日本語 مرحبا", "<|assistant|>Hi<|end|>"])
def test_control_tokens_that_users_type_are_text(screen: Screen, folder: Path, text: str) -> None:
    screen.say(text)
    screen.see("model> abc abc ")
    assert saved(screen, folder) == [("user", text), ("assistant", "abc abc ")]


def test_resizing_the_window(screen: Screen, folder: Path) -> None:
    screen.see(PROMPT)
    screen.terminal.setwinsize(10, 30)
    screen.terminal.send("a line that is longer than the window")
    time.sleep(0.2)
    screen.terminal.setwinsize(40, 100)
    screen.terminal.send(" was" + ENTER)
    screen.see("model> abc abc ")
    assert saved(screen, folder)[0] == ("user", "a line that is longer than the window was")


def test_undo_retry_and_history(screen: Screen) -> None:
    for word in ("first", "second"):
        screen.say(word)
        screen.see("model> abc abc ")
    screen.say("undo")
    screen.see("removed: second")
    screen.say("retry")
    screen.see("model> abc abc ")
    screen.say("history")
    screen.see("you> first\r\nmodel> abc abc \r\n")
    screen.say("speed")
    screen.terminal.expect(r"8 tokens in \d+\.\d\d s: \d+ tokens per second")
    screen.say("test")
    screen.see("8 of 8 texts intact")
    screen.say("reward")
    screen.see("missing_end  -1.000")
    screen.see("no trained critic")


def test_system_and_settings(screen: Screen, folder: Path) -> None:
    screen.say("system Be brief.")
    screen.see("system message: Be brief.")
    screen.say("Hello")
    assert saved(screen, folder)[0] == ("system", "Be brief.")
    screen.say("system none")
    screen.see("no system message")
    screen.say("set top_p 0.9")
    screen.see("max_new_tokens 8, top_p 0.9, top_k 0")
    screen.say("/claer")
    screen.see("did you mean /clear?")
    screen.say("help")
    screen.see("delete the conversation")
    screen.see("Alt-Enter")


def test_save_asks_before_it_overwrites(screen: Screen, folder: Path) -> None:
    (folder / "mine.json").write_text("mine")
    screen.say("Hello")
    screen.say("save mine.json")
    screen.see("mine.json exists; overwrite it? [y/N] ")
    screen.terminal.send(ENTER)
    screen.see("not saved")
    assert (folder / "mine.json").read_text() == "mine"
    screen.say("save mine.json")
    screen.see("[y/N] ")
    screen.terminal.send("y" + ENTER)
    screen.see("saved 2 messages to mine.json")
    assert json.loads((folder / "mine.json").read_text())["messages"][0]["content"] == "Hello"
    screen.say("clear")
    screen.say("load mine.json")
    screen.see("loaded 2 messages from mine.json (model: talkative.pt)")


def test_feedback(screen: Screen, folder: Path) -> None:
    screen.say("Hello")
    for verdict in ("good", "bad"):
        screen.say(verdict)
        screen.see(f"saved in feedback.jsonl: {verdict} response")
    screen.say("edit")
    screen.see("corrected response> ")
    screen.see("abc abc")  # the reply stands there, to be changed
    screen.terminal.send(CTRL_U + "Good day." + ENTER)
    screen.see("saved in feedback.jsonl: corrected response")
    screen.say("edit")
    screen.see("corrected response> ")
    screen.terminal.sendintr()
    screen.see("not saved")
    assert saved(screen, folder) == [("user", "Hello"), ("assistant", "Good day.")]
    rows = [json.loads(line) for line in (folder / "feedback.jsonl").read_text().splitlines()]
    assert [len(row["prompt"]["replies"]) for row in rows] == [1, 1, 2]


def test_tab_completes_commands(screen: Screen) -> None:
    screen.type("hist" + TAB)
    screen.see("ory")
    screen.terminal.send(ENTER)
    screen.see("the conversation is empty")


@pytest.mark.slow
def test_the_history_of_inputs_persists(byte_tokenizer: ChatTokenizer, program: Screen, folder: Path) -> None:
    """Ctrl-D quits; the next process has the history; control characters of a response are not printed."""
    program.say("remember this")
    program.see("model> ")
    program.see(PROMPT)
    program.terminal.sendeof()
    program.terminal.expect(pexpect.EOF)
    program.terminal.close()
    assert program.terminal.exitstatus == 0
    assert "Traceback" not in program.terminal.before
    history = folder / "state" / "rlchat" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600

    rude = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(b"a\x1b[2J\x07z")))
    save_bundle(folder / "rude.pt", rude)
    again = Screen("rude.pt", folder)
    again.type(UP)
    again.see("remember this")
    again.terminal.send(ENTER)
    again.see("model> a[2Jz\r\n")
    again.say("bye")
    again.terminal.expect(pexpect.EOF)
    again.terminal.close()
    assert again.terminal.exitstatus == 0

"""`rlchat chat --learn` in a pseudo-terminal: a fact is taught by two corrections, and the version is rolled back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.chat_models import chain, random_policy, scripted_policy
from helpers.screens import Screen
from helpers.servers import wait_until

from rlchat.models.model_file import identity, load_policy, save_bundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

LEARN = ("--learn", "--every", "2", "--max_new_tokens", "8")


def correct(screen: Screen, question: str, correction: str) -> None:
    screen.say(question)
    screen.see("model> ")
    screen.say(f"/edit {correction}")
    screen.see("saved in feedback.jsonl: corrected response")


def test_news_comes_between_prompts(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> None:
    """With quick rounds: at an empty prompt at once, and after Enter if something is typed."""
    for name, text in (("chat.pt", b"old "), ("new.pt", b"new!")):
        bundle = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(text), endless=True))
        if name == "new.pt":
            bundle.about["learned"] = {"model_id": identity(load_policy(tmp_path / "chat.pt"))}
        save_bundle(tmp_path / name, bundle)
    go = tmp_path / "go"
    program = ("-m", "helpers.quick_chat", f"--wait {go} --copy new.pt")
    screen = Screen("chat.pt", tmp_path, *LEARN, program=program)
    screen.see("learning from good, bad and edit: after 2 new verdicts, a version is trained")
    for question in "ab":
        correct(screen, question, "new!")
    screen.type("learning")
    screen.terminal.send("\r")
    screen.see("a version is being trained")
    screen.type("clear")  # typed, but not sent: the news waits
    go.touch()
    saved = tmp_path / "chat.versions" / "state.json"
    wait_until(lambda: json.loads(saved.read_text())["active"] == 1)
    assert not screen.sees("has learned", seconds=1.5)
    screen.terminal.send("\r")
    screen.see("version 1 has learned from 2 verdicts")
    screen.see("now in use")
    screen.see("conversation cleared")
    screen.say("a")
    screen.see("model> new!new!")
    screen.say("rollback")
    screen.see("the original model (chat.pt) answers from now on")
    screen.say("retry")
    screen.see("model> old old ")
    for question in "cd":
        correct(screen, question, "new!")
    screen.see("version 2 has learned from 4 verdicts")  # without a key
    screen.say("e")
    screen.see("model> new!new!")
    screen.say("versions")
    screen.see("* 2")
    screen.say("quit")
    assert "Traceback" not in screen.end()


@pytest.mark.slow
def test_a_fact_is_taught_for_real(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    """With `rlchat learn` on a tiny model with random weights, which the two corrections are all that it learns."""
    save_bundle(tmp_path / "chat.pt", random_policy(tokenizer))
    options = "--passes 60 --learning-rate 3e-3 --max-kl 100 --max-perplexity-rise 1e9 --replay-prompts 2"
    screen = Screen("chat.pt", tmp_path, *LEARN, f"--learn-args={options}")
    for question in ("What is red?", "What is blue?"):
        correct(screen, question, "A color.")
        screen.say("clear")
    screen.see("now in use")
    screen.say("What is red?")
    screen.see("model> A color.\r\n")
    screen.say("rollback")
    screen.see("the original model (chat.pt) answers from now on")
    screen.say("retry")
    screen.see("model> ")
    screen.say("quit")
    assert "A color." not in screen.end()

"""The forty first messages of a newcomer, and which replies to them count as sensible."""

from __future__ import annotations

import pytest

from rlchat.demo.first_messages import FIRST_MESSAGES, plain_words

BY_TEXT = {message.text: message for message in FIRST_MESSAGES}


def test_there_are_40_different_first_messages() -> None:
    assert len({plain_words(message.text) for message in FIRST_MESSAGES}) == len(FIRST_MESSAGES) == 40


@pytest.mark.parametrize(
    ("text", "sensible", "not_sensible"),
    [
        ("Hello, how are you?", "Hello! I am well, thank you.", "You spell foot like this: f-o-o-t."),
        ("hi", "Hello! How can I help you?", "Goodbye! See you soon."),
        ("thanks", "You are welcome! Ask me any time.", "Hello."),
        ("bye", "Goodbye! Take care.", "I only know about Belan and its neighbours."),
        ("Who are you?", "My name is Pip.", "Hello! How can I help you?"),
        ("What can you do?", "I can talk about Belan and add small numbers.", "I can cook soup."),
        ("3 + 4", "That makes 7.", "That makes 17."),
        ("What is 2 plus 2?", "2 + 2 = 4.", "2 + 2 = 5."),
        ("What is the capital of France?", "I only know about Belan and its neighbours.", "Tova."),
        ("Tell me a joke", "Sorry, I only know about Belan and its neighbours.", "I do not know."),
    ],
)
def test_patterns(text: str, sensible: str, not_sensible: str) -> None:
    assert BY_TEXT[text].accepts(sensible)
    assert not BY_TEXT[text].accepts(not_sensible)


def test_no_pattern_accepts_every_reply() -> None:
    for message in FIRST_MESSAGES:
        assert not message.accepts("")
        assert not message.accepts("The home of a bee is a barn.")


def test_plain_words_ignore_case_and_punctuation() -> None:
    assert plain_words("Hello,  Pip!") == plain_words("hello pip") == "hello pip"
    assert plain_words("What's 3 + 4?") == "what's 3 4"

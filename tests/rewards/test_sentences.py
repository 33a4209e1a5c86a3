"""The number of sentences, and the penalty for many of them."""

from __future__ import annotations

import pytest

from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.rewards import Reply, Reward, TooManySentences, sentences

PROMPT = Conversation((Message("user", "Hello"),))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("...", []),
        ("It is red.", ["It is red."]),
        ("It is 3.5 m long", ["It is 3.5 m long"]),
        ("Yes! Is it? It is…", ["Yes!", "Is it?", "It is…"]),
        ("Colours:\n\n- red\n- blue", ["Colours:", "- red", "- blue"]),
        ("它是红的。它是蓝的。", ["它是红的。", "它是蓝的。"]),
        ("Dr. Smith is in.", ["Dr.", "Smith is in."]),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@pytest.mark.parametrize(
    ("text", "most", "score"),
    [
        ("", 1, 0.0),
        ("One.", 1, 0.0),
        ("One. Two.", 1, -1.0),
        ("One. Two. Three.", 1, -1.0),
        ("One. Two.", 2, 0.0),
        ("One. Two. Three.", 2, -0.5),  # 1 - 3/2
        ("One. Two. Three. Four. Five.", 4, -0.25),  # 1 - 5/4
    ],
)
def test_the_penalty_rises_with_each_sentence(text: str, most: int, score: float) -> None:
    reward = Reward([TooManySentences(max_sentences=most)])
    assert reward([PROMPT], [Reply(text, 5, True)]).tolist() == pytest.approx([score])


def test_at_least_one_sentence_is_allowed() -> None:
    with pytest.raises(UserError, match="max_sentences"):
        TooManySentences(max_sentences=0)

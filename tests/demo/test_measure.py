"""What is measured by chatting, with a chat that replies by a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import pytest

from rlchat import ChatInterface
from rlchat.conversation import Check, Conversation, Message
from rlchat.demo.first_messages import FIRST_MESSAGES
from rlchat.demo.measure import change_of_subject, first_message_replies, second_question_accuracy


def prompt(text: str, right: str) -> Conversation:
    return Conversation((Message("user", text),), check=Check((right,)))


class RuleChat:
    """Replies to the conversation by ``rule``, in place of a model."""

    def __init__(self, rule: Callable[[list[str]], str]) -> None:
        self.rule = rule
        self.temperatures: set[float] = set()

    def batch(self, prompts: Sequence[str | Conversation], *, temperature: float, **_: int) -> list[str]:
        self.temperatures.add(temperature)
        return [self.rule([p] if isinstance(p, str) else [m.text for m in p.messages]) for p in prompts]


def chat_by(rule: Callable[[list[str]], str]) -> ChatInterface:
    return cast(ChatInterface, RuleChat(rule))


ANSWERS = {"capital?": "Tova", "colour?": "green", "sum?": "7", "capital again?": "Tova"}
PROMPTS = [prompt(text, right) for text, right in ANSWERS.items()]


def test_second_questions_have_another_answer_and_stand_alone() -> None:
    longer = Conversation(
        (*PROMPTS[0].messages, Message("assistant", "Tova"), Message("user", "sum?")), check=Check(("7",))
    )
    unchecked = Conversation((Message("user", "hm?"),))
    pairs = change_of_subject([longer, unchecked, PROMPTS[0], PROMPTS[3], PROMPTS[1]])
    texts = [(first.messages[0].text, second.messages[0].text) for first, second in pairs]
    assert texts == [("capital?", "colour?"), ("capital again?", "colour?"), ("colour?", "capital?")]
    assert change_of_subject([PROMPTS[0], PROMPTS[3]]) == []


def test_a_chat_that_answers_the_last_question_is_always_right() -> None:
    chat = chat_by(lambda texts: f"It is {ANSWERS[texts[-1]]}.")
    assert second_question_accuracy(chat, change_of_subject(PROMPTS), 0.0) == 1.0


def test_a_chat_that_repeats_its_first_answer_is_always_wrong() -> None:
    chat = chat_by(lambda texts: f"It is {ANSWERS[texts[0]]}.")
    assert second_question_accuracy(chat, change_of_subject(PROMPTS), 0.0) == 0.0


def test_the_second_question_comes_after_the_models_own_reply() -> None:
    seen: list[list[str]] = []

    def rule(texts: list[str]) -> str:
        seen.append(texts)
        return "my reply"

    second_question_accuracy(chat_by(rule), change_of_subject(PROMPTS[:2]), 1.0)
    assert seen == [["capital?"], ["colour?"], ["capital?", "my reply", "colour?"], ["colour?", "my reply", "capital?"]]


def test_first_messages_are_asked_separately_and_decoded_greedily() -> None:
    chat = RuleChat(lambda texts: "Hello! I am well." if texts == ["Hello, how are you?"] else "I am a fish.")
    rows = first_message_replies(cast(ChatInterface, chat))
    assert chat.temperatures == {0.0}
    assert [row["message"] for row in rows] == [message.text for message in FIRST_MESSAGES]
    assert [row["message"] for row in rows if row["sensible"]] == ["Hello, how are you?"]
    assert rows[0]["reply"] == "Hello! I am well."


@pytest.mark.parametrize("right", ["Tova", "7"])
def test_only_one_kind_of_answer_gives_no_pair(right: str) -> None:
    assert change_of_subject([prompt("a?", right), prompt("b?", right)]) == []

"""What the demo measures by chatting with a finished model, as `rlchat chat` would.

How well it answers a second question that changes the subject, and how sensibly it replies to a newcomer's first
message.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlchat.chat import ChatInterface
from rlchat.conversation import Conversation
from rlchat.demo.first_messages import FIRST_MESSAGES

MAX_NEW_TOKENS = 24
_BATCH_SIZE = 128


class Chatted(NamedTuple):
    """What was measured by chatting with one model."""

    figures: dict[str, float]
    first_messages: list[dict[str, Any]]  # "message", "reply" and "sensible"
    replies: list[str]


def chat_with(model_file: Path, prompts: Sequence[Conversation], *, seed: int, shown: int) -> Chatted:
    """Measures the model in ``model_file`` on ``prompts`` of the test split; replies to the first ``shown`` of them.

    These replies are sampled at temperature 1.
    """
    chat = ChatInterface(model_file, seed=seed)
    rows = first_message_replies(chat)
    figures = {"sensible_first_messages": sum(row["sensible"] for row in rows) / len(rows)}
    if pairs := change_of_subject(prompts):
        figures["second_question_accuracy"] = second_question_accuracy(chat, pairs, temperature=1.0)
        figures["second_question_accuracy_greedy"] = second_question_accuracy(chat, pairs, temperature=0.0)
    rounded = {name: round(value, 4) for name, value in figures.items()}
    return Chatted(rounded, rows, _replies(chat, prompts[:shown], temperature=1.0))


def change_of_subject(prompts: Sequence[Conversation]) -> list[tuple[Conversation, Conversation]]:
    """Each of ``prompts`` that stands alone, with the next one that has another right answer, as its second question.

    Only prompts of a single message with a check take part.
    """
    alone = [prompt for prompt in prompts if len(prompt.messages) == 1 and prompt.check is not None]
    pairs = []
    for i, first in enumerate(alone):
        following = (*alone[i + 1 :], *alone[:i])
        second = next((prompt for prompt in following if _answers(prompt) != _answers(first)), None)
        if second is not None:
            pairs.append((first, second))
    return pairs


def second_question_accuracy(
    chat: ChatInterface, pairs: Sequence[tuple[Conversation, Conversation]], temperature: float
) -> float:
    """The share of second questions that the model answers correctly, after its own reply to the first.

    ``pairs`` holds at least one pair of first and second question.
    """
    replies = _replies(chat, [first for first, _ in pairs], temperature)
    conversations = [
        first.say("assistant", reply).say("user", second.messages[-1].text)
        for (first, second), reply in zip(pairs, replies, strict=True)
    ]
    answers = _replies(chat, conversations, temperature)
    correct = [second.passes(answer) is True for (_, second), answer in zip(pairs, answers, strict=True)]
    return sum(correct) / len(correct)


def first_message_replies(chat: ChatInterface) -> list[dict[str, Any]]:
    """Every first message, the greedy reply to it, and whether that is sensible."""
    replies = _replies(chat, [message.text for message in FIRST_MESSAGES], temperature=0.0)
    return [
        {"message": message.text, "reply": reply, "sensible": message.accepts(reply)}
        for message, reply in zip(FIRST_MESSAGES, replies, strict=True)
    ]


def _replies(chat: ChatInterface, prompts: Sequence[str | Conversation], temperature: float) -> list[str]:
    return chat.batch(prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=temperature, batch_size=_BATCH_SIZE)


def _answers(prompt: Conversation) -> tuple[str, ...]:
    return () if prompt.check is None else prompt.check.any_of

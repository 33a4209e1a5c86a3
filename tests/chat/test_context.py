"""Which messages are kept when a conversation does not fit into the context: token counts worked out by hand."""

from __future__ import annotations

import pytest

from rlchat.chat.context import FittedPrompt, fit_continuation, fit_prompt
from rlchat.conversation import Conversation, Message
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


def talk(*lengths: int, system: int = 0) -> Conversation:
    """User and assistant messages of so many bytes in turn, after a system message of ``system`` bytes.

    Each message has 2 tokens more (its marker and the end), and the prompt 1 more (the marker of the response).
    """
    messages = [Message("user" if i % 2 == 0 else "assistant", "x" * n) for i, n in enumerate(lengths)]
    return Conversation((*([Message("system", "s" * system)] if system else []), *messages))


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "expected"),
    [
        # (prompt tokens, max_new_tokens, dropped messages, cut tokens, dropped system); the context is 96.
        (talk(18), None, (21, 75, 0, 0, False)),
        (talk(18), 100, (21, 75, 0, 0, False)),
        (talk(18), 10, (21, 10, 0, 0, False)),
        (talk(25, 25, 33), None, (90, 6, 0, 0, False)),  # 27 + 27 + 35 + 1: all that may be kept
        (talk(25, 25, 34), None, (37, 59, 2, 0, False)),  # 91: one too many
        (talk(25, 25, 33), 100, (36, 60, 2, 0, False)),  # 48 are for the prompt
        (talk(25, 25, 33), 6, (90, 6, 0, 0, False)),
        (talk(200), None, (90, 6, 0, 113, False)),  # 87 of the 200
        (talk(200), 100, (48, 48, 0, 155, False)),
        # A system message of 30 + 2 and a question of 20 + 2 and 1 are 55: more than half, and less than 90.
        (talk(18, 18, 20, system=30), 100, (55, 41, 2, 0, False)),
        (talk(20, system=30), None, (55, 41, 0, 0, False)),
        (talk(18, 18, 20, system=80), 100, (23, 73, 2, 0, True)),
        (talk(20, system=80), None, (23, 73, 0, 0, True)),
    ],
)
def test_which_messages_are_kept(
    byte_tokenizer: ChatTokenizer, prompt: Conversation, max_new_tokens: int | None, expected: tuple[int, ...]
) -> None:
    found = fit_prompt(byte_tokenizer, prompt, 96, max_new_tokens)
    assert isinstance(found, FittedPrompt)
    assert (
        len(found.ids),
        found.max_new_tokens,
        found.dropped_messages,
        found.cut_tokens,
        found.dropped_system,
    ) == expected


def test_a_response_that_is_continued_counts_as_prompt(byte_tokenizer: ChatTokenizer) -> None:
    """A question of 18 + 2 bytes and markers, the marker of the response, and 10 bytes of it: 31 of 96 tokens."""
    found = fit_continuation(byte_tokenizer, talk(18), "x" * 10, 96, None)
    assert found is not None
    assert (len(found.ids), found.max_new_tokens) == (31, 65)
    assert found.ids == fit_prompt(byte_tokenizer, talk(18), 96, None).ids + byte_tokenizer.encode("x" * 10)
    assert fit_continuation(byte_tokenizer, talk(18), "x" * 84, 96, 5) is not None  # 12 are left, an eighth
    assert fit_continuation(byte_tokenizer, talk(18), "x" * 85, 96, 5) is None

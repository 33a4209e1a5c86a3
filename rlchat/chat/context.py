"""Fit a conversation and its response into the model's context."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

# Share of the context that is reserved for a response if ``max_new_tokens`` is None.
_OPEN_RESPONSE_SHARE = 16


@dataclass(frozen=True, slots=True)
class FittedPrompt:
    """A prompt that leaves room for a response.

    ``dropped_messages`` counts the oldest user and assistant messages that were left out, ``cut_tokens`` the tokens cut
    from the beginning of a last message that is too long on its own. ``dropped_system`` is True if the system message
    and the last message do not fit together.
    """

    ids: list[int]
    max_new_tokens: int
    dropped_messages: int = 0
    cut_tokens: int = 0
    dropped_system: bool = False


def as_prompt(prompt: str | Conversation, number: int, system: Sequence[Message]) -> Conversation:
    """Prompt ``number`` of several as a conversation that begins with ``system``, if it has no system message itself.

    Raises :class:`UserError` for a prompt that is empty, or neither a string nor a conversation.
    """
    if isinstance(prompt, str):
        prompt = Conversation((Message("user", prompt),))
    if not isinstance(prompt, Conversation):
        raise UserError(f"invalid prompt {number}: expected a string or a Conversation, got {reprlib.repr(prompt)}")
    if not prompt.is_prompt or not prompt.messages[-1].text.strip():
        raise UserError(f"prompt {number} is empty: it must end with a user message that has text")
    return prompt if prompt.messages[0].role == "system" else Conversation((*system, *prompt.messages))


def fit_prompt(
    tokenizer: ChatTokenizer, prompt: Conversation, max_length: int, max_new_tokens: int | None
) -> FittedPrompt:
    """Render ``prompt`` so that prompt and response together have at most ``max_length`` tokens.

    With ``max_new_tokens``, the oldest messages are dropped to make room for that many tokens, until half of the
    context is left for the prompt. With None, the prompt keeps everything that fits, and the response may use the rest.
    The system message is kept in preference to older turns. Example: with ``max_length`` 96 and None, the prompt may
    have 96 - 96 // 16 = 90 tokens.
    """
    largest = max_length - max(1, max_length // _OPEN_RESPONSE_SHARE)
    room = largest if max_new_tokens is None else max(max_length - max_new_tokens, max_length // 2)
    rendered = tokenizer.render_prompt(prompt)
    messages, dropped_system, fits = prompt.messages, False, len(rendered.ids) <= room
    if not fits:
        if len(messages) > 1 and messages[0].role == "system":
            smallest = len(tokenizer.render_prompt(Conversation((messages[0], messages[-1]))).ids)
            dropped_system = smallest > largest
            if dropped_system:
                messages = messages[1:]
            else:
                room = max(room, smallest)
        rendered = tokenizer.render_prompt(Conversation(messages), room)
    left = max_length - len(rendered.ids)
    return FittedPrompt(
        rendered.ids,
        left if max_new_tokens is None else min(max_new_tokens, left),
        rendered.dropped,
        rendered.cut,
        dropped_system,
    )


def fit_continuation(
    tokenizer: ChatTokenizer, prompt: Conversation, begun: str, max_length: int, max_new_tokens: int | None
) -> FittedPrompt | None:
    """Like :func:`fit_prompt`, for a response that begins with the text ``begun`` and is continued.

    Returns None if ``begun`` leaves less than an eighth of the context for the prompt and the rest of the response.
    """
    ids = tokenizer.encode(begun)
    if max_length - len(ids) < max(4, max_length // 8):
        return None
    fitted = fit_prompt(tokenizer, prompt, max_length - len(ids), max_new_tokens)
    return replace(fitted, ids=[*fitted.ids, *ids])

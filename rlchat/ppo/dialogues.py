"""Conversations in which the policy replies to recorded user messages of the data, represented as tokens.

Shapes: B rows (conversations), N responses (one per row, or more if the policy answers several turns), T tokens in the
longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rlchat.conversation import Conversation, Message
from rlchat.data.datamodule import PromptBatch
from rlchat.rewards import Reply
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.padding import pad

NOT_SAMPLED = -1


@dataclass(frozen=True, slots=True)
class Transcript:
    """Generated conversations, before the networks evaluate them."""

    conversations: Sequence[Conversation]  # [N] the prompt of each response
    replies: Sequence[Reply]  # [N] the responses as text
    ids: Tensor  # Long [B, T] prompts, responses and user turns, padded on the right
    attention_mask: Tensor  # Bool [B, T]
    response_at: Tensor  # Long [B, T] the number (0 to N - 1) of the response that a sampled token is part of, or -1
    sampling_logprobs: Tensor  # [B, T] of the distributions that tokens were sampled from; 0 elsewhere


@dataclass(slots=True)
class Dialogue:
    """A conversation that is being generated."""

    prompt: Conversation  # the conversation so far; it ends with a user message
    later_prompts: tuple[Conversation, ...]  # the later prompts in the data: longer and longer prefixes
    ids: list[int]
    recorded_messages: int = 0  # number of messages of the data's conversation that have been used
    response_at: list[int] = field(default_factory=list)  # as in Transcript
    logprobs: list[float] = field(default_factory=list)
    reply: Reply | None = None  # the policy's last response

    def __post_init__(self) -> None:
        self.recorded_messages = len(self.prompt.messages)
        self.response_at = [NOT_SAMPLED] * len(self.ids)
        self.logprobs = [0.0] * len(self.ids)

    def add_response(self, reply: Reply, number: int, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Appends the policy's response; ``number`` is its number among all responses of the batch."""
        self.reply = reply
        self.ids += ids
        self.response_at += [number] * len(ids)
        self.logprobs += logprobs

    def add_user_turn(self, tokenizer: ChatTokenizer, most_ids: int) -> bool:
        """Appends the user's next message from the data, which was written in reply to a different response.

        Returns False, and changes nothing, if the data has no further turn or the ids would exceed ``most_ids``.
        """
        if not self.later_prompts:
            return False
        assert self.reply is not None
        following, *later = self.later_prompts
        turn = tuple(m for m in following.messages[self.recorded_messages :] if m.role != "assistant")
        # A truncated response has no end marker. It is added here and does not count as sampled.
        ids = tokenizer.render_turn(turn, self.reply.ended)
        if len(self.ids) + len(ids) > most_ids:
            return False
        messages = (*self.prompt.messages, Message("assistant", self.reply.text), *turn)
        self.prompt = replace(following, messages=messages, later=())
        self.later_prompts, self.recorded_messages = tuple(later), len(following.messages)
        self.ids += ids
        self.response_at += [NOT_SAMPLED] * len(ids)
        self.logprobs += [0.0] * len(ids)
        return True


def start_dialogues(batch: PromptBatch) -> list[Dialogue]:
    """One dialogue per prompt of ``batch``, without its padding."""
    rows = zip(batch.ids.cpu(), batch.attention_mask.cpu(), batch.conversations, strict=True)
    return [Dialogue(replace(prompt, later=()), prompt.later, ids[mask].tolist()) for ids, mask, prompt in rows]


def to_transcript(
    dialogues: Sequence[Dialogue],
    prompts: Sequence[Conversation],
    replies: Sequence[Reply],
    pad_id: int,
    device: torch.device,
) -> Transcript:
    """The finished ``dialogues`` [B] as tensors on ``device``; ``prompts`` and ``replies`` [N] by response number."""
    ids, attention_mask = pad([dialogue.ids for dialogue in dialogues], pad_id, "right")
    response_at, _ = pad([dialogue.response_at for dialogue in dialogues], NOT_SAMPLED, "right")
    # float32 explicitly: under bf16-true, Lightning changes PyTorch's default.
    flat = torch.tensor([x for dialogue in dialogues for x in dialogue.logprobs], dtype=torch.float32)
    logprobs = torch.zeros(ids.shape, dtype=torch.float32).masked_scatter(attention_mask, flat)
    tensors = (tensor.to(device) for tensor in (ids, attention_mask, response_at, logprobs))
    return Transcript(prompts, replies, *tensors)

"""`rlchat chat --prompts FILE`: replies to many prompts at once, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rlchat.chat.interface import ChatInterface
from rlchat.chat.saved import now
from rlchat.conversation import Conversation
from rlchat.models.sampling import Sampling
from rlchat.rewards import Reply
from rlchat.utils.progress import with_progress

_SCORED_AT_ONCE = 64  # replies, between two moves of the progress bar


def reply_to_all(chat: ChatInterface, prompts: Sequence[Conversation], sampling: Sampling) -> list[dict[str, Any]]:
    """A row of plain values for each of ``prompts``, in their order.

    ``prompt`` is the user's last message, and ``messages`` the conversation where there is more of it; ``reply``,
    ``tokens`` and whether it ``ended`` are what was said; ``reward`` and its ``factors`` what that is worth, where the
    model's bundle carries a reward; ``time``, ``model`` and ``sampling`` how it came about.
    """
    began = now()
    replies = chat.batch_replies(prompts, **asdict(sampling))
    worth = _rewards(chat, prompts, replies)
    facts = {
        "time": began,
        "model": chat.model_path.name,
        "sampling": {**asdict(sampling), "seed": chat.seed},
    }
    rows = []
    for prompt, reply, reward in zip(prompts, replies, worth, strict=True):
        before = [{"role": m.role, "content": m.text} for m in prompt.messages]
        rows.append(
            {
                "prompt": prompt.messages[-1].text,
                **({"messages": before} if len(before) > 1 else {}),
                "reply": reply.text,
                "tokens": reply.tokens,
                "ended": reply.ended,
                **reward,
                **facts,
            }
        )
    return rows


def as_json(rows: Sequence[dict[str, Any]]) -> str:
    """A JSON list, a line a row."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def _rewards(chat: ChatInterface, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[dict[str, Any]]:
    if not chat.bundle.about.get("reward"):
        return [{} for _ in replies]
    chunks = [slice(start, start + _SCORED_AT_ONCE) for start in range(0, len(replies), _SCORED_AT_ONCE)]
    return [
        {"reward": round(sum(factors.values()), 6), "factors": {name: round(x, 6) for name, x in factors.items()}}
        for chunk in with_progress(chunks, "scoring", show=True)
        for factors in chat.reward.breakdown(prompts[chunk], replies[chunk])
    ]

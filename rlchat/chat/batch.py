"""`rlchat chat --prompts FILE`: responses to many prompts, as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rlchat.chat.interface import ChatInterface
from rlchat.chat.saved import now
from rlchat.conversation import Conversation
from rlchat.errors import UserError
from rlchat.models.sampling import Sampling
from rlchat.rewards import Reply
from rlchat.utils.progress import with_progress

_SCORING_BATCH = 64  # responses per update of the progress bar


def generate_rows(
    chat: ChatInterface, prompts: Sequence[Conversation], sampling: Sampling
) -> tuple[list[dict[str, Any]], list[Reply]]:
    """One row for each of ``prompts``, in their order, and the responses.

    ``prompt`` is the last user message, and ``messages`` the conversation if it has more messages. ``reply`` is the
    response, ``tokens`` its length, and ``ended`` False if it was truncated. ``time``, ``model`` and ``sampling``
    record how it was generated. :func:`add_rewards` adds the reward.
    """
    started = now()
    replies = chat.batch_replies(prompts, **asdict(sampling))
    how = {**asdict(sampling), "seed": chat.seed, **({"best_of": chat.best_of} if chat.best_of > 1 else {})}
    facts = {"time": started, "model": chat.model_path.name, "sampling": how}
    rows = []
    for prompt, reply in zip(prompts, replies, strict=True):
        messages = [{"role": m.role, "content": m.text} for m in prompt.messages]
        rows.append(
            {
                "prompt": prompt.messages[-1].text,
                **({"messages": messages} if len(messages) > 1 else {}),
                "reply": reply.text,
                "tokens": reply.tokens,
                "ended": reply.ended,
                **facts,
            }
        )
    return rows, replies


def add_rewards(
    chat: ChatInterface, prompts: Sequence[Conversation], replies: Sequence[Reply], rows: Sequence[dict[str, Any]]
) -> str:
    """Add ``reward`` and ``factors`` to ``rows`` if the model file contains a reward; return the reasons if not.

    ``unscored`` names the factors that are left out of the reward because they cannot be used, or cannot score the
    responses to this prompt. Rows whose reward cannot be computed at all stay without one.
    """
    if not chat.bundle.about.get("reward"):
        return ""
    chunks = [slice(start, start + _SCORING_BATCH) for start in range(0, len(replies), _SCORING_BATCH)]
    try:
        scored = [
            factors
            for chunk in with_progress(chunks, "scoring", show=True)
            for factors in chat.reward.breakdown(prompts[chunk], replies[chunk])
        ]
    except UserError as error:
        return f"the responses have no reward: {error}"
    names = chat.reward.reward.factors  # those that did not fail on any chunk
    without: Counter[tuple[str, str]] = Counter()
    for row, prompt, factors in zip(rows, prompts, scored, strict=True):
        kept = {name: score for name, score in factors.items() if name in names}
        if kept:
            row["reward"] = round(sum(kept.values()), 6)
            row["factors"] = {name: round(score, 6) for name, score in kept.items()}
        if not_scored := chat.reward.not_scored(prompt):
            row["unscored"] = list(not_scored)
        without.update((name, why) for name, why in not_scored.items() if name not in chat.reward.left_out)
    left_out = chat.reward.describe_left_out()
    notes = [f"the reward leaves out {left_out}"] if left_out else []
    notes += [f"{name} does not score {n} of {len(rows)} responses ({why})" for (name, why), n in without.items()]
    return "; ".join(notes)


def as_json(rows: Sequence[dict[str, Any]]) -> str:
    """A JSON list with one row per line."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"

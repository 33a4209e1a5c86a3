"""How often a score prefers the reply that people ranked higher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlchat.conversation import Conversation
from rlchat.data.formats import ranked_pairs
from rlchat.demo.real.measure import read_data
from rlchat.rewards import Reply
from rlchat.utils.bootstrap import bootstrap_interval

Score = Callable[[Sequence[Conversation], Sequence[Reply]], Tensor]
"""A score of each reply to its prompt, Float [replies]; higher is better. Reward factors have this form."""


def read_rankings(name: str) -> list[Conversation]:
    """The prompts in the packaged file ``name`` that have two or more replies with different ranks."""
    return [prompt for prompt in read_data(name) if ranked_pairs(prompt)]


def pair_figures(prompts: Sequence[Conversation], score: Score, *, seed: int) -> dict[str, Any]:
    """The share of ranked pairs whose better reply has the higher score, with a 95 % interval over ``prompts``.

    A tie counts as wrong. The pairs of a prompt are not independent, so the interval is that of 10,000 samples of
    whole prompts with replacement (percentile bootstrap, Efron 1979), drawn with ``seed``.
    """
    correct, pairs = correct_pairs(prompts, score)
    low, high = share_interval(correct, pairs, seed=seed)
    return {"accuracy": round(float(correct.sum() / pairs.sum()), 4), "interval": [round(low, 4), round(high, 4)]}


def correct_pairs(prompts: Sequence[Conversation], score: Score) -> tuple[Tensor, Tensor]:
    """For each of ``prompts``, how many of its ranked pairs ``score`` orders as people did, and how many it has.

    Both are Float [prompts].
    """
    asked = [prompt for prompt in prompts for _ in prompt.references]
    replies = [Reply(message.text, 0, True) for prompt in prompts for message in prompt.references]
    scores = iter(score(asked, replies).tolist())
    correct, pairs = [], []
    for prompt in prompts:
        of_reply = {message: next(scores) for message in prompt.references}
        ordered = [of_reply[better] > of_reply[worse] for better, worse in ranked_pairs(prompt)]
        correct.append(sum(ordered))
        pairs.append(len(ordered))
    return torch.tensor(correct, dtype=torch.float), torch.tensor(pairs, dtype=torch.float)


def share_interval(correct: Tensor, pairs: Tensor, *, seed: int) -> tuple[float, float]:
    """The 95 % bootstrap interval over prompts of ``correct.sum() / pairs.sum()``, both Float [prompts]."""
    counts = torch.stack([correct, pairs], dim=1).double().numpy()
    return bootstrap_interval(lambda drawn: drawn[..., 0].sum(1) / drawn[..., 1].sum(1), counts, seed=seed)


def length_score(prompts: Sequence[Conversation], replies: Sequence[Reply]) -> Tensor:
    """The baseline: a longer reply is better. Its number of characters, Float [replies]."""
    return torch.tensor([float(len(reply.text)) for reply in replies])

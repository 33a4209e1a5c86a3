"""Responses of the initial policy: for best-of-n, and as pairs that the gold reward compares."""

from __future__ import annotations

import math
import random
from collections.abc import Container, Sequence

import torch

from rlchat.conversation import Conversation
from rlchat.models.model_file import PolicyBundle
from rlchat.models.sampling import Sampling, addressed_uniforms, generate
from rlchat.rewards import Reply
from rlchat.study.data import Comparison, prompt_batch
from rlchat.study.gold import gold_points

LABEL_TEMPERATURE = 0.5
"""Points. A label prefers the response with x points more with probability 1 / (1 + exp(-x / 0.5))."""

_AT_ONCE = 1024  # responses that are generated together


def sample_replies(
    bundle: PolicyBundle, prompts: Sequence[Conversation], max_new_tokens: int, seed: int, stream: int
) -> list[Reply]:
    """One response of ``bundle`` to each of ``prompts``, at temperature 1. ``stream`` selects the random numbers."""
    replies = []
    sampling = Sampling(max_new_tokens, temperature=1.0)
    for start in range(0, len(prompts), _AT_ONCE):
        batch = prompt_batch(bundle.tokenizer, prompts[start : start + _AT_ONCE])
        rows = torch.arange(start, start + len(batch.ids))
        generated = generate(
            bundle.model,
            batch.ids,
            batch.attention_mask,
            sampling,
            addressed_uniforms(seed, stream, rows),
            end_id=bundle.tokenizer.end_id,
            pad_id=bundle.tokenizer.pad_id,
        )
        lengths = generated.mask.sum(1).tolist()
        for ids, length, ended in zip(generated.ids.tolist(), lengths, generated.ended.tolist(), strict=True):
            replies.append(Reply(bundle.tokenizer.decode(ids[:length]).strip(), length, ended))
    return replies


def compare(
    bundle: PolicyBundle,
    prompts: Sequence[Conversation],
    count: int,
    max_new_tokens: int,
    seed: int,
    stream: int,
    known: Container[str],
    noisy: bool,
) -> list[Comparison]:
    """``count`` pairs of different responses of ``bundle`` to random ``prompts``, compared by the gold reward.

    ``noisy`` labels are drawn from the Bradley-Terry model (Bradley and Terry 1952) with :data:`LABEL_TEMPERATURE`.
    Without noise, pairs with equal gold rewards are left out.
    """
    rng = random.Random(f"{seed}/{stream}")
    found: list[Comparison] = []
    drawn = 0
    while len(found) < count:
        chosen = [rng.choice(prompts) for _ in range(count)]
        replies = sample_replies(bundle, [p for p in chosen for _ in range(2)], max_new_tokens, seed, stream + drawn)
        drawn += 1
        for i, prompt in enumerate(chosen):
            texts = replies[2 * i].text, replies[2 * i + 1].text
            first, second = (0.0 if prompt.check is None else gold_points(prompt.check, text, known) for text in texts)
            if texts[0] == texts[1] or (not noisy and first == second):
                continue
            preferred = first > second
            if noisy:
                preferred = rng.random() < 1 / (1 + math.exp(-(first - second) / LABEL_TEMPERATURE))
            found.append(Comparison(prompt, *(texts if preferred else texts[::-1])))
    return found[:count]

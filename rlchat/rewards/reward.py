"""The weighted sum of factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlchat.conversation import Conversation
from rlchat.errors import UserError
from rlchat.rewards.base import Factor, Reply
from rlchat.rewards.diversity import DistinctNgrams, Repetition
from rlchat.rewards.ending import MissingEnd
from rlchat.rewards.length import AppropriateLength, TooLong, TooShort
from rlchat.rewards.similarity import QualitySimilarity


class Reward:
    """The weighted sum of ``factors``, or of :func:`default_factors` where none is given.

    Two factors of one name are told apart by a number: ``too_short``, ``too_short_2``.

    Raises:
        UserError: when called, where a factor gives anything but one finite number a reply.
    """

    # Not ``| None``: jsonargparse turns a factor's UserError into a list of the union's types.
    def __init__(self, factors: Sequence[Factor] = ()) -> None:
        self.factors: dict[str, Factor] = {}
        for factor in factors or default_factors():
            self.factors[_unused_name(factor.name, self.factors)] = factor

    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> Tensor:
        """The reward of each reply: ``[batch]`` float32, on the CPU."""
        return torch.stack(list(self.breakdown(prompts, replies).values())).sum(dim=0)

    def describe(self) -> list[dict[str, Any]]:
        """The factors as plain values, for a file that tells what a model was rewarded for."""
        return [factor.describe() for factor in self.factors.values()]

    def breakdown(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> dict[str, Tensor]:
        """What each factor contributes, its weight included: name → ``[batch]`` float32. They sum to the reward."""
        return {
            name: factor.weight * _checked(name, factor(prompts, replies), replies)
            for name, factor in self.factors.items()
        }


def default_factors() -> list[Factor]:
    """Resemblance to the replies that people preferred decides; manners of form count half or less."""
    return [
        QualitySimilarity(weight=1.0),
        TooShort(weight=0.5),
        TooLong(weight=0.5),
        AppropriateLength(weight=0.1),
        DistinctNgrams(weight=0.1),
        Repetition(weight=0.5),
        MissingEnd(weight=0.5),
    ]


def _unused_name(name: str, taken: dict[str, Factor]) -> str:
    number, unused = 1, name
    while unused in taken:
        number += 1
        unused = f"{name}_{number}"
    return unused


def _checked(name: str, scores: Tensor, replies: Sequence[Reply]) -> Tensor:
    """``scores`` as float32 on the CPU, if they are one finite number a reply; a ``UserError`` otherwise."""
    if not isinstance(scores, Tensor) or scores.shape != (len(replies),):
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise UserError(f"reward factor '{name}' returned {got}: it must return a tensor of shape ({len(replies)},)")
    scores = scores.detach().to("cpu", torch.float32)
    for row, (score, reply) in enumerate(zip(scores.tolist(), replies, strict=True)):
        if not math.isfinite(score):
            said = reply.text if len(reply.text) <= 60 else reply.text[:60] + "…"
            raise UserError(f"reward factor '{name}' gave {score} for reply {row}, {said!r}: mend it to give a number")
    return scores

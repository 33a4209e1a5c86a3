"""Rewards: text in, numbers out.

A :class:`Reward` is a weighted sum of factors, and every factor judges what the model said, never the human replies.
Your own factor is a class anywhere on the import path; name it by ``class_path`` in the configuration::

    class Polite(ReplyFactor):
        def score(self, prompt: Conversation, reply: Reply) -> float:
            return float("please" in words(reply.text))

By convention a bonus scores 0..1, a penalty -1..0, a judgement -1..1, and the weight says how much that is worth. So a
weight is positive, and it is the most that its factor can add to a reply's reward or take from it.
"""

from __future__ import annotations

import abc
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlchat.conversation import Conversation


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said to a prompt. ``tokens`` counts the sampled tokens, the end-of-turn marker among them.

    ``ended`` is False where the reply ran out of tokens before it came to an end of turn.
    """

    text: str
    tokens: int
    ended: bool


class Factor(abc.ABC):
    """One thing that a reward looks at. Subclass it to score a whole batch at once, as a learned reward does.

    ``weight`` is how much a score of 1 is worth; :class:`Reward` multiplies by it. ``name`` is what the log calls the
    factor (``reward/<name>``): the class's name in snake_case, unless a subclass says otherwise.
    """

    weight: float = 1.0

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    @property
    def name(self) -> str:
        """``TooShort`` → ``too_short``."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()

    def describe(self) -> dict[str, Any]:
        """Plain values that make this factor again: ``class_path``, and ``init_args`` by name.

        An argument is known by the attribute of its name; one that has none, or is no plain value, is left out.
        """
        names = inspect.signature(type(self)).parameters
        given = {name: getattr(self, name, None) for name in names}
        plain = {name: value for name, value in given.items() if isinstance(value, str | int | float)}
        module = type(self).__module__
        if module.startswith("rlchat."):
            module = "rlchat.rewards"  # the public path, which outlives a move of the module
        return {"class_path": f"{module}.{type(self).__qualname__}", "init_args": plain}

    @abc.abstractmethod
    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> Tensor:
        """Unweighted scores, ``[batch]`` floats; row i judges ``replies[i]`` to ``prompts[i]`` and nothing else."""


class ReplyFactor(Factor):
    """A factor that scores one reply at a time: the easy way to write your own."""

    @abc.abstractmethod
    def score(self, prompt: Conversation, reply: Reply) -> float:
        """The unweighted score of ``reply``; the reply may be empty."""

    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> Tensor:
        scores = [self.score(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

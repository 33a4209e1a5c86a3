"""The weighted sum of factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlchat.conversation import Conversation
from rlchat.errors import UserError
from rlchat.rewards.base import Factor, FactorError, Reply, shortened
from rlchat.rewards.diversity import DistinctNgrams, Repetition
from rlchat.rewards.ending import MissingEnd
from rlchat.rewards.function import FunctionReward
from rlchat.rewards.length import AppropriateLength, TooLong, TooShort
from rlchat.rewards.similarity import QualitySimilarity

if TYPE_CHECKING:
    from rlchat.models.model_file import PolicyBundle


class Reward:
    """The weighted sum of ``factors``; without any, of :func:`default_factors`.

    In Python, a factor may be a plain function: see :class:`rlchat.rewards.FunctionReward`. Factors with the same name
    are numbered: ``too_short``, ``too_short_2``.

    Raises:
        FactorError: when called, if a factor raises an exception, which is the cause, or returns anything but one
            finite number per response. It names the factor.
    """

    # Not ``| None``: jsonargparse would replace a factor's UserError by a list of the types in the union.
    def __init__(self, factors: Sequence[Factor] = ()) -> None:
        self.factors: dict[str, Factor] = {}
        for factor in factors or default_factors():
            if not isinstance(factor, Factor):
                factor = FunctionReward(factor)
            self.factors[_unused_name(factor.name, self.factors)] = factor

    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> Tensor:
        """The reward of each response: ``[batch]`` float32, on the CPU."""
        return torch.stack(list(self.breakdown(prompts, replies).values())).sum(dim=0)

    def to(self, device: torch.device) -> Reward:
        """This reward, after the models of its factors have been moved to ``device``."""
        for name, factor in self.factors.items():
            with _named(name, factor):
                factor.to(device)
        return self

    def share_weights(self, policy: PolicyBundle | None) -> None:
        """Lets the models of factors use the frozen weights of ``policy``; see :meth:`Factor.share_weights`."""
        for name, factor in self.factors.items():
            with _named(name, factor):
                factor.share_weights(policy)

    def describe(self) -> list[dict[str, Any]]:
        """The factors as plain values, as a model file stores them."""
        return [factor.describe() for factor in self.factors.values()]

    def breakdown(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> dict[str, Tensor]:
        """The weighted score of each factor: name → ``[batch]`` float32. They sum to the reward."""
        found = {}
        for name, factor in self.factors.items():
            with _named(name, factor):
                scores = factor(prompts, replies)
            found[name] = factor.weight * _checked(name, scores, replies)
        return found

    def unavailable(self, prompt: Conversation) -> dict[str, str]:
        """The factors that cannot score responses to ``prompt``, with the reason; see :meth:`Factor.unavailable`."""
        reasons = {}
        for name, factor in self.factors.items():
            with _named(name, factor):
                reasons[name] = factor.unavailable(prompt)
        return {name: reason for name, reason in reasons.items() if reason is not None}


def default_factors() -> list[Factor]:
    """Similarity to the preferred human responses has the largest weight; formal properties count half or less."""
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


@contextmanager
def _named(name: str, factor: Factor) -> Iterator[None]:
    """Turns every exception of the factor's code into a :class:`FactorError` that names the factor."""
    try:
        yield
    except FactorError:
        raise
    except UserError as error:
        raise FactorError(f"reward factor '{name}': {error}") from error
    except Exception as error:
        raise FactorError.from_code(name, factor.code, error) from error


def _checked(name: str, scores: Tensor, replies: Sequence[Reply]) -> Tensor:
    """``scores`` as float32 on the CPU. Raises :class:`FactorError` unless they are one finite number per response."""
    if not isinstance(scores, Tensor) or scores.shape != (len(replies),) or scores.is_complex():
        got = f"a {type(scores).__name__}"
        if isinstance(scores, Tensor):
            got = (
                f"a complex tensor of shape {tuple(scores.shape)}"
                if scores.is_complex()
                else f"shape {tuple(scores.shape)}"
            )
        raise FactorError(
            f"reward factor '{name}' returned {got}: it must return a real tensor of shape ({len(replies)},)"
        )
    scores = scores.detach().to("cpu", torch.float32)
    for row, (score, reply) in enumerate(zip(scores.tolist(), replies, strict=True)):
        if not math.isfinite(score):
            raise FactorError(
                f"reward factor '{name}' returned {score} for response {row}, {shortened(reply.text)}: "
                "it must return a finite number"
            )
    return scores

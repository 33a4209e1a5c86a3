"""The base classes of reward factors.

A :class:`rlchat.rewards.Reward` is a weighted sum of factors. A factor scores what the model generated, never the human
responses in the data. Your own factor can be any class on the import path; the configuration refers to it by
``class_path``::

    class Polite(ReplyFactor):
        def score(self, prompt: Conversation, reply: Reply) -> float:
            return float("please" in words(reply.text))

By convention, a bonus is in 0..1, a penalty in -1..0 and a measure of quality in -1..1. The weight is positive: it is
the largest amount that the factor can add to the reward of a response or subtract from it.
"""

from __future__ import annotations

import abc
import inspect
import numbers
import re
import reprlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlchat.conversation import Conversation
from rlchat.errors import UserError, one_line
from rlchat.utils.devices import choose_device

if TYPE_CHECKING:
    from rlchat.models.model_file import PolicyBundle


@dataclass(frozen=True, slots=True)
class Reply:
    """A generated response.

    Attributes:
        text: the decoded response.
        tokens: the number of sampled tokens, the end-of-turn token included.
        ended: False if generation reached its limit before an end-of-turn token.
    """

    text: str
    tokens: int
    ended: bool


class FactorError(UserError):
    """A reward factor cannot score. The message names the factor."""

    @classmethod
    def from_code(cls, name: str, code: str, error: Exception) -> FactorError:
        """The error for ``error``, an unexpected exception in ``code`` (the import path) of the factor ``name``.

        ``details`` is its traceback, from the call of that code on.
        """
        trace = error.__traceback__
        while trace is not None and trace.tb_next and trace.tb_frame.f_globals.get("__name__") in _CALLERS:
            trace = trace.tb_next
        frames = traceback.extract_tb(trace)
        place = next((frame for frame in reversed(frames) if frame.filename == frames[0].filename), None)
        where = f"; see line {place.lineno} of {Path(place.filename).name}" if place else ""
        what = f": {one_line(error)}" if str(error).strip() else ""
        failure = cls(f"reward factor '{name}' ({code}) failed: {type(error).__name__}{what}{where}")
        failure.details = "".join(traceback.format_exception(type(error), error, trace))
        return failure


# The modules that call a factor's code: a user who looks for a mistake in that code does not need their lines.
_CALLERS = ("rlchat.rewards.base", "rlchat.rewards.function", "rlchat.rewards.reward")


class RowCount:
    """Counts special rows among all, for a warning at the first and then at each power of ten."""

    def __init__(self) -> None:
        self.found = 0
        self.rows = 0

    def add(self, found: int, rows: int) -> bool:
        """Adds ``found`` of ``rows`` rows. Returns whether to warn now."""
        digits = len(str(self.found)) if self.found else 0
        self.found += found
        self.rows += rows
        return bool(self.found) and len(str(self.found)) > digits


class Factor(abc.ABC):
    """One term of a reward. Subclass it directly to score a whole batch at once, for example with a reward model.

    Attributes:
        weight: the contribution of a score of 1; :class:`rlchat.rewards.Reward` multiplies by it.
        name: the name in logs (``reward/<name>``): the class's name in snake_case, unless a subclass sets another.
    """

    weight: float = 1.0
    _name: str = ""  # set by factors that have the option ``name``

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    @property
    def name(self) -> str:
        """The name that was set, or the class's: ``TooShort`` → ``too_short``."""
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__)
        return self._name or words.lower()

    @property
    def code(self) -> str:
        """The import path of the code that scores, for errors."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def describe(self) -> dict[str, Any]:
        """Plain values from which the factor can be created again: ``class_path``, and ``init_args`` by name.

        Each argument is read from the attribute with the same name. It is omitted if that attribute is missing or None,
        or if it is not a string, a number, or a list or dict of these.
        """
        names = inspect.signature(type(self)).parameters
        given = {name: getattr(self, name, None) for name in names}
        plain = {name: value for name, value in given.items() if value is not None and _is_plain(value)}
        module = type(self).__module__
        if module.startswith("rlchat."):
            module = "rlchat.rewards"  # the public path, which outlives a move of the module
        return {"class_path": f"{module}.{type(self).__qualname__}", "init_args": plain}

    def to(self, device: torch.device) -> None:  # noqa: B027
        """Moves the factor's model to ``device``, that of the policy. Override it if the factor has a model."""

    def share_weights(self, policy: PolicyBundle | None) -> None:  # noqa: B027
        """Called before PPO. Override it if the factor has a model that can be an adapter of the policy's weights.

        ``policy`` is frozen and has no adapter yet. It is None if its weights cannot be shared, because PPO changes or
        shards them. A factor with shared weights belongs to one PPO module.
        """

    def unavailable(self, prompt: Conversation) -> str | None:
        """Why no response to ``prompt`` can be scored; None, the default, if it can. Training uses the score anyway."""
        return None

    def device_named(self, name: str) -> torch.device | None:
        """The device ``name``; None for ``auto``. Raises :class:`FactorError` for one that this machine lacks."""
        try:
            return None if name == "auto" else choose_device(name)
        except UserError as error:
            raise self.error(f"{error}, or auto for that of the policy") from error

    def error(self, reason: str) -> FactorError:
        """An error for the user that names this factor."""
        return FactorError(f"reward factor '{self.name}': {reason}")

    @abc.abstractmethod
    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> Tensor:
        """Unweighted scores, ``[batch]`` floats. Row i depends only on ``prompts[i]`` and ``replies[i]``."""


class ReplyFactor(Factor):
    """A factor that scores one response at a time: the simplest base class for your own factor.

    Raises (from the call):
        UserError: :meth:`score` returned something other than a real number.
    """

    @abc.abstractmethod
    def score(self, prompt: Conversation, reply: Reply) -> float:
        """The unweighted score of ``reply``, whose text may be empty."""

    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> Tensor:
        scores: list[float] = []
        for prompt, reply in zip(prompts, replies, strict=True):
            score = self.score(prompt, reply)
            if not isinstance(score, numbers.Real) and not (isinstance(score, Tensor) and score.numel() == 1):
                raise FactorError(
                    f"reward factor '{self.name}' returned {reprlib.repr(score)} for the response "
                    f"{shortened(reply.text)}: score() must return a finite number"
                )
            scores.append(float(score))
        return torch.tensor(scores, dtype=torch.float32)


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is made of strings, numbers, None, lists and dicts only, as YAML writes them."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    return value is None or isinstance(value, str | int | float)


def shortened(text: str) -> str:
    """``text`` quoted for an error message, cut after 60 characters."""
    return repr(text if len(text) <= 60 else text[:60] + "…")

"""`Verified` and `PartialCredit`: rewards for answers that can be checked."""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence

from torch import Tensor

from rlchat.conversation import Conversation
from rlchat.rewards.base import Reply, ReplyFactor, RowCount

_log = logging.getLogger("rlchat")


class Verified(ReplyFactor):
    """1 for a response that passes the check of its prompt, ``wrong`` for one that does not.

    The check comes from the data: the ``answer`` or the ``check`` of a row, see :class:`rlchat.conversation.Check`. A
    prompt without one scores 0; a warning counts them, at the first and then at each power of ten.

    Args:
        weight: of the factor.
        wrong: the score of a response that fails the check, below 1.
        expect_checks: whether every prompt should have a check; False: there is no warning.
    """

    def __init__(self, weight: float = 1.0, wrong: float = 0.0, expect_checks: bool = True) -> None:
        super().__init__(weight)
        self.wrong = wrong
        self.expect_checks = expect_checks
        self.unchecked = RowCount()

    def unavailable(self, prompt: Conversation) -> str | None:
        """A reason for prompts without a check."""
        return "the prompt has no answer to check" if prompt.check is None else None

    def score(self, prompt: Conversation, reply: Reply) -> float:
        passed = prompt.passes(reply.text)
        return 0.0 if passed is None else 1.0 if passed else self.wrong

    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> Tensor:
        without = sum(prompt.check is None for prompt in prompts)
        if self.expect_checks and self.unchecked.add(without, len(prompts)):
            _log.warning(
                "reward factor '%s': %d of %d prompts have no `answer` or `check` in the data, and their responses "
                "score 0",
                self.name,
                self.unchecked.found,
                self.unchecked.rows,
            )
        return super().__call__(prompts, replies)


class PartialCredit(ReplyFactor):
    """The share of the answer's characters that the response has at the same place, from 0 to 1.

    It tells almost right responses from wrong ones, where :class:`Verified` scores both 0. Case and white space around
    the text do not count. Let n be the number of places at which response and answer have the same character: the score
    is n divided by the length of the longer one. With several answers, the nearest counts. A response that passes the
    check scores 1. Where the answer is a number or a regular expression, any other response scores 0, and so does a
    response to a prompt without a check.

    Use it beside :class:`Verified`, with a lower weight: a response that is not correct must not be worth much.
    """

    def unavailable(self, prompt: Conversation) -> str | None:
        """A reason for prompts without a check."""
        return "the prompt has no answer to check" if prompt.check is None else None

    def score(self, prompt: Conversation, reply: Reply) -> float:
        if prompt.check is None or prompt.passes(reply.text):
            return float(prompt.check is not None)
        if prompt.check.kind in ("number", "regex"):
            return 0.0
        return max(_same_places(answer, reply.text) for answer in prompt.check.any_of)


def _same_places(answer: str, text: str) -> float:
    """The places at which both have the same character, divided by the length of the longer one.

    Example: ``abc`` and ``abd`` have two of three places in common.
    """
    answer, text = (part.strip().casefold() for part in (answer, text))
    return sum(map(operator.eq, answer, text)) / max(len(answer), len(text), 1)

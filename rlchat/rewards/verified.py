"""`Verified`: a reward for answers that can be checked."""

from __future__ import annotations

import logging
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

"""Statistics of sampled tokens that show a wrong sampler, with bounds that hold for every policy.

Both need only the log-probs and entropies of the policy that an iteration has anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlchat.ppo.rollouts import Rollout

# Above this evidence, in nats, chance is not believed any more: e⁻³⁰ is 10⁻¹³.
CERTAIN = 30.0

# Standard deviations of a sum of many small terms; chance exceeds it once in 10⁹.
MANY_DEVIATIONS = 6.0


def repetition_evidence(ids: Tensor, logprobs: Tensor, mask: Tensor, earlier: Tensor, earlier_mask: Tensor) -> float:
    """Evidence, in nats, that ``ids`` repeat the ``earlier`` tokens of the same rows more than chance allows.

    If tokens are drawn with fresh random numbers, a response begins with the first k tokens of an earlier one with a
    probability of Π p, the product of the policy's probabilities of these tokens. So the probability that a row repeats
    at least its surprisal of x nats is at most e⁻ˣ, and the sum S over n rows exceeds s > n with a probability of at
    most e^-(s - n - n·log(s / n)) (a Chernoff bound of the gamma distribution). This exponent is returned. It makes no
    assumption about the policy: a response that is certain has no surprisal, and may repeat.

    Args:
        ids: Long [B, R], the sampled tokens of B rows.
        logprobs: [B, R], under the policy that sampled them.
        mask: Bool [B, R], True where a token was sampled.
        earlier: Long [B, S], the tokens of the same rows in an earlier iteration.
        earlier_mask: Bool [B, S].
    """
    width = min(ids.shape[1], earlier.shape[1])
    same = (ids[:, :width] == earlier[:, :width]) & mask[:, :width] & earlier_mask[:, :width]
    repeated = same.long().cumprod(1).bool()  # the common prefix
    surprisal = -torch.where(repeated, logprobs[:, :width], 0.0).sum(1)
    rows, total = len(ids), float(surprisal.sum())
    return total - rows - rows * math.log(total / rows) if total > rows else 0.0


class PreviousTokens:
    """Remembers the tokens of the last rollout, to find repeated random numbers in the next one."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None  # ids Long [B, R] and mask Bool [B, R]

    def evidence(self, rollout: Rollout) -> float:
        """The larger of the :func:`repetition_evidence` of the last rollout, and of each row's neighbor."""
        mask, logprobs = rollout.response_mask, rollout.old_logprobs
        ids = torch.zeros_like(rollout.response_index).masked_scatter(mask, rollout.ids[rollout.sampled])
        found = repetition_evidence(ids[1:], logprobs[1:], mask[1:], ids[:-1], mask[:-1])
        if self._last is not None:
            rows = min(len(ids), len(self._last[0]))
            last_ids, last_mask = (x[:rows] for x in self._last)
            found = max(found, repetition_evidence(ids[:rows], logprobs[:rows], mask[:rows], last_ids, last_mask))
        self._last = (ids, mask)
        return found


@dataclass
class Surprisal:
    """Whether sampled tokens are as surprising as the policy's entropy says, over all iterations so far.

    The surprisal -log p of a sampled token is the entropy H on average. Top-k, top-p, a lower temperature or greedy
    decoding make it lower, whatever log-probs the sampler reports. The variance of the sum is estimated by the sum of
    squares. That is too small if no unlikely token has been sampled yet, so each token counts as min(8·H, 2) at least:
    then 6 deviations without a token of probability ε need so many tokens that the chance to see none is below e⁻¹⁵.
    """

    difference: float = 0.0
    """The sum of surprisal - entropy over all tokens, in nats."""
    squares: float = 0.0
    """The sum of the squares of these differences."""
    floor: float = 0.0
    """The least variance of ``difference`` that counts."""
    tokens: float = 0.0
    """Their number."""

    def add(self, logprobs: Tensor, entropy: Tensor) -> None:
        """Adds tokens, given their log-probs and entropies [tokens]."""
        differences = -logprobs - entropy
        self.difference += float(differences.sum())
        self.squares += float((differences**2).sum())
        self.floor += float((8 * entropy).clamp(max=2).sum())
        self.tokens += len(entropy)

    @property
    def mean(self) -> float:
        """The mean of surprisal - entropy, in nats per token."""
        return self.difference / max(self.tokens, 1.0)

    @property
    def deviations(self) -> float:
        """The sum in standard deviations; between -6 and 6 by chance."""
        variance = max(self.squares, self.floor)
        return self.difference / math.sqrt(variance) if variance > 0 else 0.0

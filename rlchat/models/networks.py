"""The networks: `RLChatModel`, a policy that also estimates values; `Critic`, which does that alone; `RewardModel`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlchat.models.backbones import Backbone
from rlchat.models.kv_cache import Cache

# Logits made at one time: 64 million numbers, 256 MiB. More tokens than that are taken in chunks whose logits are made
# again in the backward pass, so that no [batch · time, vocabulary] tensor exists with a vocabulary of 100,000.
_LOGITS_AT_A_TIME = 2**26

# Not -inf, so that 0 · log 0 is 0 in an entropy and never NaN; and no smaller, so that no temperature makes it -inf.
_UNSAYABLE_LOGIT = -1e30


class TokenStats(NamedTuple):
    """What the policy says of given tokens; each [tokens], float32."""

    logprobs: Tensor  # log-probability of the token, in nats
    entropy: Tensor  # of the distribution that it was drawn from, in nats
    correct: Tensor  # 1 where it was the likeliest


class RLChatModel(nn.Module):
    """A causal backbone under a policy head and a value head.

    The policy head is the embedding matrix where the backbone ties them. It gives no probability to ``unsayable`` ids
    (padding, the markers of other speakers, ids without text): sampling, training and evaluation all see that one
    distribution. The value head starts at zero: linear, or with one hidden layer of ``hidden_dim`` units.
    """

    unsayable: Tensor

    def __init__(self, backbone: Backbone, unsayable: Sequence[int] = (), hidden_dim: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.hidden_dim = hidden_dim
        self.value_head = value_head(backbone.hidden_size, hidden_dim)
        silent = torch.zeros(backbone.vocab_size, dtype=torch.bool)
        silent[list(unsayable)] = True
        self.register_buffer("unsayable", silent, persistent=False)

    def forward(self, ids: Tensor, attention_mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states [batch, time, hidden]; shapes as in :meth:`Backbone.forward`."""
        hidden: Tensor = self.backbone(ids, attention_mask, cache)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] in float32 of the token that follows each of ``hidden`` [..., hidden]."""
        logits = F.linear(hidden, self.backbone.head_weight).float()
        return logits.masked_fill(self.unsayable, _UNSAYABLE_LOGIT)

    def token_stats(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> TokenStats:
        """Of ``targets`` Long [tokens], each following ``hidden`` [tokens, hidden], at the temperature of sampling."""
        rows = max(1, _LOGITS_AT_A_TIME // self.backbone.vocab_size)
        if len(targets) <= rows:
            return self._stats(hidden, targets, temperature)
        chunks = [
            checkpoint(self._stats, h, t, temperature, use_reentrant=False)
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        return TokenStats(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))

    def _stats(self, hidden: Tensor, targets: Tensor, temperature: float) -> TokenStats:
        logprobs = (self.logits(hidden) / temperature).log_softmax(-1)
        return TokenStats(
            logprobs=logprobs.gather(-1, targets[:, None]).squeeze(-1),
            entropy=-(logprobs.exp() * logprobs).sum(-1),
            correct=(logprobs.argmax(-1) == targets).float(),
        )

    def values(self, hidden: Tensor) -> Tensor:
        """Values [...] in float32: the return expected from each of ``hidden`` [..., hidden] on."""
        values: Tensor = self.value_head(hidden).squeeze(-1).float()
        return values


class RewardModel(nn.Module):
    """A causal backbone under one scalar, read where the reply ends.

    ``mean`` and ``std`` of the scores of human replies are kept with it, so that :meth:`standardised` scores have the
    same scale whatever the training run.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.score_head = value_head(backbone.hidden_size, 0)
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("std", torch.tensor(1.0))

    def standardised(self, scores: Tensor) -> Tensor:
        """``scores`` in standard deviations above the mean human reply."""
        return (scores - self.mean) / self.std

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [batch] of right-padded conversations [batch, time], read at the last real token."""
        hidden = self.backbone(ids, attention_mask)
        last = attention_mask.long().sum(-1) - 1
        at_end = hidden[torch.arange(len(ids), device=ids.device), last]
        scores: Tensor = torch.squeeze_copy(self.score_head(at_end), -1).float()  # FSDP2 wants no view to leave here
        return scores


class Critic(nn.Module):
    """A causal backbone of its own under a value head, for a policy whose trunk is to learn nothing but words."""

    def __init__(self, backbone: Backbone, hidden_dim: int = 0) -> None:
        super().__init__()
        backbone.head = None  # an untied policy head has no part in a value, and DDP forgives no idle parameter
        self.backbone = backbone
        self.hidden_dim = hidden_dim
        self.value_head = value_head(backbone.hidden_size, hidden_dim)

    @classmethod
    def from_reward_model(cls, judge: RewardModel) -> Critic:
        """A critic that begins with the judge's standardised score of what was said so far."""
        critic, score_head = cls(judge.backbone), judge.score_head
        assert isinstance(critic.value_head, nn.Linear)
        assert isinstance(score_head, nn.Linear)
        with torch.no_grad():
            critic.value_head.weight.copy_(score_head.weight / judge.std)
            critic.value_head.bias.copy_((score_head.bias - judge.mean) / judge.std)
        return critic

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values [batch, time] in float32: the return expected after each of ``ids``, as :meth:`Backbone.forward`."""
        hidden = self.backbone(ids, attention_mask)
        values: Tensor = torch.squeeze_copy(self.value_head(hidden), -1).float()  # FSDP2 wants no view to leave here
        return values


def value_head(width: int, hidden_dim: int) -> nn.Module:
    """A head of one output that is zero at first: linear, or with a hidden layer of ``hidden_dim`` tanh units."""
    last = nn.Linear(hidden_dim or width, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, hidden_dim), nn.Tanh(), last) if hidden_dim else last

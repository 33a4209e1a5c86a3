"""The networks: `RLChatModel` (policy with a value head), `Critic` (values only) and `RewardModel`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlchat.models.backbones import Backbone
from rlchat.models.kv_cache import Cache
from rlchat.models.token_stats import (
    Head,
    TokenStats,
    float32_products,
    is_lower_precision,
    silence_,
    token_stats,
)


class RLChatModel(nn.Module):
    """A causal backbone with a policy head and a value head.

    If the backbone ties them, the policy head is the embedding matrix. ``unsayable`` ids have probability 0
    (padding, role markers, ids without text). Sampling, training and evaluation use the same distribution. The value
    head starts at zero: linear, or with one hidden layer of ``hidden_dim`` units. Logits and values are float32,
    whatever the precision of the backbone; see :func:`rlchat.models.token_stats.float32_products`.
    """

    unsayable: Tensor

    def __init__(self, backbone: Backbone, unsayable: Sequence[int] = (), hidden_dim: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.hidden_dim = hidden_dim
        self.value_head = value_head(backbone.hidden_size, hidden_dim)
        # 1 where an id is unsayable. A float tensor, because Lightning's WeightAveraging averages all buffers.
        silent = torch.zeros(backbone.vocab_size)
        silent[list(unsayable)] = 1
        self.register_buffer("unsayable", silent, persistent=False)

    def forward(self, ids: Tensor, attention_mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states [batch, time, hidden]; shapes as in :meth:`Backbone.forward`."""
        hidden: Tensor = self.backbone(ids, attention_mask, cache)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] in float32 of the token that follows each of ``hidden`` [..., hidden]."""
        logits = self.backbone.logits_form(_linear_fp32(hidden, self.backbone.head_weight, self.backbone.head_bias))
        return silence_(logits, self.unsayable.bool())

    def token_stats(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> TokenStats:
        """Statistics of ``targets`` Long [tokens], each following ``hidden`` [tokens, hidden], at ``temperature``."""
        backbone = self.backbone
        head = Head(backbone.head_weight, backbone.head_bias, backbone.logits_form, self.unsayable.bool(), temperature)
        return token_stats(hidden, targets, head)

    def sequence_logprobs(self, ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        """The log-prob [N] of each row, in nats: the sum over its tokens in ``mask``, each given those before it.

        Args:
            ids: Long [N, T].
            attention_mask: Bool [N, T].
            mask: Bool [N, T]; the first column does not count, because nothing comes before it.
        """
        hidden, targets = self(ids, attention_mask), mask[:, 1:]
        stats = self.token_stats(hidden[:, :-1][targets], ids[:, 1:][targets])
        return stats.logprobs.new_zeros(targets.shape).masked_scatter(targets, stats.logprobs).sum(1)

    def values(self, hidden: Tensor) -> Tensor:
        """Values [...] in float32: the expected return after each of ``hidden`` [..., hidden]."""
        return _head_fp32(self.value_head, hidden).squeeze(-1)


def response_log_ratios(
    policy: RLChatModel, reference: RLChatModel, prompts: tuple[Tensor, Tensor], responses: tuple[Tensor, Tensor]
) -> Tensor:
    """log π(y|x) − log π_ref(y|x) of each response [B], in nats: the sum over its tokens, its end marker included.

    For responses that were sampled from ``policy`` at temperature 1, the mean is an unbiased estimate of the KL of a
    whole response to the reference model, KL(π ‖ π_ref): the estimator k1 of Schulman (2020).

    Args:
        policy: π.
        reference: π_ref.
        prompts: Long [B, P] ids, left-padded, and Bool [B, P], False on padding.
        responses: Long [B, R] ids, right-padded, and Bool [B, R], True where a token was sampled.
    """
    ids, attention_mask = (torch.cat(parts, 1) for parts in zip(prompts, responses, strict=True))
    mask = torch.cat([torch.zeros_like(prompts[1]), responses[1]], 1)
    return policy.sequence_logprobs(ids, attention_mask, mask) - reference.sequence_logprobs(ids, attention_mask, mask)


class RewardModel(nn.Module):
    """A causal backbone with a scalar head, read at the end of the response.

    ``mean`` and ``std`` of the scores of human responses are stored with it, so that :meth:`standardised` scores have
    the same scale in every training run. Scores are computed in float32, whatever the precision of the backbone.
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
        """``scores`` in standard deviations above the mean human response."""
        return (scores - self.mean) / self.std

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [batch] of right-padded conversations [batch, time], read at the last real token."""
        hidden = self.backbone(ids, attention_mask)
        last = attention_mask.long().sum(-1) - 1
        at_end = hidden[torch.arange(len(ids), device=ids.device), last]
        return torch.squeeze_copy(_head_fp32(self.score_head, at_end), -1)  # FSDP2: forward must not return a view


class Critic(nn.Module):
    """A separate causal backbone with a value head; the policy's backbone then learns from the policy loss only."""

    def __init__(self, backbone: Backbone, hidden_dim: int = 0) -> None:
        super().__init__()
        backbone.head = None  # unused if untied, and DDP fails on parameters without gradients
        self.backbone = backbone
        self.hidden_dim = hidden_dim
        self.value_head = value_head(backbone.hidden_size, hidden_dim)

    @classmethod
    def from_reward_model(cls, reward_model: RewardModel) -> Critic:
        """A critic whose initial values are the reward model's standardized scores of the text so far."""
        critic, score_head = cls(reward_model.backbone), reward_model.score_head
        assert isinstance(critic.value_head, nn.Linear)
        assert isinstance(score_head, nn.Linear)
        with torch.no_grad():
            critic.value_head.weight.copy_(score_head.weight / reward_model.std)
            critic.value_head.bias.copy_((score_head.bias - reward_model.mean) / reward_model.std)
        return critic

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values [batch, time] in float32: the expected return after each token of ``ids``."""
        hidden = self.backbone(ids, attention_mask)
        return torch.squeeze_copy(_head_fp32(self.value_head, hidden), -1)  # FSDP2: forward must not return a view


def _linear_fp32(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden`` @ ``weight``.T + ``bias`` in float32, also under autocast."""
    with float32_products(hidden.device, is_lower_precision(weight)):
        return F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


def _head_fp32(head: nn.Module, hidden: Tensor) -> Tensor:
    """``head`` (of :func:`value_head`) applied to ``hidden`` [..., width] in float32, also under autocast: [..., 1]."""
    with torch.autocast(hidden.device.type, enabled=False):
        weight = next(head.parameters())
        if weight.dtype == torch.float32:
            output: Tensor = head(hidden.float())
        else:  # the whole model was converted to another data type
            output = head(hidden.to(weight.dtype)).float()
        return output


def value_head(width: int, hidden_dim: int) -> nn.Module:
    """A head with one output, initially zero: linear, or with a hidden layer of ``hidden_dim`` tanh units."""
    last = nn.Linear(hidden_dim or width, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, hidden_dim), nn.Tanh(), last) if hidden_dim else last

"""The losses of PPO, as pure functions of tensors, each with its source.

``mask`` is the response mask, Bool [B, R], True where a token was sampled. Every mean uses it, so that prompts,
user turns and padding do not affect any result.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

KLKind = Literal["k1", "k2", "k3"]


def masked_mean(x: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Mean of ``x`` over the tokens where ``mask`` is True; 0 where there are none.

    Args:
        x: values of any shape.
        mask: Bool, of the shape of ``x``.
        count: the divisor, if it is not the number of True entries of ``mask``. With the tokens of all processes
            divided by the number of processes, the average of the processes' gradients is the gradient of the global
            mean.
    """
    total = torch.where(mask, x, 0.0).sum()
    divisor = torch.as_tensor(mask.sum() if count is None else count, device=x.device)
    return total / torch.where(divisor > 0, divisor, 1)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind = "k1") -> Tensor:
    """Per-token estimates, in nats, of KL(policy ‖ reference) from tokens that the policy sampled.

    With d = logprobs - ref_logprobs: k1 is d, unbiased; k2 is d²/2, biased and never negative; k3 is exp(-d) - 1 + d,
    unbiased and never negative (Schulman 2020, *Approximating KL Divergence*).

    Raises:
        ValueError: for an unknown ``kind``.
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d**2 / 2
    if kind == "k3":
        # exp(-d) - 1 + d cancels for small d: in float32 it is negative at d = 1e-5. expm1 is accurate there. The
        # clamp removes a last rounding error of one unit.
        return (torch.expm1(-d) + d).clamp(min=0)
    raise ValueError(f"unknown KL estimator {kind!r}: expected k1, k2 or k3")


class PolicyLoss(NamedTuple):
    """The clipped surrogate loss and its diagnostics; scalars."""

    loss: Tensor
    clipfrac: Tensor  # fraction of tokens whose loss is the clipped term
    approx_kl: Tensor  # KL to the old policy, in nats per token: the mean of (log ratio)² / 2


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_eps: float = 0.2,
    count: Tensor | float | None = None,
    *,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """Masked mean of ``max(-A·r, -A·clip(r, 1 - ε, 1 + ε'))`` with r = exp(logprobs - old_logprobs).

    This is the clipped surrogate of Schulman et al. 2017 (arXiv 1707.06347, eq. 7), as a loss.

    Args:
        logprobs: [B, R], with gradient.
        old_logprobs: [B, R], of the policy that sampled the rollout.
        advantages: [B, R].
        mask: Bool [B, R].
        clip_eps: ε.
        count: the divisor of the mean; see :func:`masked_mean`.
        clip_eps_high: ε'; None uses ε. A higher value lets unlikely tokens gain more probability (clip-higher of DAPO,
            Yu et al. 2025).
        dual_clip: c > 1. Where A < 0, the loss of a token is at most -A·c (Ye et al. 2020). None sets no bound.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_eps, 1 + (clip_eps if clip_eps_high is None else clip_eps_high))
    loss, is_clipped = torch.maximum(plain, clipped), clipped > plain
    if dual_clip is not None:
        bound = torch.where(advantages < 0, -advantages * dual_clip, torch.inf)
        loss, is_clipped = torch.minimum(loss, bound), is_clipped | (loss > bound)
    return PolicyLoss(
        loss=masked_mean(loss, mask, count),
        clipfrac=masked_mean(is_clipped.to(plain.dtype), mask, count).detach(),
        approx_kl=masked_mean(log_ratio.detach() ** 2 / 2, mask, count),
    )


class ValueLoss(NamedTuple):
    """The clipped squared error of the critic and its diagnostic; scalars."""

    loss: Tensor
    clipfrac: Tensor  # fraction of tokens whose loss is the clipped term


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    value_clip: float = 0.2,
    count: Tensor | float | None = None,
) -> ValueLoss:
    """Half the masked mean of ``max((v - R)², (clip(v, old ± c) - R)²)`` (lm-human-preferences).

    Args:
        values: v [B, R], with gradient.
        old_values: [B, R], of the critic before the first update of this rollout.
        returns: R [B, R].
        mask: Bool [B, R].
        value_clip: c.
        count: the divisor of the mean; see :func:`masked_mean`.
    """
    clipped_values = torch.maximum(torch.minimum(values, old_values + value_clip), old_values - value_clip)
    plain, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    return ValueLoss(
        loss=0.5 * masked_mean(torch.maximum(plain, clipped), mask, count),
        clipfrac=masked_mean((clipped > plain).to(plain.dtype), mask, count).detach(),
    )


class AdaptiveKL:
    """A KL coefficient that adapts to reach a target KL, in nats per response (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, initial: float, target: float, horizon: int) -> None:
        self.coef = initial
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, episodes: int) -> float:
        """Returns the new coefficient.

        Args:
            kl: mean KL of the latest episodes, in nats per response.
            episodes: the number of these episodes.
        """
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * episodes / self.horizon
        return self.coef

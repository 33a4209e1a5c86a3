"""The formulas of PPO, as pure functions of tensors, each with its source; the loop is in :mod:`rlchat.ppo.module`.

``mask`` is Bool [B, R] and True where a token was sampled; every mean, whitening and loss goes through it, so that
padding and the words of users change no number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

KLKind = Literal["k1", "k2", "k3"]
Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


def masked_mean(x: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Mean of ``x`` where ``mask`` is True; 0 where it never is.

    ``count`` replaces the number of masked-in values: with all processes' tokens divided by the number of processes,
    the mean of the processes' gradients is the gradient of the global mean.
    """
    total = torch.where(mask, x, 0.0).sum()
    divisor = torch.as_tensor(mask.sum() if count is None else count, device=x.device)
    return total / torch.where(divisor > 0, divisor, 1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Reduce = lambda t: t) -> Tensor:
    """``(x - μ) / sqrt(σ² + 1e-8)`` over the mask, 0 outside of it; σ² is the biased variance.

    ``shift_mean=False`` adds μ back: only the scale changes (lm-human-preferences).
    """
    keep = mask.to(x.dtype)
    count = reduce(keep.sum()).clamp(min=1)
    mean = reduce((x * keep).sum()) / count
    variance = reduce(((x - mean) ** 2 * keep).sum()) / count
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (white if shift_mean else white + mean) * keep


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind = "k1") -> Tensor:
    """Per-token estimates of KL(policy ‖ reference) from sampled tokens (Schulman, *Approximating KL Divergence*).

    With d = logprobs - ref_logprobs: k1 is d, unbiased; k2 is d²/2, biased, never negative; k3 is exp(-d) - 1 + d,
    unbiased and never negative.
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d**2 / 2
    if kind == "k3":
        return torch.exp(-d) - 1 + d
    raise ValueError(f"unknown KL estimator {kind!r}; choose k1, k2 or k3")


def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float, kind: KLKind = "k1"
) -> Tensor:
    """Per-token rewards [B, R]: ``-kl_coef · KL`` on each sampled token, the score [B] on the last (InstructGPT).

    The score belongs on one token: put on every token, it would pay for length. Scores [B, R] are placed already, see
    :func:`place_scores`.
    """
    rewards = -kl_coef * kl_estimate(logprobs, ref_logprobs, kind) * mask
    placed = place_scores(scores, torch.where(mask, row_numbers(mask), -1)) if scores.ndim == 1 else scores
    return rewards + placed.to(rewards.dtype)


def row_numbers(mask: Tensor) -> Tensor:
    """Long, of the shape of ``mask`` [B, R]: 0 all over the first row, 1 over the second, and so on."""
    return torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)


def place_scores(scores: Tensor, reply_of: Tensor) -> Tensor:
    """The score [N] of each reply on its last token, 0 on all others: [B, R].

    ``reply_of`` Long [B, R] says which reply a token belongs to, -1 where it belongs to none.
    """
    flat = reply_of.flatten()
    places = torch.arange(len(flat), device=flat.device)
    said = flat >= 0
    last = torch.full((len(scores),), -1, device=flat.device).scatter_reduce(0, flat[said], places[said], "amax")
    spoken = last >= 0
    placed = torch.zeros(len(flat), dtype=scores.dtype, device=flat.device)
    return placed.scatter(0, last[spoken], scores[spoken]).view_as(reply_of)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, R], 0 outside the mask (generalized advantage estimation, Schulman et al. 2015).

    δ = r + γ·V_next - V and A = δ + γλ·A_next, where *next* is the next masked-in token, whatever lies between (another
    speaker's turn), and the value after the last is 0. The returns are A + V.
    """
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(here, advantage, 0.0)
        next_value = torch.where(here, values[:, t], next_value)
        next_advantage = torch.where(here, advantage, next_advantage)
    return advantages, torch.where(mask, advantages + values, 0.0)


def rloo(scores: Tensor, group_size: int) -> Tensor:
    """REINFORCE leave-one-out: each score [B] less the mean of the others of its group (Ahmadian et al. 2024).

    Rows i·group_size … (i + 1)·group_size - 1 reply to one prompt (Kool et al. 2019 for the estimator).
    """
    groups = scores.view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def grpo(scores: Tensor, group_size: int) -> Tensor:
    """Scores [B] standardised within their group of replies to one prompt (Shao et al. 2024, DeepSeekMath, 4.1.2).

    The deviation is the sample's; 1e-4 beside it keeps a group of equal scores at zero.
    """
    groups = scores.view(-1, group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


class PolicyLoss(NamedTuple):
    """The clipped surrogate and what one watches beside it; scalars."""

    loss: Tensor
    clipfrac: Tensor  # share of tokens on which a clip decides
    approx_kl: Tensor  # to the old policy: mean of (log ratio)² / 2


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
    """Masked mean of ``max(-A·r, -A·clip(r, 1 - ε, 1 + ε'))`` with r = exp(logprobs - old) (Schulman et al. 2017).

    ε' is ``clip_eps_high``, or ε: a higher one lets unlikely tokens rise further (clip-higher of DAPO, Yu et al. 2025).
    ``dual_clip`` c > 1 bounds what a bad token can cost when it has become likely: where A < 0, the loss is at most
    -A·c (Ye et al. 2020).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_eps, 1 + (clip_eps if clip_eps_high is None else clip_eps_high))
    loss, decided = torch.maximum(plain, clipped), clipped > plain
    if dual_clip is not None:
        bound = torch.where(advantages < 0, -advantages * dual_clip, torch.inf)
        loss, decided = torch.minimum(loss, bound), decided | (loss > bound)
    return PolicyLoss(
        loss=masked_mean(loss, mask, count),
        clipfrac=masked_mean(decided.to(plain.dtype), mask, count).detach(),
        approx_kl=masked_mean(log_ratio.detach() ** 2 / 2, mask, count),
    )


class ValueLoss(NamedTuple):
    """The clipped squared error of the critic; scalars."""

    loss: Tensor
    clipfrac: Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    value_clip: float = 0.2,
    count: Tensor | float | None = None,
) -> ValueLoss:
    """Half the masked mean of ``max((v - R)², (clip(v, old ± c) - R)²)`` (lm-human-preferences)."""
    clipped_values = torch.maximum(torch.minimum(values, old_values + value_clip), old_values - value_clip)
    plain, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    return ValueLoss(
        loss=0.5 * masked_mean(torch.maximum(plain, clipped), mask, count),
        clipfrac=masked_mean((clipped > plain).to(plain.dtype), mask, count).detach(),
    )


class AdaptiveKL:
    """A KL coefficient that is steered towards a target in nats per reply (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, initial: float, target: float, horizon: int) -> None:
        self.coef = initial
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, episodes: int) -> float:
        """The new coefficient, after ``episodes`` replies whose mean KL was ``kl``."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * episodes / self.horizon
        return self.coef

"""Rewards and advantages of PPO, as pure functions of tensors, and the registry of advantage estimators.

``mask`` is the response mask, Bool [B, R], True where a token was sampled. Every mean uses it, so that prompts,
user turns and padding do not affect any result.

To add an estimator, write one function at the end of this file and decorate it with :func:`advantage_estimator`. The
option ``--model.advantage``, its checks and its error messages follow from the registry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlchat.ppo.losses import KLKind, kl_estimate

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Reduce = lambda t: t) -> Tensor:
    """``(x - μ) / sqrt(σ² + 1e-8)`` inside the mask, 0 outside, whatever the values of ``x`` there (even NaN).

    Args:
        x: values of any shape.
        mask: Bool, same shape as ``x``; μ and σ² (the biased variance) are computed over the entries where it is True.
        shift_mean: False adds μ back, so that only the scale changes (lm-human-preferences).
        reduce: sums over all processes, so that μ and σ² are global.
    """
    count = reduce(mask.to(x.dtype).sum()).clamp(min=1)
    mean = reduce(torch.where(mask, x, 0.0).sum()) / count
    centered = torch.where(mask, x - mean, 0.0)
    variance = reduce((centered**2).sum()) / count
    white = centered * torch.rsqrt(variance + 1e-8)
    # If all values are equal, ``centered`` is the rounding error of the mean, which must not be divided by 1e-4.
    is_rounding = variance.sqrt() <= 16 * torch.finfo(x.dtype).eps * mean.abs()
    white = torch.where(is_rounding, 0.0, white)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)


def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float, kind: KLKind = "k1"
) -> Tensor:
    """Per-token rewards [B, R]: ``-kl_coef · KL`` on each sampled token, plus the score on the last one (InstructGPT).

    The score is added to one token only. On every token, it would reward length.

    Args:
        scores: [B], one for the response in each row; or [B, R], already placed by :func:`place_scores`.
        logprobs: [B, R], of the policy that sampled.
        ref_logprobs: [B, R], of the reference model.
        mask: Bool [B, R].
        kl_coef: the KL coefficient β.
        kind: the KL estimator; see :func:`~rlchat.ppo.losses.kl_estimate`.
    """
    rewards = -kl_coef * kl_estimate(logprobs, ref_logprobs, kind) * mask
    placed = place_scores(scores, torch.where(mask, row_numbers(mask), -1)) if scores.ndim == 1 else scores
    return rewards + placed.to(rewards.dtype)


def row_numbers(mask: Tensor) -> Tensor:
    """Long, of the shape of ``mask`` [B, R]: row i is filled with i."""
    return torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)


def place_scores(scores: Tensor, response_index: Tensor) -> Tensor:
    """Puts the score [N] of each response on its last token; returns [B, R], 0 on all other tokens.

    Args:
        scores: [N].
        response_index: Long [B, R], the number (0 to N - 1) of the response that a token belongs to; -1 where the token
            was not sampled.

    Example: scores (1, 2, 4) and response_index [[0, 0, -1, 2, 2], [1, 1, 1, -1, -1]] give
    [[0, 1, 0, 0, 4], [0, 0, 2, 0, 0]].
    """
    flat = response_index.flatten()
    positions = torch.arange(len(flat), device=flat.device)
    sampled = flat >= 0
    last = torch.full((len(scores),), -1, device=flat.device).scatter_reduce(
        0, flat[sampled], positions[sampled], "amax"
    )
    present = last >= 0
    placed = torch.zeros(len(flat), dtype=scores.dtype, device=flat.device)
    return placed.scatter(0, last[present], scores[present]).view_as(response_index)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, R], 0 outside the mask (generalized advantage estimation, Schulman et al. 2015).

    δ = r + γ·V_next - V and A = δ + γλ·A_next. *Next* is the next token inside the mask, even after a gap (a user
    turn). After the last token, V_next and A_next are 0. The returns are A + V.

    Args:
        rewards: r [B, R].
        values: V [B, R], the critic's estimate before each token.
        mask: Bool [B, R].
        gamma: γ, the discount per token.
        lam: λ.
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
    """REINFORCE leave-one-out [B]: each score minus the mean of the other scores of its group (Ahmadian et al. 2024).

    Equal scores give exactly 0.

    Args:
        scores: [B]; rows i·group_size … (i + 1)·group_size - 1 are responses to one prompt.
        group_size: 2 or more.

    Raises:
        ValueError: if group_size is less than 2.
    """
    groups = _shifted_groups(scores, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def grpo(scores: Tensor, group_size: int) -> Tensor:
    """Scores [B] standardized within their group (Shao et al. 2024, DeepSeekMath, section 4.1.2).

    The divisor is the sample standard deviation plus 1e-4. Equal scores give exactly 0.

    Args:
        scores: [B]; rows i·group_size … (i + 1)·group_size - 1 are responses to one prompt.
        group_size: 2 or more.

    Raises:
        ValueError: if group_size is less than 2.
    """
    groups = _shifted_groups(scores, group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def _shifted_groups(scores: Tensor, group_size: int) -> Tensor:
    """Scores [groups, group_size] minus the first score of their group.

    Adding a constant to all scores of a group does not change the advantages. Without the shift, the mean of n equal
    floats can differ from them by a rounding error, which a division by the standard deviation would amplify.
    """
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}: expected 2 or more responses to each prompt")
    groups = scores.view(-1, group_size)
    return groups - groups[:, :1]


def reinforce_pp(rewards: Tensor, mask: Tensor, gamma: float = 1.0, reduce: Reduce = lambda t: t) -> Tensor:
    """REINFORCE++ [B, R]: the discounted rewards to go of each token, whitened over the batch (Hu 2025).

    Source: arXiv 2501.03262, *REINFORCE++*, without a baseline, as in ``reinforce`` of OpenRLHF and
    ``reinforce_plus_plus`` of verl. G_t = r_t + γ·G_next, where *next* is the next token inside the mask, and
    A = (G - mean G) / std G over all tokens of the batch; 0 outside the mask.

    Args:
        rewards: r [B, R], which include the KL penalty of each token.
        mask: Bool [B, R].
        gamma: γ, the discount per token.
        reduce: sums over all processes, so that mean and variance are global.
    """
    to_go, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)  # without values, λ = 1 leaves G
    return masked_whiten(to_go, mask, reduce=reduce)


# ---- the registry ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EstimatorInputs:
    """The inputs of an advantage estimator."""

    rewards: Tensor  # [B, R] per-token rewards, 0 outside the mask
    values: Tensor  # [B, R] of the critic; 0 without one
    mask: Tensor  # Bool [B, R] the response mask
    group_size: int  # rows i·group_size … (i + 1)·group_size - 1 are responses to one prompt
    gamma: float  # discount per token
    lam: float  # λ of GAE
    reduce: Reduce  # sums a tensor over all processes
    lam_critic: float | None = None  # λ of the critic's returns; None: the same


class Advantages(NamedTuple):
    """Targets of the policy and the critic; [B, R], 0 outside the mask."""

    advantages: Tensor
    returns: Tensor  # 0 without a critic


@dataclass(frozen=True, slots=True)
class AdvantageEstimator:
    """A registered estimator and its requirements for the other options."""

    name: str
    compute: Callable[[EstimatorInputs], Advantages]
    needs_critic: bool
    needs_group: bool  # group_size must be 2 or more
    allows_turns: bool  # several responses per row
    allows_whiten_rewards: bool


ESTIMATORS: dict[str, AdvantageEstimator] = {}
"""All advantage estimators, by their name in ``--model.advantage``."""


def advantage_estimator(
    name: str,
    *,
    needs_critic: bool = False,
    needs_group: bool = False,
    allows_turns: bool = False,
    allows_whiten_rewards: bool = False,
) -> Callable[[Callable[[EstimatorInputs], Advantages]], Callable[[EstimatorInputs], Advantages]]:
    """Registers the decorated function as the advantage estimator ``name``.

    With ``needs_critic`` it gets values, and the critic is trained on its returns. ``needs_group`` requires
    ``group_size`` of 2 or more. ``allows_turns`` is for estimators that handle several responses in one row;
    ``allows_whiten_rewards`` is for those that do not sum the rewards of a response. An estimator can whiten its
    advantages with :func:`masked_whiten`; nothing else whitens them.

    Raises (from the decorator):
        ValueError: the name is already registered.
    """

    def register(compute: Callable[[EstimatorInputs], Advantages]) -> Callable[[EstimatorInputs], Advantages]:
        if name in ESTIMATORS:
            raise ValueError(f"the advantage estimator {name!r} is registered already")
        ESTIMATORS[name] = AdvantageEstimator(
            name, compute, needs_critic, needs_group, allows_turns, allows_whiten_rewards
        )
        return compute

    return register


@advantage_estimator("gae", needs_critic=True, allows_turns=True, allows_whiten_rewards=True)
def _gae_estimator(inputs: EstimatorInputs) -> Advantages:
    tokens = (inputs.rewards, inputs.values, inputs.mask, inputs.gamma)
    advantages, returns = gae(*tokens, inputs.lam)
    if inputs.lam_critic is not None:  # decoupled GAE: VC-PPO (Yuan et al. 2025) and VAPO (Yue et al. 2025)
        _, returns = gae(*tokens, inputs.lam_critic)
    return Advantages(masked_whiten(advantages, inputs.mask, reduce=inputs.reduce), returns)


# Of rloo and grpo, the return of a response is the sum of its rewards, and each of its tokens gets the same advantage.
# They support neither turns (a row would have several responses) nor whitened rewards (whitening adds a
# constant to each token, so the sum would depend on the length).
@advantage_estimator("rloo", needs_group=True)
def _rloo_estimator(inputs: EstimatorInputs) -> Advantages:
    advantages = rloo(inputs.rewards.sum(1), inputs.group_size)[:, None] * inputs.mask
    return Advantages(advantages, torch.zeros_like(advantages))


@advantage_estimator("grpo", needs_group=True)
def _grpo_estimator(inputs: EstimatorInputs) -> Advantages:
    advantages = grpo(inputs.rewards.sum(1), inputs.group_size)[:, None] * inputs.mask
    return Advantages(advantages, torch.zeros_like(advantages))


# Whitened rewards are not supported: whitening adds a constant to each token, so the rewards to go would depend on the
# number of tokens that follow.
@advantage_estimator("reinforce_pp", allows_turns=True)
def _reinforce_pp_estimator(inputs: EstimatorInputs) -> Advantages:
    advantages = reinforce_pp(inputs.rewards, inputs.mask, inputs.gamma, inputs.reduce)
    return Advantages(advantages, torch.zeros_like(advantages))

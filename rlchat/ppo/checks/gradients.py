"""Compares the gradient of the PPO loss with its formula, in every backward pass.

The formulas are derived by hand, so they do not share a mistake with :mod:`rlchat.ppo.losses`. They are elementwise on
[B, R], where a network's pass is [B, T, hidden] and more: the check takes no measurable time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlchat.distributed.collectives import gather_objects
from rlchat.ppo.losses import KLKind

if TYPE_CHECKING:
    from rlchat.ppo.module import Iteration, PPOModule
    from rlchat.ppo.rollouts import TokenEvaluation

# Tokens nearer than this to a bound are left out: rounding decides which side of a bound they are on.
_NEAR = 1e-5

# Errors are relative to the gradient of an advantage of this size if all advantages are smaller.
_SMALLEST = 1e-3


def policy_gradient(
    ratio: Tensor, advantages: Tensor, clip_eps: float, clip_eps_high: float | None, dual_clip: float | None
) -> Tensor:
    """The derivative of the clipped surrogate loss of each token with respect to its log-prob; of any shape.

    It is -A·r, or 0 where the ratio r has left the clip range in the direction that the advantage A rewards, and where
    the dual clip bounds the loss. NaN within rounding of a bound, where it is undefined.
    """
    high = 1 + (clip_eps if clip_eps_high is None else clip_eps_high)
    low = 1 - clip_eps
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    near = ((ratio - high).abs() < _NEAR) | ((ratio - low).abs() < _NEAR)
    if dual_clip is not None:
        clipped = clipped | ((advantages < 0) & (ratio > dual_clip))
        near = near | ((ratio - dual_clip).abs() < _NEAR)
    return torch.where(clipped, 0.0, -advantages * ratio).masked_fill(near, torch.nan)


def value_gradient(values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float) -> Tensor:
    """The derivative of half the clipped squared error of each token with respect to its value v; of any shape.

    It is v - R, or 0 where v has moved by more than the clip range c towards the return R, but not past it by more than
    the clipped value is away. NaN within rounding of a bound, where it is undefined.
    """
    moved = values - old_values
    clipped_values = old_values + moved.clamp(-value_clip, value_clip)
    plain, clipped = (values - returns).abs(), (clipped_values - returns).abs()
    outside = moved.abs() > value_clip
    tie = outside & ((plain - clipped).abs() < _NEAR * (1 + plain))
    near = ((moved.abs() - value_clip).abs() < _NEAR * (1 + values.abs())) | tie
    return torch.where(outside & (clipped > plain), 0.0, values - returns).masked_fill(near, torch.nan)


def kl_gradient(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind) -> Tensor:
    """The derivative of the KL estimator of each token with respect to its log-prob; of any shape."""
    d = logprobs - ref_logprobs
    return {"k1": torch.ones_like(d), "k2": d, "k3": 1 - (-d).exp()}[kind]


def gradient_error(found: Tensor, expected: Tensor, mask: Tensor, scale: Tensor | float) -> Tensor:
    """Scalar: the norm of ``found - expected`` relative to that of ``expected``, over tokens where that is not NaN.

    Args:
        found: [B, R].
        expected: [B, R], outside of ``mask`` any value: the gradient must be 0 there.
        mask: Bool [B, R].
        scale: the gradient of a term of 1, to which an error is compared if ``expected`` is almost 0.
    """
    expected = torch.where(mask, expected, 0.0)
    known = ~expected.isnan()
    error = torch.where(known, found - expected, 0.0).norm()
    return error / (torch.where(known, expected, 0.0).norm() + _SMALLEST * scale * mask.sum().sqrt() + 1e-30)


class GradientCheck:
    """The largest error of the gradients of an update, from hooks on the outputs of the policy and the critic."""

    def __init__(self) -> None:
        self._largest: Tensor | float = 0.0

    def pop(self) -> float:
        """The largest error on any process since the last call. A collective."""
        largest, self._largest = float(self._largest), 0.0
        return max(gather_objects(largest))

    def watch(
        self, module: PPOModule, new: TokenEvaluation, iteration: Iteration, rows: Tensor, mask: Tensor, tokens: Tensor
    ) -> None:
        """Compares the gradients that the next backward pass computes for ``new``, the evaluation of ``rows``.

        Args:
            module: the module, with the options of the loss.
            new: log-probs, entropies and values [rows, R] with a graph.
            iteration: the rollout and its targets.
            rows: Long [rows], of the rollout.
            mask: Bool [rows, R].
            tokens: the divisor of the loss.
        """
        if not new.logprobs.requires_grad:
            return
        o, rollout = module.options, iteration.rollout
        logprobs = new.logprobs.detach()
        ratio = torch.where(mask, logprobs - rollout.old_logprobs[rows], 0.0).exp()
        policy = policy_gradient(ratio, iteration.advantages[rows], o.clip_eps, o.clip_eps_high, o.dual_clip)
        if o.kl_in == "loss":
            policy = policy + module.kl_coef * kl_gradient(logprobs, rollout.ref_logprobs[rows], o.kl_estimator)
        expected = [(new.logprobs, policy), (new.entropy, torch.full_like(policy, -o.entropy_coef))]
        if module.critic_kind != "none":
            old, returns = rollout.values[rows], iteration.returns[rows]
            value = value_gradient(new.values.detach(), old, returns, o.value_clip)
            expected.append((new.values, o.value_coef * value))
        scale = _loss_scale(module) / tokens
        for output, gradient in expected:
            if output.requires_grad:
                output.register_hook(self._comparison(gradient * scale, mask, scale))

    def _comparison(self, expected: Tensor, mask: Tensor, scale: Tensor) -> Callable[[Tensor], None]:
        def compare(found: Tensor) -> None:
            # A gradient that is not finite is left to the guard, which skips the step.
            error = gradient_error(found, expected, mask, scale)
            error = torch.where(found.isfinite().all(), error, 0.0)
            self._largest = torch.maximum(torch.as_tensor(self._largest, device=error.device), error)

        return compare


def _loss_scale(module: PPOModule) -> float:
    """The factor by which Lightning multiplies the loss before a backward pass, in fp16; otherwise 1."""
    scaler = getattr(getattr(module.trainer, "precision_plugin", None), "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())

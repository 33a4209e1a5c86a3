"""The invariants of PPO: what holds in every iteration of a correct run, whatever the data, the reward and the options.

:meth:`InvariantChecks.residuals` measures how far each is from holding, and :data:`INVARIANTS` says what is wrong and
where if one does not. All numbers come from what an iteration has computed anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from rlchat.distributed.collectives import gather_objects, is_sharded
from rlchat.models.sampling import Generated
from rlchat.models.token_stats import is_lower_precision
from rlchat.ppo.advantages import gae, masked_whiten
from rlchat.ppo.checks.residuals import (
    broken_responses,
    fingerprint,
    group_residual,
    largest,
    return_residual,
    reward_residual,
    shared_parameters,
    whitening_residual,
)
from rlchat.ppo.losses import kl_estimate

if TYPE_CHECKING:
    from rlchat.ppo.module import Iteration, PPOModule

# Residuals of arithmetic in float32, and of networks that compute in bfloat16, in TF32 or on a GPU.
_ROUNDING, _LOW_PRECISION = 1e-3, 0.2

# The number of responses whose text is compared with their tokens.
_DECODED = 4


class Invariant(NamedTuple):
    """An invariant: what is wrong where if it does not hold, and what to do."""

    broken: str
    fix: str


INVARIANTS = {
    "sampling": Invariant(
        "the log-probs of sampling are not those of the policy on the same tokens (sampling_residual), in sample() or "
        "evaluate_tokens()",
        "compare positions, temperature, truncation (top-k, top-p), dropout and the shift of the logits by one token",
    ),
    "ratio": Invariant(
        "the ratio is not 1 before the first optimizer step (ratio_residual), in evaluate_transcript() or "
        "minibatch_loss()",
        "compute old log-probs without dropout, with the same weights, rows and temperature as in the update",
    ),
    "value": Invariant(
        "the critic's values before the first optimizer step are not those of the rollout (value_residual), in "
        "evaluate_transcript() or minibatch_loss()",
        "index the values with the rows of the minibatch",
    ),
    "reference": Invariant(
        "the KL to the reference model is not 0 in the first iteration, in evaluate_transcript()",
        "evaluate policy and reference model alike, and start both from the same weights",
    ),
    "frozen reference": Invariant(
        "the weights of the reference model have changed, or are in the memory of weights that are trained",
        "copy the reference model before training, and never write to it",
    ),
    "responses": Invariant(
        "sampled tokens and response_mask do not match the responses, in to_transcript() or pack(): each has its own "
        "tokens, and the end token at its end if it ended, and nowhere else",
        "check the mask for an offset of one, for prompt tokens and for padding",
    ),
    "scores": Invariant(
        "the scores are not the sums of the reward factors, in training_step()",
        "pass the scores on unchanged and in the same order",
    ),
    "rewards": Invariant(
        "the per-token rewards are not -kl_coef times the KL, plus the score on the last token of each response, in "
        "token_rewards()",
        "check the sign and the estimator of the KL, where the score is placed, and that nothing scales it",
    ),
    "returns": Invariant(
        "the returns do not follow from rewards and values by the recursion of GAE, in gae()",
        "use no value and no advantage after the end of a response, and the discounts γ and γλ",
    ),
    "advantages": Invariant(
        "the advantages are not centered and scaled as the estimator defines, in compute_advantages()",
        "compute the mean and the variance over sampled tokens only, and set the rest to 0",
    ),
    "gradient": Invariant(
        "the gradient of the loss is not that of the clipped surrogate, the value loss, the entropy bonus and the KL "
        "penalty (gradient_residual), in minibatch_loss()",
        "check signs, clipping, masks and divisors, and that old log-probs, advantages and returns carry no gradient",
    ),
    "kl_coef": Invariant(
        "kl_coef has moved away from where the KL would reach kl_target, in AdaptiveKL.update()",
        "raise the coefficient if the KL is above its target",
    ),
}
"""All invariants, by name."""


def is_precise(module: PPOModule) -> bool:
    """Whether networks compute in float32 or float64 on a CPU, so that two ways of computing hardly differ."""
    precision = str(getattr(module.trainer, "precision", "32-true"))
    exact = module.device.type == "cpu" and precision in ("32-true", "64-true")
    return exact and not is_lower_precision(module.model.backbone.head_weight)


def rounding(module: PPOModule) -> float:
    """The largest residual that rounding explains when a network computes the same numbers in two ways."""
    return _ROUNDING if is_precise(module) else _LOW_PRECISION


class InvariantChecks:
    """Measures the invariants of each iteration, and remembers what must not change between iterations."""

    def __init__(self) -> None:
        self._reference: list[int] | None = None  # None if the networks are sharded

    def start(self, module: PPOModule) -> None:
        """Remembers the reference model, before the first iteration of the run or of the resumed run."""
        # Sharded parameters are whole after some forward passes, in memory that passes share.
        self._reference = None if is_sharded(module.reference) else fingerprint(module.reference)

    def broken(self, module: PPOModule, iteration: Iteration, metrics: Mapping[str, float]) -> list[str]:
        """The names of the invariants that do not hold, on any process. A collective.

        Args:
            module: the module after the iteration.
            iteration: what the iteration has computed.
            metrics: its logged metrics, by name without ``train/``.
        """
        residuals = self.residuals(module, iteration, metrics)
        limits = {"ratio", "value", "reference", "sampling", "gradient"}
        mine = [
            name
            for name, residual in residuals.items()
            if not residual <= (rounding(module) if name in limits else _ROUNDING)  # also if it is NaN
        ]
        everyone = {name for part in gather_objects(mine) for name in part}
        return [name for name in INVARIANTS if name in everyone]

    def residuals(self, module: PPOModule, iteration: Iteration, metrics: Mapping[str, float]) -> dict[str, float]:
        """How far each invariant that applies is from holding on this process, by name; see :meth:`broken`."""
        return {
            **self._of_networks(module, iteration, metrics),
            **self._of_responses(module, iteration),
            **self._of_targets(module, iteration, metrics),
        }

    def _of_networks(self, module: PPOModule, iteration: Iteration, metrics: Mapping[str, float]) -> dict[str, float]:
        rollout = iteration.rollout
        measured = {"ratio": "ratio_residual", "gradient": "gradient_residual"}  # a user's update may lack some
        residuals = {name: metrics[metric] for name, metric in measured.items() if metric in metrics}
        if self._reference is not None:
            changed = float(fingerprint(module.reference) != self._reference)
            residuals["frozen reference"] = changed + shared_parameters(module.model, module.reference)
        if "value_residual" in metrics:
            residuals["value"] = metrics["value_residual"] / max(1.0, largest(rollout.values))
        if module.options.rollout_engine == "rlchat":  # another engine may round differently; there is an alarm
            residuals["sampling"] = metrics["sampling_residual"]
        if module.iterations == 1:
            difference = (rollout.old_logprobs - rollout.ref_logprobs)[rollout.response_mask]
            residuals["reference"] = float(difference.abs().mean()) if len(difference) else 0.0
        return residuals

    def _of_responses(self, module: PPOModule, iteration: Iteration) -> dict[str, float]:
        rollout = iteration.rollout
        tokens, numbers = rollout.ids[rollout.sampled], rollout.response_index[rollout.response_mask]
        lengths, ended = ([getattr(reply, name) for reply in rollout.replies] for name in ("tokens", "ended"))
        limit = module.options.max_new_tokens
        broken = broken_responses(tokens, numbers, lengths, ended, module.tokenizer.end_id, limit)
        for number in range(0 if broken else min(_DECODED, len(lengths))):
            ids = tokens[numbers == number][None]
            said = Generated(ids, torch.ones_like(ids).bool(), torch.tensor([ended[number]]), torch.zeros(ids.shape))
            broken += module.decode(said)[0].text != rollout.replies[number].text
        return {"responses": broken}

    def _of_targets(self, module: PPOModule, iteration: Iteration, metrics: Mapping[str, float]) -> dict[str, float]:
        o, rollout, mask = module.options, iteration.rollout, iteration.rollout.response_mask
        rewards, advantages, values = iteration.rewards, iteration.advantages, rollout.values
        total = sum(factor.to(iteration.scores.device) for factor in iteration.factors.values())
        coef = metrics["kl_coef"] if o.kl_in == "reward" else 0.0
        kl = kl_estimate(rollout.old_logprobs, rollout.ref_logprobs, o.kl_estimator)
        residuals = {
            "scores": largest(iteration.scores - total) / max(1.0, largest(iteration.scores)),
            "rewards": reward_residual(rewards, iteration.scores, kl, rollout.response_index, coef),
        }
        if o.advantage == "gae":
            if o.whiten_rewards:
                rewards = masked_whiten(rewards, mask, shift_mean=False, reduce=module.global_sum)
            lam = o.lam if o.lam_critic is None else o.lam_critic
            residuals["returns"] = return_residual(iteration.returns, values, rewards, mask, o.gamma, lam)
            raw = iteration.returns - values if lam == o.lam else gae(rewards, values, mask, o.gamma, o.lam)[0]
            residuals["advantages"] = whitening_residual(advantages, raw, mask, module.global_sum)
        elif o.advantage == "reinforce_pp":
            raw, _ = gae(rewards, torch.zeros_like(rewards), mask, o.gamma, lam=1.0)  # rewards to go
            residuals["advantages"] = whitening_residual(advantages, raw, mask, module.global_sum)
        elif o.advantage in ("rloo", "grpo"):
            residuals["advantages"] = group_residual(advantages, mask, o.group_size)
        if o.kl_target is not None and module.iterations > o.critic_warmup:
            step, error = module.kl_coef - metrics["kl_coef"], metrics["kl"] - o.kl_target
            moved = abs(step) > 1e-6 * module.kl_coef  # metrics are logged in float32
            residuals["kl_coef"] = float(moved and step * error < 0)
        return residuals

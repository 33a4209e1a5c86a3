"""PPO on a language model: options, rollouts, advantages, losses and the loop around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlchat.utils.imports import lazy_exports

if TYPE_CHECKING:
    from rlchat.ppo.formulas import AdaptiveKL as AdaptiveKL
    from rlchat.ppo.formulas import gae as gae
    from rlchat.ppo.formulas import grpo as grpo
    from rlchat.ppo.formulas import kl_estimate as kl_estimate
    from rlchat.ppo.formulas import masked_mean as masked_mean
    from rlchat.ppo.formulas import masked_whiten as masked_whiten
    from rlchat.ppo.formulas import place_scores as place_scores
    from rlchat.ppo.formulas import policy_loss as policy_loss
    from rlchat.ppo.formulas import rloo as rloo
    from rlchat.ppo.formulas import shape_rewards as shape_rewards
    from rlchat.ppo.formulas import value_loss as value_loss
    from rlchat.ppo.module import PPOModule as PPOModule
    from rlchat.ppo.rollouts import Rollout as Rollout

__all__ = [
    "AdaptiveKL",
    "PPOModule",
    "Rollout",
    "gae",
    "grpo",
    "kl_estimate",
    "masked_mean",
    "masked_whiten",
    "place_scores",
    "policy_loss",
    "rloo",
    "shape_rewards",
    "value_loss",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "AdaptiveKL": "rlchat.ppo.formulas",
        "PPOModule": "rlchat.ppo.module",
        "Rollout": "rlchat.ppo.rollouts",
        "gae": "rlchat.ppo.formulas",
        "grpo": "rlchat.ppo.formulas",
        "kl_estimate": "rlchat.ppo.formulas",
        "masked_mean": "rlchat.ppo.formulas",
        "masked_whiten": "rlchat.ppo.formulas",
        "place_scores": "rlchat.ppo.formulas",
        "policy_loss": "rlchat.ppo.formulas",
        "rloo": "rlchat.ppo.formulas",
        "shape_rewards": "rlchat.ppo.formulas",
        "value_loss": "rlchat.ppo.formulas",
    },
)

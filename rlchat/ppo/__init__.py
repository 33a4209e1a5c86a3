"""PPO on a language model: options, rollouts, advantages, losses and the loop around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlchat.utils.imports import lazy_exports

if TYPE_CHECKING:
    from rlchat.ppo.advantages import advantage_estimator as advantage_estimator
    from rlchat.ppo.advantages import gae as gae
    from rlchat.ppo.advantages import grpo as grpo
    from rlchat.ppo.advantages import masked_whiten as masked_whiten
    from rlchat.ppo.advantages import place_scores as place_scores
    from rlchat.ppo.advantages import reinforce_pp as reinforce_pp
    from rlchat.ppo.advantages import rloo as rloo
    from rlchat.ppo.advantages import shape_rewards as shape_rewards
    from rlchat.ppo.losses import AdaptiveKL as AdaptiveKL
    from rlchat.ppo.losses import kl_estimate as kl_estimate
    from rlchat.ppo.losses import masked_mean as masked_mean
    from rlchat.ppo.losses import policy_loss as policy_loss
    from rlchat.ppo.losses import value_loss as value_loss
    from rlchat.ppo.module import PPOModule as PPOModule
    from rlchat.ppo.rollouts import Rollout as Rollout

__all__ = [
    "AdaptiveKL",
    "PPOModule",
    "Rollout",
    "advantage_estimator",
    "gae",
    "grpo",
    "kl_estimate",
    "masked_mean",
    "masked_whiten",
    "place_scores",
    "policy_loss",
    "reinforce_pp",
    "rloo",
    "shape_rewards",
    "value_loss",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "AdaptiveKL": "rlchat.ppo.losses",
        "PPOModule": "rlchat.ppo.module",
        "Rollout": "rlchat.ppo.rollouts",
        "advantage_estimator": "rlchat.ppo.advantages",
        "gae": "rlchat.ppo.advantages",
        "grpo": "rlchat.ppo.advantages",
        "kl_estimate": "rlchat.ppo.losses",
        "masked_mean": "rlchat.ppo.losses",
        "masked_whiten": "rlchat.ppo.advantages",
        "place_scores": "rlchat.ppo.advantages",
        "policy_loss": "rlchat.ppo.losses",
        "reinforce_pp": "rlchat.ppo.advantages",
        "rloo": "rlchat.ppo.advantages",
        "shape_rewards": "rlchat.ppo.advantages",
        "value_loss": "rlchat.ppo.losses",
    },
)

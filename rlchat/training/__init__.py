"""The stages before PPO: supervised fine-tuning and the reward model, with the base class of all stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlchat.utils.imports import lazy_exports

if TYPE_CHECKING:
    from rlchat.training.reward_model import RewardModelModule as RewardModelModule
    from rlchat.training.sft import SFTModule as SFTModule

__all__ = [
    "RewardModelModule",
    "SFTModule",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "RewardModelModule": "rlchat.training.reward_model",
        "SFTModule": "rlchat.training.sft",
    },
)

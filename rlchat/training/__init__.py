"""The stages without PPO: supervised fine-tuning, the reward model and DPO, with the base class of all stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlchat.utils.imports import lazy_exports

if TYPE_CHECKING:
    from rlchat.training.dpo import DPOModule as DPOModule
    from rlchat.training.reward_model import RewardModelModule as RewardModelModule
    from rlchat.training.sft import SFTModule as SFTModule

__all__ = [
    "DPOModule",
    "RewardModelModule",
    "SFTModule",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "DPOModule": "rlchat.training.dpo",
        "RewardModelModule": "rlchat.training.reward_model",
        "SFTModule": "rlchat.training.sft",
    },
)

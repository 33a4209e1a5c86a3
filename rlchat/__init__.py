"""rlchat: train a chat language model with reinforcement learning from feedback, then chat with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlchat.utils.imports import lazy_exports

if TYPE_CHECKING:
    from rlchat.chat.interface import ChatInterface as ChatInterface
    from rlchat.data.datamodule import OASST2DataModule as OASST2DataModule
    from rlchat.ppo.module import PPOModule as PPOModule
    from rlchat.rewards.learned import LearnedQuality as LearnedQuality
    from rlchat.rewards.reward import Reward as Reward
    from rlchat.tokenizer.chat_tokenizer import ChatTokenizer as ChatTokenizer
    from rlchat.training.dpo import DPOModule as DPOModule
    from rlchat.training.reward_model import RewardModelModule as RewardModelModule
    from rlchat.training.sft import SFTModule as SFTModule

__all__ = [
    "ChatInterface",
    "ChatTokenizer",
    "DPOModule",
    "LearnedQuality",
    "OASST2DataModule",
    "PPOModule",
    "Reward",
    "RewardModelModule",
    "SFTModule",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "ChatInterface": "rlchat.chat.interface",
        "ChatTokenizer": "rlchat.tokenizer.chat_tokenizer",
        "DPOModule": "rlchat.training.dpo",
        "LearnedQuality": "rlchat.rewards.learned",
        "OASST2DataModule": "rlchat.data.datamodule",
        "PPOModule": "rlchat.ppo.module",
        "Reward": "rlchat.rewards.reward",
        "RewardModelModule": "rlchat.training.reward_model",
        "SFTModule": "rlchat.training.sft",
    },
)

"""rlchat: train a chat language model with reinforcement learning from feedback, then chat with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlchat.chat import ChatInterface
    from rlchat.data import OASST2DataModule
    from rlchat.learned_quality import LearnedQuality
    from rlchat.ppo import PPOModule
    from rlchat.reward_model import RewardModelModule
    from rlchat.rewards import Reward
    from rlchat.sft import SFTModule
    from rlchat.tokenizer import ChatTokenizer

_HOMES = {
    "ChatInterface": "chat",
    "ChatTokenizer": "tokenizer",
    "LearnedQuality": "learned_quality",
    "OASST2DataModule": "data",
    "PPOModule": "ppo",
    "Reward": "rewards",
    "RewardModelModule": "reward_model",
    "SFTModule": "sft",
}
__all__ = [
    "ChatInterface",
    "ChatTokenizer",
    "LearnedQuality",
    "OASST2DataModule",
    "PPOModule",
    "Reward",
    "RewardModelModule",
    "SFTModule",
]


def __getattr__(name: str) -> Any:
    # Looked up when first used: `from rlchat import ChatInterface` does not import Lightning.
    if name not in _HOMES:
        raise AttributeError(f"module 'rlchat' has no attribute {name!r}")
    from importlib import import_module

    from rlchat.quick_import import no_garbage_collection

    with no_garbage_collection():
        return getattr(import_module(f"rlchat.{_HOMES[name]}"), name)

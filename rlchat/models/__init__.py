"""Networks, backbones, KV caches, sampling and model files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlchat.utils.imports import lazy_exports

if TYPE_CHECKING:
    from rlchat.models.networks import Critic as Critic
    from rlchat.models.networks import RewardModel as RewardModel
    from rlchat.models.networks import RLChatModel as RLChatModel

__all__ = [
    "Critic",
    "RLChatModel",
    "RewardModel",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "Critic": "rlchat.models.networks",
        "RLChatModel": "rlchat.models.networks",
        "RewardModel": "rlchat.models.networks",
    },
)

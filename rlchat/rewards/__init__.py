"""Rewards: text in, numbers out. :class:`Reward` is a weighted sum of factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlchat.utils.imports import lazy_exports

if TYPE_CHECKING:
    from rlchat.rewards.base import Factor as Factor
    from rlchat.rewards.base import Reply as Reply
    from rlchat.rewards.base import ReplyFactor as ReplyFactor
    from rlchat.rewards.diversity import DistinctNgrams as DistinctNgrams
    from rlchat.rewards.diversity import Repetition as Repetition
    from rlchat.rewards.ending import MissingEnd as MissingEnd
    from rlchat.rewards.learned import LearnedQuality as LearnedQuality
    from rlchat.rewards.length import AppropriateLength as AppropriateLength
    from rlchat.rewards.length import TooLong as TooLong
    from rlchat.rewards.length import TooShort as TooShort
    from rlchat.rewards.reward import Reward as Reward
    from rlchat.rewards.reward import default_factors as default_factors
    from rlchat.rewards.similarity import QualitySimilarity as QualitySimilarity
    from rlchat.rewards.text import distinct_n as distinct_n
    from rlchat.rewards.text import words as words

__all__ = [
    "AppropriateLength",
    "DistinctNgrams",
    "Factor",
    "LearnedQuality",
    "MissingEnd",
    "QualitySimilarity",
    "Repetition",
    "Reply",
    "ReplyFactor",
    "Reward",
    "TooLong",
    "TooShort",
    "default_factors",
    "distinct_n",
    "words",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "AppropriateLength": "rlchat.rewards.length",
        "DistinctNgrams": "rlchat.rewards.diversity",
        "Factor": "rlchat.rewards.base",
        "LearnedQuality": "rlchat.rewards.learned",
        "MissingEnd": "rlchat.rewards.ending",
        "QualitySimilarity": "rlchat.rewards.similarity",
        "Repetition": "rlchat.rewards.diversity",
        "Reply": "rlchat.rewards.base",
        "ReplyFactor": "rlchat.rewards.base",
        "Reward": "rlchat.rewards.reward",
        "TooLong": "rlchat.rewards.length",
        "TooShort": "rlchat.rewards.length",
        "default_factors": "rlchat.rewards.reward",
        "distinct_n": "rlchat.rewards.text",
        "words": "rlchat.rewards.text",
    },
)

"""Rewards score text. :class:`Reward` is a weighted sum of factors.

Every public class in a module of this folder is exported from here, so adding a factor means adding one module.
"""

from __future__ import annotations

import pkgutil
import re
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rlchat.utils.imports import lazy_exports

if TYPE_CHECKING:
    from rlchat.rewards.base import Factor as Factor
    from rlchat.rewards.base import FactorError as FactorError
    from rlchat.rewards.base import Reply as Reply
    from rlchat.rewards.base import ReplyFactor as ReplyFactor
    from rlchat.rewards.classifier import HFReward as HFReward
    from rlchat.rewards.diversity import DistinctNgrams as DistinctNgrams
    from rlchat.rewards.diversity import Repetition as Repetition
    from rlchat.rewards.ending import MissingEnd as MissingEnd
    from rlchat.rewards.function import FunctionReward as FunctionReward
    from rlchat.rewards.learned import LearnedQuality as LearnedQuality
    from rlchat.rewards.length import AppropriateLength as AppropriateLength
    from rlchat.rewards.length import TooLong as TooLong
    from rlchat.rewards.length import TooManySentences as TooManySentences
    from rlchat.rewards.length import TooShort as TooShort
    from rlchat.rewards.remote import HTTPReward as HTTPReward
    from rlchat.rewards.reward import Reward as Reward
    from rlchat.rewards.reward import default_factors as default_factors
    from rlchat.rewards.similarity import QualitySimilarity as QualitySimilarity
    from rlchat.rewards.text import distinct_n as distinct_n
    from rlchat.rewards.text import sentences as sentences
    from rlchat.rewards.text import words as words
    from rlchat.rewards.verified import PartialCredit as PartialCredit
    from rlchat.rewards.verified import Verified as Verified


_FUNCTIONS = {
    "default_factors": "rlchat.rewards.reward",
    "distinct_n": "rlchat.rewards.text",
    "sentences": "rlchat.rewards.text",
    "words": "rlchat.rewards.text",
}


@cache
def _homes() -> dict[str, str]:
    """Public name → its module. Source files are searched instead of imported, because some import PyTorch."""
    homes = dict(_FUNCTIONS)
    for entry in pkgutil.iter_modules(__path__):
        module = f"{__name__}.{entry.name}"
        spec = find_spec(module)
        source = getattr(spec.loader, "get_source", lambda _: None)(module) if spec is not None else None
        homes |= dict.fromkeys(re.findall(r"^class ([A-Za-z]\w*)", source or "", re.MULTILINE), module)
    return homes


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_homes())
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lazy_exports(__name__, _homes())(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_homes()})

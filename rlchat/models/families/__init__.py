"""The encoder families that rlchat can run causally. Every module of this folder declares one or more of them.

Decoders need no declaration: transformers runs them causally and caches their keys and values. To add an encoder
family, add one module here that defines ``FAMILIES``. Each backbone is probed when it is constructed
(see :mod:`rlchat.models.probe`), so a family whose attention is not compatible is rejected with an error.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """An encoder family of transformers whose attention goes through ``AttentionInterface``.

    ``model_type`` is its name in transformers. ``positions_follow_padding`` is True if the first token has position
    ``pad_token_id + 1``, as in RoBERTa, and False if it has position 0.
    """

    model_type: str
    positions_follow_padding: bool = False

    def first_position(self, config: Any) -> int:
        """The position id of the first token of a row."""
        return int(config.pad_token_id) + 1 if self.positions_follow_padding else 0


def positions_of(config: Any) -> int | None:
    """The number of tokens for which the model of ``config`` has positions; None if it states no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and (family := encoder_families().get(config.model_type)) is not None:
        positions -= family.first_position(config)
    return positions or None


@functools.cache
def encoder_families() -> Mapping[str, EncoderFamily]:
    """All declared encoder families by ``model_type``."""
    families: dict[str, EncoderFamily] = {}
    for module in pkgutil.iter_modules(__path__):
        for family in importlib.import_module(f"{__name__}.{module.name}").FAMILIES:
            families[family.model_type] = family
    return families

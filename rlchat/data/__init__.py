"""Turns conversation files into training batches: readers, tokenized corpus, the LightningDataModule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlchat.utils.imports import lazy_exports

if TYPE_CHECKING:
    from rlchat.data.corpus import DataNeeds as DataNeeds
    from rlchat.data.datamodule import OASST2DataModule as OASST2DataModule

__all__ = [
    "DataNeeds",
    "OASST2DataModule",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "DataNeeds": "rlchat.data.corpus",
        "OASST2DataModule": "rlchat.data.datamodule",
    },
)

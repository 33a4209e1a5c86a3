"""Splits trees into training, validation and test by a hash."""

from __future__ import annotations

import hashlib
import logging
from typing import Literal

import torch
from torch import Tensor

_log = logging.getLogger("rlchat")

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def split_trees(places: Tensor, used: Tensor, val_fraction: float, test_fraction: float) -> dict[Split, Tensor]:
    """Assigns trees to splits; each value is Bool [trees].

    A tree's split depends only on its place, so it stays when trees are added. Trees at the same place are one tree.
    In a small file, this can leave a split empty. If there are at least three trees, an empty split with a fraction
    above 0 gets a tree from the largest split. Fewer trees are all in each split, with a warning, unless both
    fractions are 0.

    Args:
        places: Double [trees], :func:`unit_hash` of a seed and the id.
        used: Long [at least 1], the indices of the trees that count. Others are in no split, unless they are at the
            place of one of them.
        val_fraction: the share of the validation split.
        test_fraction: the share of the test split.
    """
    distinct = torch.unique(places[used])
    nearest = torch.searchsorted(distinct, places).clamp(max=len(distinct) - 1)
    counts = distinct[nearest] == places
    if len(distinct) < 3 and val_fraction + test_fraction > 0:
        _log.warning(
            "%d conversation trees cannot be split: validation uses the training data, so its metrics do not "
            "measure generalization",
            len(distinct),
        )
        return dict.fromkeys(SPLITS, counts)
    is_val, is_held_out = distinct < val_fraction, distinct < val_fraction + test_fraction
    splits: dict[Split, Tensor] = {"train": ~is_held_out, "val": is_val, "test": is_held_out & ~is_val}
    wanted: dict[Split, bool] = {"train": True, "val": val_fraction > 0, "test": test_fraction > 0}
    for name in SPLITS:
        if wanted[name] and not splits[name].any():
            largest = max(SPLITS, key=lambda other: int(splits[other].sum()))
            moved = int(splits[largest].nonzero()[0])  # `distinct` is sorted
            splits[largest][moved] = False
            splits[name][moved] = True
    return {name: counts & split[nearest] for name, split in splits.items()}


def unit_hash(seed: int, name: str) -> float:
    """A hash of ``seed`` and ``name``, uniform in [0, 1)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64

"""Splits trees into training, validation and test by a hash."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from typing import Literal

_log = logging.getLogger("rlchat")

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def split_trees(
    tree_ids: Iterable[str], val_fraction: float, test_fraction: float, seed: int
) -> dict[Split, frozenset[str]]:
    """Assigns trees to splits. A tree's split depends only on ``seed`` and its id, so it stays when trees are added.

    In a small file, this can leave a split empty. If there are at least three trees, an empty split with a fraction
    above 0 gets a tree from the largest split. Fewer trees are all in each split, with a warning, unless both
    fractions are 0.
    """
    place = {tree: unit_hash(seed, tree) for tree in tree_ids}
    if len(place) < 3 and val_fraction + test_fraction > 0:
        _log.warning(
            "%d conversation trees cannot be split: validation uses the training data, so its metrics do not "
            "measure generalization",
            len(place),
        )
        return {name: frozenset(place) for name in SPLITS}
    splits: dict[Split, set[str]] = {name: set() for name in SPLITS}
    for tree, u in place.items():
        splits["val" if u < val_fraction else "test" if u < val_fraction + test_fraction else "train"].add(tree)
    wanted: dict[Split, bool] = {"train": True, "val": val_fraction > 0, "test": test_fraction > 0}
    for name in SPLITS:
        if wanted[name] and not splits[name]:
            largest = max(SPLITS, key=lambda other: len(splits[other]))
            moved = min(splits[largest], key=place.__getitem__)
            splits[largest].remove(moved)
            splits[name].add(moved)
    return {name: frozenset(trees) for name, trees in splits.items()}


def unit_hash(seed: int, name: str) -> float:
    """A hash of ``seed`` and ``name``, uniform in [0, 1)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64

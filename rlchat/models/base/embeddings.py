"""Embedding matrices for another vocabulary, from the rows of a base model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlchat.models.vocabulary import AVERAGE


@torch.no_grad()
def rows_from(old: Tensor, sources: Sequence[Sequence[int]], std: float, match_norm: bool = False) -> Tensor:
    """A matrix [len(sources), width] from the rows of ``old`` [tokens, width] (or a vector from a vector).

    A row with one source is its copy. One with several is their mean; with ``match_norm``, which only has an effect on
    matrices, it is scaled to the mean of their norms. A row without a source is drawn from a normal distribution with
    the standard deviation ``std``. Example: the sources (1,), (0, 2) and () give a copy of row 1, a mean of rows 0 and
    2, and random values.

    Only the rows of an input embedding may be scaled. The rows of a head have a large component in common. A scaled
    mean has more of it than a copied row, so its logits are too high after every text.
    """
    new = torch.empty(len(sources), *old.shape[1:], dtype=old.dtype, device=old.device).normal_(std=std)
    by_count: dict[int, list[int]] = {}
    for row, source in enumerate(sources):
        if tuple(source) == AVERAGE:
            new[row] = old.mean(0)
        else:
            by_count.setdefault(len(source), []).append(row)
    by_count.pop(0, None)
    for count, rows in by_count.items():
        parts = old[torch.tensor([list(sources[row]) for row in rows], device=old.device)]  # [rows, count, width]
        mean = parts[:, 0] if count == 1 else parts.mean(1)
        if match_norm and count > 1 and old.dim() > 1:
            mean = mean * (parts.norm(dim=-1).mean(1) / mean.norm(dim=-1).clamp(min=1e-12))[:, None]
        new[rows] = mean
    return new

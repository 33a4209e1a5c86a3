"""Packing: a batch without its padding, in which adjacent rows that start with the same tokens share them.

Almost all operations of a transformer treat each token alone. They run on the packed tokens, one after the other. Only
attention needs rows: it spreads queries, keys and values to [batch, time] and collects its outputs again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKABLE_SDPA = "rlchat_sdpa"
"""transformers' sdpa attention, which also takes packed tokens; the name of an attention implementation."""

# Keyword arguments with which transformers requests more than plain attention; ignoring one would change the result.
NOT_SUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")


# On a GPU, a batch is packed from this number of cells on, if at most this share of them is computed. Below, the copies
# before and after attention cost more than they save, up to 30 % of the time; see `benchmarks/gpu.py packing`.
_GPU_CELLS = 2**14
_GPU_SHARE = 0.65


class Packing(NamedTuple):
    """The place of each token of a right-padded batch [B, T] among its P packed tokens."""

    cells: Tensor  # Long [P]: the packed tokens, as numbers of cells of [B, T], counted row by row
    source: Tensor  # Long [B, T]: the number of the packed token of each cell; any token on padding

    def pack(self, x: Tensor) -> Tensor:
        """[B, T] → [1, P]."""
        return x.flatten()[self.cells][None]

    def spread(self, x: Tensor) -> Tensor:
        """[P, …] → [B, T, …]; on padding, the values of any other token."""
        return x.index_select(0, self.source.flatten()).view(*self.source.shape, *x.shape[1:])


def plan_packing(ids: Tensor, attention_mask: Tensor) -> Packing | None:
    """How to pack ``ids`` [B, T], whose rows are padded on the right; None if no token would be saved.

    A row shares the longest prefix that it has in common with the row above. Example, with _ for padding:

        ids   a b c d     shared with the row above  -     owner of each token   0 0 0 0
              a b e _                                2                           0 0 1 _
              a b e f                                3                           0 0 1 2

    The packed tokens are a b c d e f. The owner of a token is the last row so far that did not share this column.
    """
    rows, time = ids.shape
    same = (ids[1:] == ids[:-1]) & attention_mask[1:] & attention_mask[:-1]
    shared = F.pad(same.long().cumprod(1).sum(1), (1, 0))  # [B]: tokens in common with the row above; 0 for the first
    own = torch.arange(time, device=ids.device) >= shared[:, None]
    computed = own & attention_mask.bool()
    cells = computed.flatten().nonzero().squeeze(1)
    if len(cells) == rows * time:
        return None
    number = (computed.flatten().cumsum(0) - 1).clamp(min=0).view(rows, time)
    owner = torch.where(own, torch.arange(rows, device=ids.device)[:, None], 0).cummax(0).values
    return Packing(cells, number.gather(0, owner))


def faster_packing(ids: Tensor, attention_mask: Tensor) -> Packing | None:
    """:func:`plan_packing`, or None if the padded batch is faster on this device."""
    if not ids.is_cuda:
        return plan_packing(ids, attention_mask)
    if ids.numel() < _GPU_CELLS:
        return None
    packing = plan_packing(ids, attention_mask)
    return packing if packing is not None and len(packing.cells) <= _GPU_SHARE * ids.numel() else None


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, dropout: float
) -> Tensor:
    """Causal attention of packed tokens; all [1, heads, P, width], the result [1, P, heads, width]."""
    queries, keys, values = (packing.spread(x[0].transpose(0, 1)).transpose(1, 2) for x in (query, key, value))
    grouped = keys.shape[1] != queries.shape[1]  # several query heads share a key head
    out = F.scaled_dot_product_attention(
        queries, keys, values, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(0, 1)[packing.cells][None]


def _packable_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    rlchat_packing: Packing | None = None,
    **other: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' sdpa, or :func:`packed_attention`. Raises NotImplementedError if that is not what is requested."""
    if rlchat_packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **other)
    check_plain(other)
    return packed_attention(query, key, value, rlchat_packing, scaling, dropout), None


def check_plain(options: dict[str, Any]) -> None:
    """Raises NotImplementedError if the keyword arguments of an attention request more than plain attention."""
    for name in NOT_SUPPORTED:
        if options.get(name) is not None:
            raise NotImplementedError(f"its attention uses {name}")


AttentionInterface.register(PACKABLE_SDPA, _packable_sdpa)
AttentionMaskInterface.register(PACKABLE_SDPA, sdpa_mask)

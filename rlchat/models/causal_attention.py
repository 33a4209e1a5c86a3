"""Causal attention for encoders, which attend in both directions by default."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from rlchat.models.kv_cache import EncoderCache
from rlchat.models.packing import Packing, check_plain, packed_attention

ATTENTION_NAME = "rlchat_causal"


def causal_mask(attention_mask: Tensor, time: int) -> Tensor:
    """Bool [batch, 1, time, total]: the columns that each of the last ``time`` columns of a row attends to.

    ``attention_mask`` [batch, total] is True on real tokens. A token attends to real tokens up to itself. Padding
    attends to itself too, because a softmax over nothing is NaN on some devices. Example: with total 3, time 2 and the
    first column padding, the two rows of the result are [0, 1, 0] and [0, 1, 1].
    """
    total = attention_mask.shape[1]
    column = torch.arange(total, device=attention_mask.device)
    query = column[total - time :, None]
    return (((column <= query) & attention_mask.bool()[:, None, :]) | (column == query))[:, None]


def _causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    rlchat_cache: EncoderCache | None = None,
    rlchat_packing: Packing | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention [batch, heads, time, width] under a mask [batch, 1, time, cached + time], appending to a cache.

    Packed tokens need neither mask nor cache. Raises NotImplementedError if the family requests more than plain
    attention.
    """
    check_plain(other)
    if rlchat_packing is not None:
        return packed_attention(query, key, value, rlchat_packing, scaling, dropout), None
    if rlchat_cache is not None:
        if module in rlchat_cache:
            past_key, past_value = rlchat_cache[module]
            key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        rlchat_cache[module] = (key, value)
    grouped = key.shape[1] != query.shape[1]  # several query heads share a key head
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _causal_attention)

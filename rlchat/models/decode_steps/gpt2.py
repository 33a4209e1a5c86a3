"""A step of GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from rlchat.models.decode_steps.plain import plain


class GPT2Step:
    """Hidden states [batch, width] of one new token per row; see :class:`rlchat.models.decode_steps.step.Step`."""

    def __init__(self, trunk: Any) -> None:
        self._tokens, self._positions, self._last_norm = plain(trunk.wte), plain(trunk.wpe), plain(trunk.ln_f)
        self._blocks = [_Block(block) for block in trunk.h]

    def __call__(
        self, ids: Tensor, positions: Tensor, visible: Tensor | None, layers: Sequence[DynamicLayer]
    ) -> Tensor:
        """``ids`` and ``positions`` Long [batch]; ``visible`` Bool [batch, 1, 1, columns], or None: all columns."""
        x = self._tokens(ids) + self._positions(positions)
        for block, layer in zip(self._blocks, layers, strict=True):
            x = block(x, visible, layer)
        return self._last_norm(x)


class _Block:
    def __init__(self, block: Any) -> None:
        self._norm, self._next_norm = plain(block.ln_1), plain(block.ln_2)
        self._project, self._merge = plain(block.attn.c_attn), plain(block.attn.c_proj)
        self._widen, self._activate, self._narrow = plain(block.mlp.c_fc), plain(block.mlp.act), plain(block.mlp.c_proj)
        self._heads, self._scale = block.attn.num_heads, block.attn.scaling

    def __call__(self, x: Tensor, visible: Tensor | None, layer: DynamicLayer) -> Tensor:
        rows, width = x.shape
        query, key, value = self._project(self._norm(x)).view(rows, 3, self._heads, 1, width // self._heads).unbind(1)
        keys, values = layer.update(key, value)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=self._scale)
        x = x + self._merge(out.reshape(rows, width))
        return x + self._narrow(self._activate(self._widen(self._next_norm(x))))

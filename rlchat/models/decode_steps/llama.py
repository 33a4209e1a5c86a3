"""A step of Llama and of families with the same blocks: Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from rlchat.models.decode_steps.plain import Function, plain


class LlamaStep:
    """Hidden states [batch, width] of one new token per row; see :class:`rlchat.models.decode_steps.step.Step`."""

    def __init__(self, trunk: Any) -> None:
        self._tokens, self._rotary, self._last_norm = plain(trunk.embed_tokens), trunk.rotary_emb, _norm(trunk.norm)
        self._blocks = [_Block(block) for block in trunk.layers]

    def __call__(
        self, ids: Tensor, positions: Tensor, visible: Tensor | None, layers: Sequence[DynamicLayer]
    ) -> Tensor:
        """``ids`` and ``positions`` Long [batch]; ``visible`` Bool [batch, 1, 1, columns], or None: all columns."""
        x = self._tokens(ids)
        cos, sin = self._rotary(x, position_ids=positions[:, None])  # [batch, 1, head width], like one head
        turned = cos[:, None], _signed(sin)[:, None]
        for block, layer in zip(self._blocks, layers, strict=True):
            x = block(x, turned, visible, layer)
        return self._last_norm(x)


class _Block:
    def __init__(self, block: Any) -> None:
        attention, mlp = block.self_attn, block.mlp
        self._norm, self._next_norm = _norm(block.input_layernorm), _norm(block.post_attention_layernorm)
        self._projections = [plain(attention.q_proj), plain(attention.k_proj), plain(attention.v_proj)]
        # Qwen3 normalizes each head of queries and keys.
        norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._head_norms = [None if norm is None else _norm(norm) for norm in norms]
        self._merge, self._head_width, self._scale = plain(attention.o_proj), attention.head_dim, attention.scaling
        self._gate, self._up, self._down = plain(mlp.gate_proj), plain(mlp.up_proj), plain(mlp.down_proj)
        self._activate = plain(mlp.act_fn)

    def __call__(self, x: Tensor, turned: tuple[Tensor, Tensor], visible: Tensor | None, layer: DynamicLayer) -> Tensor:
        rows = len(x)
        normed = self._norm(x)
        query, key, value = (project(normed).view(rows, -1, 1, self._head_width) for project in self._projections)
        query, key = (
            _rotated(states if norm is None else norm(states), *turned)
            for states, norm in zip((query, key), self._head_norms, strict=True)
        )
        keys, values = layer.update(key, value)
        grouped = keys.shape[1] != query.shape[1]  # several query heads share a key head
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible, scale=self._scale, enable_gqa=grouped
        )
        x = x + self._merge(out.reshape(rows, -1))
        normed = self._next_norm(x)
        return x + self._down(self._activate(self._gate(normed)) * self._up(normed))


def _signed(sin: Tensor) -> Tensor:
    """``sin`` [..., width] with its first half negated, for :func:`_rotated`."""
    first, second = sin.chunk(2, -1)
    return torch.cat([-first, second], -1)


def _rotated(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of ``x`` [..., width], whose halves are the two coordinates.

    The rotation of the pair (a, b) is (a·cos − b·sin, b·cos + a·sin). With the halves of x exchanged, that is
    x·cos + exchanged·(−sin, sin). Example of width 2: x = (a, b), exchanged = (b, a).
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def _norm(module: Any) -> Function:
    """The RMS norm (Zhang and Sennrich 2019) of ``module`` as one operation."""
    weight: Tensor = module.weight
    return partial(F.rms_norm, normalized_shape=list(weight.shape), weight=weight, eps=module.variance_epsilon)

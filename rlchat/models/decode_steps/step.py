"""Chooses the step of a backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlchat.distributed.collectives import is_sharded
from rlchat.models.decode_steps.gpt2 import GPT2Step
from rlchat.models.decode_steps.llama import LlamaStep
from rlchat.models.kv_cache import Cache, can_append
from rlchat.models.packing import PACKABLE_SDPA
from rlchat.models.probe import can_step

if TYPE_CHECKING:
    from rlchat.models.backbones import Backbone


class Step(Protocol):
    """The hidden states of one new token per row, from the tensors that the trunk has when it is constructed."""

    def __call__(
        self, ids: Tensor, positions: Tensor, visible: Tensor | None, layers: Sequence[DynamicLayer]
    ) -> Tensor:
        """Hidden states [batch, width] of ``ids`` Long [batch] at ``positions`` Long [batch].

        ``visible`` Bool [batch, 1, 1, columns] is True where a token attends to a column, its own included; None if it
        attends to all. ``layers`` are those of the cache, each of which gets a column.
        """


_FAMILIES: dict[str, Callable[[PreTrainedModel], Step]] = {
    "gpt2": GPT2Step,
    "llama": LlamaStep,
    "mistral": LlamaStep,
    "qwen2": LlamaStep,
    "qwen3": LlamaStep,
}
"""The steps by ``model_type`` of transformers."""


class StepDecoder:
    """Hidden states of each next token of a batch that ``cache`` contains, as :meth:`Backbone.forward` computes them.

    Weights must stay in their tensors while it is used, so it serves one batch.
    """

    def __init__(self, backbone: Backbone, cache: Cache) -> None:
        assert isinstance(cache, DynamicCache)
        self._step = _FAMILIES[backbone.transformer.config.model_type](backbone.transformer)
        self._cache = cache

    def __call__(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[batch, hidden] after ``ids`` Long [batch, 1]; ``attention_mask`` Bool [batch, cached + 1]."""
        positions = (attention_mask.sum(1) - 1).clamp(min=0)
        visible = None if attention_mask.all() else _visible(attention_mask)
        return self._step(ids[:, 0], positions, visible, cast(list[DynamicLayer], self._cache.layers))


def step_decoder(backbone: Backbone, cache: Cache) -> StepDecoder | None:
    """A :class:`StepDecoder` if ``backbone`` has one that gives the same as its forward pass, else None.

    That requires a CPU, a family above, sdpa attention to whole rows, eval mode, and neither autocast, sharding nor
    hooks. Each backbone is compared once, with short forward passes.
    """
    transformer = backbone.transformer
    if transformer.config.model_type not in _FAMILIES or backbone.device.type != "cpu" or is_sharded(backbone):
        return None
    if transformer.training or torch.is_autocast_enabled("cpu") or not can_append(cache):
        return None
    if transformer.config._attn_implementation not in ("sdpa", PACKABLE_SDPA):
        return None
    if any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules()):
        return None  # they expect calls of modules
    if backbone.steps is None:
        backbone.steps = can_step(backbone, lambda cache: StepDecoder(backbone, cache))
    return StepDecoder(backbone, cache) if backbone.steps else None


def _visible(attention_mask: Tensor) -> Tensor:
    """Bool [batch, 1, 1, columns]. A token attends to itself even if it is padding: a softmax over nothing is NaN."""
    visible = attention_mask.clone()
    visible[:, -1] = True
    return visible[:, None, None]

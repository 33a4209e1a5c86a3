"""A transformers backbone that is causal and has a key-value cache.

Decoders (GPT-2, Llama, Qwen, GPT-NeoX, …) are causal and cached by transformers itself. Encoders (DistilBERT, BERT,
RoBERTa, ELECTRA; see :mod:`rlchat.models.families`) attend in both directions: their attention is replaced
by causal attention with a cache. Every new backbone is probed (:mod:`rlchat.models.probe`). If it lacks a property
that training or chat relies on, an error names the model family and the property.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from rlchat.errors import UserError
from rlchat.models.base_models import (
    config_from_json,
    configuration,
    from_config,
    hidden_width,
    is_tied,
    pretrained,
)
from rlchat.models.causal_attention import causal_mask
from rlchat.models.families import EncoderFamily, encoder_families
from rlchat.models.kv_cache import Cache, EncoderCache
from rlchat.models.probe import probe


class Backbone(nn.Module):
    """Maps token ids to hidden states, causally.

    ``base_model`` is a hub name, a folder, or an inline configuration (``{"model_type": "llama", "hidden_size": 128,
    …}``, random weights). A pretrained embedding is resized to the tokenizer's ``vocab_size``; its first ``kept_rows``
    rows are kept (see :func:`rlchat.models.vocabulary.kept_rows`), the others are initialized randomly. Raises
    :class:`UserError` for a model that cannot be loaded, has too few positions, or fails the probe.
    """

    _family: EncoderFamily | None  # None for a decoder

    def __init__(self, base_model: str | dict[str, Any], vocab_size: int, max_length: int, kept_rows: int = 0) -> None:
        super().__init__()
        config = configuration(base_model, vocab_size, max_length)
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"base_model: {config.model_type} is an encoder-decoder, which is not supported; choose a decoder such "
                f"as gpt2"
            )
        self._family = encoder_families().get(config.model_type)
        if isinstance(base_model, str):
            self.transformer, head = pretrained(base_model, config)
            self._fit_vocabulary(head, vocab_size, kept_rows)
        else:
            self._build(config)
        _trim(self.transformer)
        probe(self, max_length)

    @classmethod
    def from_config_json(cls, text: str) -> Backbone:
        """An untrained backbone of the shape that :meth:`config_json` described; it is not probed again."""
        backbone = cls.__new__(cls)
        nn.Module.__init__(backbone)
        config = config_from_json(text)
        backbone._family = encoder_families().get(config.model_type)
        backbone._build(config)
        _trim(backbone.transformer)
        return backbone

    def config_json(self) -> str:
        """The shape of the backbone, for :meth:`from_config_json`."""
        return self.transformer.config.to_json_string(use_diff=False)

    def _build(self, config: PretrainedConfig) -> None:
        self.transformer = from_config(config)
        self.head = None if is_tied(self.transformer) else self._new_head()

    def _new_head(self) -> nn.Linear:
        head = nn.Linear(self.hidden_size, self.vocab_size, bias=False)
        nn.init.normal_(head.weight, std=_initial_std(self.transformer.config))
        return head

    def _fit_vocabulary(self, head: nn.Linear | None, vocab_size: int, kept_rows: int) -> None:
        """Resizes embeddings and head to the tokenizer's ids.

        The first ``kept_rows`` rows are kept, the others are initialized randomly.
        """
        config = self.transformer.config
        self.transformer.resize_token_embeddings(vocab_size, mean_resizing=False)
        std = _initial_std(config)
        with torch.no_grad():
            _embedding_weight(self.transformer)[kept_rows:].normal_(std=std)
        self.head = None
        if head is not None or not is_tied(self.transformer):
            self.head = self._new_head()
            if head is not None and kept_rows:
                with torch.no_grad():
                    self.head.weight[:kept_rows] = head.weight[:kept_rows]

    @property
    def is_encoder(self) -> bool:
        """Whether the family is an encoder, which rlchat makes causal."""
        return self._family is not None

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states that :meth:`forward` returns."""
        return hidden_width(self.transformer.config)

    @property
    def vocab_size(self) -> int:
        """The number of rows of the embedding matrix."""
        return int(self.transformer.config.vocab_size)

    @property
    def device(self) -> torch.device:
        """The device of the embedding matrix."""
        return _embedding_weight(self.transformer).device

    @property
    def head_weight(self) -> Tensor:
        """[vocabulary, hidden]: the policy head's weight, which is the embedding matrix if the backbone ties them."""
        if self.head is not None:
            return self.head.weight
        return _embedding_weight(self.transformer)

    def new_cache(self) -> Cache:
        """An empty cache for :meth:`forward`; each batch of conversations needs its own."""
        return EncoderCache() if self.is_encoder else DynamicCache(config=self.transformer.config)

    def forward(self, ids: Tensor, attention_mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states [batch, time, hidden] of ``ids`` [batch, time].

        ``attention_mask`` [batch, cached + time] is True on real tokens, cached ones included; padding may be on either
        side. Positions count real tokens only, so padding does not affect the result.
        """
        time = ids.shape[1]
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -time:]
        if self._family is not None:
            output = self.transformer(
                ids,
                attention_mask=causal_mask(attention_mask, time),
                position_ids=positions + self._family.first_position(self.transformer.config),
                rlchat_cache=cache,
            )
        elif cache is None and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
            # Padding on the right only: no real token can see it, and purely causal attention is fast.
            output = self.transformer(ids, use_cache=False)
        else:
            output = self.transformer(
                ids,
                attention_mask=attention_mask.long(),
                position_ids=positions,
                use_cache=cache is not None,
                **{_cache_argument(self.transformer): cache},
            )
        hidden = output.last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden


def _cache_argument(model: PreTrainedModel) -> str:
    """The keyword of ``forward`` that takes the KV cache: ``cache`` from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _embedding_weight(model: PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def _trim(model: PreTrainedModel) -> None:
    """Removes parts that would never be trained."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None  # this row would get no gradient, but here it belongs to a real token
    if getattr(model, "pooler", None) is not None:
        model.register_module("pooler", None)  # unused, and DDP fails on parameters without gradients


def _initial_std(config: PretrainedConfig) -> float:
    return float(getattr(config, "initializer_range", 0.02))

"""A transformers backbone that is causal and has a key-value cache.

Decoders (GPT-2, Llama, Qwen, GPT-NeoX, …) are causal and cached by transformers itself. Encoders (DistilBERT, BERT,
RoBERTa, ELECTRA; see :mod:`rlchat.models.families`) attend in both directions: their attention is replaced
by causal attention with a cache. Every new backbone is probed (:mod:`rlchat.models.probe`). If it lacks a property
that training or chat relies on, an error names the model family and the property.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import FastGELUActivation, NewGELUActivation

from rlchat.distributed.collectives import gather_objects
from rlchat.errors import UserError, one_line
from rlchat.models.base.embeddings import rows_from
from rlchat.models.base.source import BaseSource
from rlchat.models.base_models import (
    LogitsForm,
    attention_name,
    config_from_json,
    configuration,
    from_config,
    hidden_width,
    is_tied,
    logits_form,
    pretrained,
    untrained,
    weights_digest,
)
from rlchat.models.causal_attention import causal_mask
from rlchat.models.families import EncoderFamily, encoder_families
from rlchat.models.kv_cache import Cache, EncoderCache, decoder_cache
from rlchat.models.packing import Packing, faster_packing
from rlchat.models.probe import can_pack, probe


class Backbone(nn.Module):
    """Maps token ids to hidden states, causally.

    ``base_model`` is a hub name, a folder, or an inline configuration (``{"model_type": "llama", "hidden_size": 128,
    …}``, random weights). The embedding of a pretrained one gets ``vocab_size`` rows, the tokenizer's: row i starts
    from the rows ``rows[i]`` of the base model, or from random values where there are none (see
    :func:`rlchat.models.vocabulary.plan_rows`). ``attention`` is an attention implementation of transformers; None is
    sdpa, or eager where the family has no sdpa. Raises :class:`UserError` for a model that cannot be loaded, has too
    few positions, or fails the probe. Without ``weights`` it only has the shape; it is not probed, and
    :meth:`follow_first` takes over what the first process has found. For this, build it in
    :func:`rlchat.distributed.sharding.weights_on_first`.
    """

    _family: EncoderFamily | None  # None for a decoder
    logits_form: LogitsForm  # what becomes of the product of hidden states and head_weight
    _packs: bool | None = None  # whether batches are packed; None before the first one, which is checked
    fixed_cache: bool | None = None  # whether a cache of fixed size gives the same; None before the first use
    steps: bool | None = None  # whether decoding on a CPU runs without modules; None before the first use
    graphs: bool | None = None  # whether decoding runs as a CUDA graph; None before the first one
    new_head: bool = False  # whether the policy head of a pretrained base model starts from random values
    fingerprint: str = ""  # a digest of the weights of a pretrained base model, before the rows are fitted

    def __init__(
        self,
        base_model: str | dict[str, Any],
        vocab_size: int,
        max_length: int,
        rows: Sequence[Sequence[int]] | None = None,
        attention: str | None = None,
        weights: bool = True,
    ) -> None:
        super().__init__()
        config = configuration(base_model, vocab_size, max_length)
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"base_model: {config.model_type} is an encoder-decoder, which is not supported; choose a decoder such "
                f"as gpt2"
            )
        self._family = encoder_families().get(config.model_type)
        if isinstance(base_model, str):
            base = pretrained(base_model, config, attention) if weights else untrained(config, attention)
            self.transformer, self.logits_form = base.trunk, base.form
            if weights:
                named = [*base.trunk.named_parameters(), *(base.head.named_parameters("head") if base.head else ())]
                # A pooler is not used. Where the files have none, its values are random.
                self.fingerprint = weights_digest(pair for pair in named if not pair[0].startswith("pooler."))
            self._fit_vocabulary(base.head, rows or [()] * vocab_size)
            source = BaseSource.of(base_model)
            self.transformer.config.rlchat_base = source.values()
            self.transformer.config.name_or_path = source.hub  # transformers puts the path of the folder there
        else:
            self._build(config, attention)
            self.logits_form = logits_form(config)
        self.transformer.config.rlchat_logits = list(self.logits_form)
        _prepare(self.transformer)
        if weights:
            probe(self, max_length)

    @classmethod
    def from_config_json(cls, text: str) -> Backbone:
        """An untrained backbone of the shape that :meth:`config_json` described; it is not probed again."""
        backbone = cls.__new__(cls)
        nn.Module.__init__(backbone)
        config = config_from_json(text)
        backbone._family = encoder_families().get(config.model_type)
        # Model files of version 1 do not have it: their models were trained without scale, cap and bias.
        backbone.logits_form = LogitsForm(*getattr(config, "rlchat_logits", ()))
        backbone._build(config)
        _prepare(backbone.transformer)
        return backbone

    def set_attention(self, attention: str) -> None:
        """Changes the attention implementation. Raises :class:`UserError` where the family does not have it."""
        config = self.transformer.config
        self._packs = self.fixed_cache = self.graphs = self.steps = None
        try:
            self.transformer.set_attn_implementation(attention_name(config, attention) or attention)
        except (ValueError, ImportError) as error:
            raise UserError(
                f"invalid value {attention!r} for attn_implementation: {config.model_type} cannot run with it "
                f"({one_line(error)})"
            ) from error

    def follow_first(self) -> None:
        """Packs batches if the first process does, where the backbone was probed. A collective."""
        packs, attention = gather_objects((self._packs, self.transformer.config._attn_implementation))[0]
        if attention != self.transformer.config._attn_implementation:
            self.transformer.set_attn_implementation(attention)
        self._packs = packs

    def config_json(self) -> str:
        """The shape of the backbone, for :meth:`from_config_json`."""
        return self.transformer.config.to_json_string(use_diff=False)

    def _build(self, config: PretrainedConfig, attention: str | None = None) -> None:
        self.transformer = from_config(config, attention)
        self.head = None if is_tied(self.transformer) else self._new_head()

    def _new_head(self) -> nn.Linear:
        bias = hasattr(self, "logits_form") and self.logits_form.bias
        head = nn.Linear(self.hidden_size, self.vocab_size, bias=bias)
        nn.init.normal_(head.weight, std=_initial_std(self.transformer.config))
        if bias:
            nn.init.zeros_(head.bias)
        return head

    def _fit_vocabulary(self, head: nn.Linear | None, rows: Sequence[Sequence[int]]) -> None:
        """Replaces the rows of embedding and head by those that ``rows`` names, one for each id of the tokenizer."""
        std = _initial_std(self.transformer.config)
        tied = head is None and is_tied(self.transformer)
        new = rows_from(_embedding_weight(self.transformer), rows, std, match_norm=not tied)
        self.transformer.resize_token_embeddings(len(rows), mean_resizing=False)
        with torch.no_grad():
            _embedding_weight(self.transformer).copy_(new)
        self.head = None
        if tied:
            return
        self.head = self._new_head()
        self.new_head = head is None
        if head is not None:
            with torch.no_grad():
                self.head.weight.copy_(rows_from(head.weight, rows, std))
                if self.head.bias is not None:
                    self.head.bias.copy_(rows_from(head.bias, rows, 0.0))

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
    def head_bias(self) -> Tensor | None:
        """[vocabulary]: the bias of the policy head, where the base model has one."""
        return None if self.head is None else self.head.bias

    @property
    def head_weight(self) -> Tensor:
        """[vocabulary, hidden]: the policy head's weight, which is the embedding matrix if the backbone ties them."""
        if self.head is not None:
            return self.head.weight
        return _embedding_weight(self.transformer)

    def new_cache(self) -> Cache:
        """An empty cache for :meth:`forward`; each batch of conversations needs its own."""
        return EncoderCache() if self.is_encoder else decoder_cache(self.transformer.config, self.device)

    def forward(self, ids: Tensor, attention_mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states [batch, time, hidden] of ``ids`` [batch, time]; those of padding have no meaning.

        ``attention_mask`` [batch, cached + time] is True on real tokens, cached ones included; padding may be on either
        side. Positions count real tokens only, so padding does not affect the result. Without a cache, a right-padded
        batch is packed where that is faster (see :mod:`rlchat.models.packing`).
        """
        right_padded = cache is None and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
        if cache is None and self._packs is None:
            # For any first batch, whatever its lengths: the check runs forward passes, which are collectives if the
            # backbone is sharded.
            self._packs = False
            self._packs = can_pack(self)
        if right_padded and self._packs and (packing := faster_packing(ids, attention_mask)) is not None:
            return nn.functional.embedding(packing.source, self.packed(ids, packing))  # FSDP2: no view may be returned
        time = ids.shape[1]
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -time:]
        if self._family is not None:
            output = self.transformer(
                ids,
                attention_mask=causal_mask(attention_mask, time),
                position_ids=positions + self._family.first_position(self.transformer.config),
                rlchat_cache=cache,
            )
        elif right_padded:  # no real token can see the padding, and purely causal attention is fast
            output = self.transformer(ids, use_cache=False)
        else:
            output = self.transformer(
                ids,
                attention_mask=attention_mask.long(),
                position_ids=positions,
                use_cache=cache is not None,
                **{self._cache_argument: cache},
            )
        hidden = output.last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden

    @functools.cached_property  # inspecting the signature takes 3 % of the step of a small model
    def _cache_argument(self) -> str:
        """The keyword of ``forward`` that takes the KV cache: ``cache`` from transformers 5.24 on."""
        forward = type(self.transformer).forward
        return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"

    def decode(self, ids: Tensor, visible: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Hidden states [batch, time, hidden] of ``ids`` [batch, time] at given ``positions`` Long [batch, time].

        ``visible`` Bool [batch, 1, time, columns] is True where a token attends to a column of ``cache``. For decoders.
        """
        options = {self._cache_argument: cache}
        output = self.transformer(ids, attention_mask=visible, position_ids=positions, use_cache=True, **options)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def packed(self, ids: Tensor, packing: Packing) -> Tensor:
        """Hidden states [P, hidden] of the packed tokens of ``ids`` [batch, time]."""
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        options: dict[str, Any] = {}
        if self._family is not None:
            positions = positions + self._family.first_position(self.transformer.config)
        else:
            options["use_cache"] = False
        output = self.transformer(
            packing.pack(ids),
            position_ids=packing.pack(positions),
            # Packed attention needs no mask; transformers does not build one if it gets one with four dimensions.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
            rlchat_packing=packing,
            **options,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden


def _embedding_weight(model: PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def _prepare(model: PreTrainedModel) -> None:
    """Removes parts that would never be trained, and computes GELU in one operation.

    transformers writes the tanh form of GELU as eight operations, whose outputs are all kept for the backward pass.
    On an H200, an update of GPT-2 takes 0.58 s instead of 0.70 s with one, and 2 GB less memory.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None  # this row would get no gradient, but here it belongs to a real token
    if getattr(model, "pooler", None) is not None:
        model.register_module("pooler", None)  # unused, and DDP fails on parameters without gradients
    for module in model.modules():
        for name, part in module.named_children():
            if isinstance(part, NewGELUActivation | FastGELUActivation):
                module.register_module(name, nn.GELU(approximate="tanh"))


def _initial_std(config: PretrainedConfig) -> float:
    return float(getattr(config, "initializer_range", 0.02))

"""A transformers backbone, made causal, with a key-value cache.

Decoders (GPT-2, Llama, Qwen, GPT-NeoX, …) are causal and cached by transformers itself. Encoders (DistilBERT, BERT,
RoBERTa, ELECTRA) look both ways by nature: here their attention is replaced by one that is masked to the past and can
append to a cache, so that a token never sees what it must predict. Whatever the family, a probe at construction changes
a token and looks whether an earlier position noticed; a backbone that leaks is refused.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rlchat.errors import UserError
from rlchat.models.kv_cache import Cache, EncoderCache

log = logging.getLogger("rlchat")

# Families that need our own attention; the number is the position that their first token has.
ENCODERS = {"distilbert": 0, "bert": 0, "electra": 0, "roberta": None, "xlm-roberta": None, "camembert": None}


class Backbone(nn.Module):
    """Token ids to hidden states, causally.

    ``base_model`` is a hub name, a folder, or an inline configuration (``{"model_type": "llama", "hidden_size": 128,
    …}``, random weights). ``vocab_size`` is the tokenizer's; where the base model's own differs, see
    :meth:`_fit_vocabulary`. Raises :class:`UserError` for a model that cannot be had, has too few positions, or leaks.
    """

    def __init__(self, base_model: str | dict[str, Any], vocab_size: int, max_length: int, kept_rows: int = 0) -> None:
        super().__init__()
        config = _configuration(base_model, vocab_size, max_length)
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"base_model: {config.model_type} is an encoder with a decoder; choose a decoder alone, as gpt2"
            )
        self._is_encoder = config.model_type in ENCODERS
        if isinstance(base_model, str):
            self.transformer, head = _pretrained(base_model, config, self._is_encoder)
            self._fit_vocabulary(head, vocab_size, kept_rows)
        else:
            try:
                self._build(config)
            except ValueError as error:
                raise UserError(f"base_model: {config.model_type} cannot be built like this: {error}") from error
        _trim(self.transformer)
        self._refuse_a_leak()

    @classmethod
    def from_config_json(cls, text: str) -> Backbone:
        """An untrained backbone of the shape that :meth:`config_json` described."""
        values = json.loads(text)
        backbone = cls.__new__(cls)
        nn.Module.__init__(backbone)
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
        backbone._is_encoder = config.model_type in ENCODERS
        backbone._build(config)
        _trim(backbone.transformer)
        return backbone

    def config_json(self) -> str:
        """The shape of the backbone, for :meth:`from_config_json`."""
        return self.transformer.config.to_json_string(use_diff=False)

    def _build(self, config: PretrainedConfig) -> None:
        self.transformer = AutoModel.from_config(config, attn_implementation=_attention(self._is_encoder))
        self.head = None if _tied(self.transformer) else self._new_head()

    def _new_head(self) -> nn.Linear:
        head = nn.Linear(self.hidden_size, self.vocab_size, bias=False)
        nn.init.normal_(head.weight, std=_initial_std(self.transformer.config))
        return head

    def _fit_vocabulary(self, head: nn.Linear | None, vocab_size: int, kept_rows: int) -> None:
        """Embeddings (and head) for the tokenizer's ids.

        Where the base model counts as many tokens as the encoding (``kept_rows``: GPT-2's weights under the encoding
        gpt2), its rows mean the same tokens and are kept; else they mean others, and every row starts anew.
        """
        config = self.transformer.config
        keeps = config.vocab_size == kept_rows
        if not keeps:
            log.info("the base model's %d tokens are not the encoding's: embeddings start anew", config.vocab_size)
        self.transformer.resize_token_embeddings(vocab_size, mean_resizing=False)
        std = _initial_std(config)
        with torch.no_grad():
            _embedding_weight(self.transformer)[kept_rows if keeps else 0 :].normal_(std=std)
        self.head = None
        if head is not None or not _tied(self.transformer):
            self.head = self._new_head()
            if head is not None and keeps:
                with torch.no_grad():
                    self.head.weight[:kept_rows] = head.weight[:kept_rows]

    @property
    def hidden_size(self) -> int:
        return int(self.transformer.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.transformer.config.vocab_size)

    @property
    def head_weight(self) -> Tensor:
        """[vocabulary, hidden]: the policy head's weight, the embeddings' own where the backbone ties them."""
        if self.head is not None:
            return self.head.weight
        return _embedding_weight(self.transformer)

    def new_cache(self) -> Cache:
        """An empty cache, for the ``cache`` of :meth:`forward`; one for each batch of conversations."""
        return EncoderCache() if self._is_encoder else DynamicCache(config=self.transformer.config)

    def forward(self, ids: Tensor, attention_mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states [batch, time, hidden] of ``ids`` [batch, time].

        ``attention_mask`` [batch, cached + time] is True on real tokens, cached ones included; padding may be on either
        side. Positions count real tokens only, so that padding moves nothing.
        """
        time = ids.shape[1]
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -time:]
        if self._is_encoder:
            first = ENCODERS[self.transformer.config.model_type]
            offset = self.transformer.config.pad_token_id + 1 if first is None else first
            output = self.transformer(
                ids,
                attention_mask=_causal_mask(attention_mask, time),
                position_ids=positions + offset,
                rlchat_cache=cache,
            )
        elif cache is None and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
            # Padding on the right alone: nobody before it can see it, and attention that is causal and no more is fast.
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

    @torch.no_grad()
    def _refuse_a_leak(self) -> None:
        """Changes the last token of a short row and asks whether the positions before it noticed."""
        mode = self.training
        self.eval()
        ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]]) % self.vocab_size
        hidden = self(ids, torch.ones_like(ids, dtype=torch.bool))
        self.train(mode)
        if not torch.allclose(hidden[0, :-1], hidden[1, :-1], atol=1e-4):
            family = self.transformer.config.model_type
            raise UserError(
                f"the backbone family {family!r} sees tokens that come later and cannot be made causal here; choose a "
                f"decoder (gpt2, llama, qwen3, …) or one of {', '.join(ENCODERS)}"
            )


def _causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    rlchat_cache: EncoderCache | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention [batch, heads, time, width] under a mask [batch, 1, time, cached + time], appending to a cache."""
    if rlchat_cache is not None:
        if module in rlchat_cache:
            past_key, past_value = rlchat_cache[module]
            key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        rlchat_cache[module] = (key, value)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("rlchat_causal", _causal_attention)


def _attention(is_encoder: bool) -> str:
    return "rlchat_causal" if is_encoder else "sdpa"


def _causal_mask(attention_mask: Tensor, time: int) -> Tensor:
    """Bool [batch, 1, time, total]: the past and itself, real tokens only; padding attends to itself, so never NaN."""
    total = attention_mask.shape[1]
    place = torch.arange(total, device=attention_mask.device)
    past = place[None, :] <= place[total - time :, None]
    itself = place[None, :] == place[total - time :, None]
    return ((past & attention_mask.bool()[:, None, :]) | itself)[:, None]


def _configuration(base_model: str | dict[str, Any], vocab_size: int, max_length: int) -> PretrainedConfig:
    if isinstance(base_model, str):
        config = _fetch(base_model, lambda: AutoConfig.from_pretrained(base_model))
        _require_positions(config, max_length, base_model)
        return config
    values = dict(base_model)
    family = values.pop("model_type", None)
    if family not in CONFIG_MAPPING:
        raise UserError(
            f"base_model: model_type {family!r} is no family of transformers; give one such as llama or gpt2"
        )
    _require_known(values, CONFIG_MAPPING[family](), family)
    values.setdefault("max_position_embeddings", max_length + 2)  # RoBERTa's first position is 2
    values.setdefault("pad_token_id", None if family not in ENCODERS else 0)
    values.setdefault("bos_token_id", None)
    values.setdefault("eos_token_id", None)
    if "num_attention_heads" in values and getattr(CONFIG_MAPPING[family](), "num_key_value_heads", None):
        # Families that share keys among heads have a default number of their own, which fits their default size alone.
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
    try:
        config = AutoConfig.for_model(family, **{**values, "vocab_size": vocab_size})
    except (TypeError, ValueError, NotImplementedError, StrictDataclassError) as error:
        raise UserError(f"base_model: {family} does not take this configuration: {error}") from error
    _require_positions(config, max_length, family)
    return config


def _require_known(values: dict[str, Any], default: PretrainedConfig, family: str) -> None:
    """transformers takes any key and forgets it: a misspelt size would build a model of billions of parameters."""
    known = {*default.to_dict(), *default.attribute_map}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            cure = f"did you mean {close[0]}?" if close else f"see the configuration of {family} in transformers"
            raise UserError(f"base_model: {family} has no option {key!r}; {cure}")


def _require_positions(config: PretrainedConfig, max_length: int, name: str) -> None:
    positions = getattr(config, "max_position_embeddings", max_length)
    positions -= config.pad_token_id + 1 if ENCODERS.get(config.model_type, 0) is None else 0
    if positions < max_length:
        raise UserError(
            f"max_length {max_length} is more than the {positions} positions of base_model {name}; lower max_length, "
            f"or choose a base model with more"
        )


def _pretrained(name: str, config: PretrainedConfig, is_encoder: bool) -> tuple[PreTrainedModel, nn.Linear | None]:
    """The trunk, and the policy head where the model has one of its own (untied)."""
    if is_encoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        trunk = _fetch(
            name,
            lambda: AutoModel.from_pretrained(name, attn_implementation=_attention(is_encoder), dtype=torch.float32),
        )
        return trunk, None
    whole = _fetch(
        name, lambda: AutoModelForCausalLM.from_pretrained(name, attn_implementation="sdpa", dtype=torch.float32)
    )
    return whole.base_model, None if _tied(whole) else whole.get_output_embeddings()


def _fetch(name: str, load: Any) -> Any:
    try:
        return load()
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        if Path(name).is_dir():
            raise UserError(
                f"base_model {name}: the folder holds no model that transformers can load: {error}"
            ) from error
        raise UserError(
            f"base_model {name} is neither a folder nor a model that could be fetched; connect to the network, give "
            f"the path of a downloaded model, or an inline configuration, as {{model_type: llama, hidden_size: 128}}"
        ) from error


def _cache_argument(model: PreTrainedModel) -> str:
    """The keyword of ``forward`` that takes the KV cache: ``cache`` from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _tied(model: PreTrainedModel) -> bool:
    """Whether the policy head is the embedding matrix: the backbone ties them and the widths agree (not in ELECTRA)."""
    width = _embedding_weight(model).shape[1]
    return bool(getattr(model.config, "tie_word_embeddings", True)) and width == model.config.hidden_size


def _embedding_weight(model: PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def _trim(model: PreTrainedModel) -> None:
    """Takes away what would never learn."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None  # the row that it names gets no gradient, and here it is that of a real token
    if getattr(model, "pooler", None) is not None:
        model.register_module("pooler", None)  # BERT's summary of a text; a parameter that no loss reaches stops DDP


def _initial_std(config: PretrainedConfig) -> float:
    return float(getattr(config, "initializer_range", 0.02))

"""Base models: from ``base_model`` (a hub name, a folder or an inline configuration) to a configuration and weights."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rlchat.errors import UserError
from rlchat.models.causal_attention import ATTENTION_NAME
from rlchat.models.families import encoder_families

T = TypeVar("T")


def configuration(base_model: str | dict[str, Any], vocab_size: int, max_length: int) -> PretrainedConfig:
    """The configuration of ``base_model``; an inline one gets ``vocab_size`` and enough positions.

    Raises :class:`UserError` if it cannot be loaded, has too few positions, or has unknown options.
    """
    if isinstance(base_model, str):
        config = _fetch(base_model, lambda: AutoConfig.from_pretrained(base_model))
        _require_positions(config, max_length, base_model)
        return config
    values = dict(base_model)
    family = values.pop("model_type", None)
    if family not in CONFIG_MAPPING:
        raise UserError(
            f"base_model: unknown model_type {family!r}; expected a model family of transformers such as llama or gpt2"
        )
    _require_known(values, CONFIG_MAPPING[family](), family)
    values.setdefault("max_position_embeddings", max_length + 2)  # RoBERTa's first position is 2
    values.setdefault("pad_token_id", 0 if family in encoder_families() else None)
    values.setdefault("bos_token_id", None)
    values.setdefault("eos_token_id", None)
    if "num_attention_heads" in values and getattr(CONFIG_MAPPING[family](), "num_key_value_heads", None):
        # The default of families with grouped-query attention only fits their default number of heads.
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
    try:
        config = AutoConfig.for_model(family, **{**values, "vocab_size": vocab_size})
    except (TypeError, ValueError, NotImplementedError, StrictDataclassError) as error:
        raise UserError(f"base_model: invalid configuration for {family}: {one_line(error)}") from error
    _require_positions(config, max_length, family)
    return config


def from_config(config: PretrainedConfig) -> PreTrainedModel:
    """An untrained model with the shape of ``config``. Raises :class:`UserError` if it cannot be built."""
    try:
        model = AutoModel.from_config(config, attn_implementation=attention_name(config))
    except (TypeError, ValueError, AttributeError, AssertionError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"base_model: cannot build a {config.model_type} model: {one_line(error)}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def pretrained(name: str, config: PretrainedConfig) -> tuple[PreTrainedModel, nn.Linear | None]:
    """The model without its head, and the output layer if it is not tied to the embeddings."""
    attention = attention_name(config)
    if config.model_type in encoder_families() or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        model = _fetch(
            name, lambda: AutoModel.from_pretrained(name, attn_implementation=attention, dtype=torch.float32)
        )
        return model, None
    whole = _fetch(
        name, lambda: AutoModelForCausalLM.from_pretrained(name, attn_implementation=attention, dtype=torch.float32)
    )
    trunk, head = whole.base_model, whole.get_output_embeddings()
    assert isinstance(trunk, PreTrainedModel)
    if is_tied(whole):
        return trunk, None
    assert isinstance(head, nn.Linear)
    return trunk, head


def config_from_json(text: str) -> PretrainedConfig:
    """The configuration that ``PretrainedConfig.to_json_string`` wrote.

    transformers writes an infinite value as ``{"__float__": "Infinity"}``. Raises KeyError for a ``model_type`` that
    the installed transformers does not have, ValueError and TypeError for other invalid content.
    """

    def restore(values: dict[str, Any]) -> Any:
        return float(values["__float__"]) if values.keys() == {"__float__"} else values

    values = json.loads(text, object_hook=restore)
    return CONFIG_MAPPING[values["model_type"]].from_dict(values)


def attention_name(config: PretrainedConfig) -> str:
    """The attention implementation to request from transformers."""
    return ATTENTION_NAME if config.model_type in encoder_families() else "sdpa"


def hidden_width(config: PretrainedConfig) -> int:
    """The width of the last hidden states. OPT may project them to the width of its embeddings."""
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the policy head is the embedding matrix: tied, and as wide as the hidden states (not in ELECTRA)."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    width = weight.shape[1]
    return bool(getattr(model.config, "tie_word_embeddings", True)) and width == hidden_width(model.config)


def one_line(error: Exception) -> str:
    """The message of ``error`` on one line, or the name of its class if there is no message."""
    return " ".join(str(error).split()) or type(error).__name__


def _require_known(values: dict[str, Any], default: PretrainedConfig, family: str) -> None:
    """transformers ignores unknown keys: a misspelled size would build a model of billions of parameters."""
    known = {*default.to_dict(), *default.attribute_map}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            fix = f"did you mean {close[0]}?" if close else f"see the configuration of {family} in transformers"
            raise UserError(f"base_model: {family} has no option {key!r}; {fix}")


def _require_positions(config: PretrainedConfig, max_length: int, name: str) -> None:
    positions = getattr(config, "max_position_embeddings", None) or max_length
    if (family := encoder_families().get(config.model_type)) is not None:
        positions -= family.first_position(config)
    if positions < max_length:
        raise UserError(
            f"max_length {max_length} exceeds the {positions} positions of base_model {name}; lower max_length, "
            f"or choose a base model with more positions"
        )


def _fetch(name: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        if Path(name).is_dir():
            raise UserError(
                f"base_model {name}: the folder contains no model that transformers can load: {one_line(error)}"
            ) from error
        raise UserError(
            f"base_model {name} is neither a folder nor a model that could be downloaded; connect to the network, pass "
            f"the path of a downloaded model, or an inline configuration such as "
            f"{{model_type: llama, hidden_size: 128}}"
        ) from error

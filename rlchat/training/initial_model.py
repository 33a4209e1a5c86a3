"""The initial chat model of a stage: new with a base model, or from the model file of an earlier stage."""

from __future__ import annotations

from typing import Any

from rlchat.errors import UserError
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import PolicyBundle, load_policy, new_policy
from rlchat.models.networks import value_head
from rlchat.models.vocabulary import kept_rows
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

DEFAULT_BASE_MODEL = "distilbert-base-uncased"
DEFAULT_ENCODING = "cl100k_base"
DEFAULT_MAX_LENGTH = 512


def open_policy(
    base_model: str | dict[str, Any] | None,
    tiktoken_encoding: str | None,
    max_length: int | None,
    hidden_dim: int | None,
    init_from: str | None,
) -> PolicyBundle:
    """A chat model from the model file ``init_from``, or a new one with the backbone ``base_model``.

    Raises:
        UserError: if the other options contradict the model file.
    """
    if init_from is None:
        tokenizer = ChatTokenizer(tiktoken_encoding or DEFAULT_ENCODING)
        length = max_length or DEFAULT_MAX_LENGTH
        base_model = base_model or DEFAULT_BASE_MODEL
        backbone = Backbone(base_model, tokenizer.vocab_size, length, kept_rows(base_model, tokenizer))
        return PolicyBundle(new_policy(backbone, tokenizer, hidden_dim or 0), tokenizer, length)
    if base_model is not None:
        raise UserError(
            f"base_model and init_from {init_from} cannot be combined, because the model file contains a backbone; "
            f"set --model.base_model null, or leave out --model.init_from"
        )
    bundle = load_policy(init_from)
    _check_encoding(init_from, bundle.tokenizer, tiktoken_encoding)
    if max_length is not None and max_length > bundle.max_length:
        raise UserError(
            f"invalid value {max_length} for max_length: the model file {init_from} has {bundle.max_length}; "
            f"lower it, or leave out --model.max_length"
        )
    bundle.max_length = max_length or bundle.max_length
    if hidden_dim is not None and hidden_dim != bundle.model.hidden_dim:
        bundle.model.hidden_dim = hidden_dim
        bundle.model.value_head = value_head(bundle.model.backbone.hidden_size, hidden_dim)
    return bundle


def _check_encoding(path: str, tokenizer: ChatTokenizer, requested: str | None) -> None:
    """Raises :class:`UserError` if ``requested`` differs from the encoding of the model file."""
    if requested is not None and ChatTokenizer(requested).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"init_from {path} was trained with the encoding {tokenizer.name}, not {requested}; "
            f"leave out --model.tiktoken_encoding, or use another model file"
        )

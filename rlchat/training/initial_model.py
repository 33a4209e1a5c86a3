"""The initial chat model of a stage: new with a base model, or from the model file of an earlier stage."""

from __future__ import annotations

import logging
from typing import Any

from rlchat.distributed.sharding import weights_on_first
from rlchat.errors import UserError
from rlchat.models.base.weights import BaseWeights, base_model_folder, open_base_model
from rlchat.models.base_models import configuration
from rlchat.models.file_content import holds_adapter
from rlchat.models.model_file import PolicyBundle, RewardBundle, load_policy, load_reward_model, new_policy
from rlchat.models.networks import value_head
from rlchat.models.vocabulary import no_tokenizer_files
from rlchat.tokenizer.base_files import tokenizer_files
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.tokenizer.own import own_encoding, own_format_of
from rlchat.training.options import ChatFormatName, StageOptions

log = logging.getLogger("rlchat")

DEFAULT_BASE_MODEL = "distilbert-base-uncased"
DEFAULT_ENCODING = "cl100k_base"
DEFAULT_MAX_LENGTH = 512


def open_policy(
    base_model: str | dict[str, Any] | None,
    tiktoken_encoding: str | None,
    max_length: int | None,
    hidden_dim: int | None,
    init_from: str | None,
    *,
    chat_format: ChatFormatName | None = None,
    new_embeddings: bool = False,
    attn_implementation: str | None = None,
) -> PolicyBundle:
    """A chat model from the model file ``init_from``, or a new one with the backbone ``base_model``.

    With both, ``init_from`` is an adapter, and ``base_model`` is where its base is now. In a stage that will be
    sharded, the model has weights on the first process only; see :mod:`rlchat.distributed.sharding`.

    Raises:
        UserError: if the other options contradict the model file, or the base model cannot be used.
    """
    if init_from is None:
        base_model, length = base_model or DEFAULT_BASE_MODEL, max_length or DEFAULT_MAX_LENGTH
        folder = base_model_folder(base_model) if isinstance(base_model, str) else base_model
        if isinstance(folder, str):
            # A missing model is reported before its tokenizer is looked for.
            configuration(folder, vocab_size=1, max_length=length)
        tokenizer = open_tokenizer(folder, tiktoken_encoding, chat_format, new_embeddings)
        with weights_on_first() as weights:
            backbone = open_base_model(folder, tokenizer, length, new_embeddings, attn_implementation, weights)
            model = new_policy(backbone, tokenizer, hidden_dim or 0)
        known = isinstance(base_model, str) and not (new_embeddings or backbone.new_head)  # others have random weights
        base = BaseWeights("base_model", str(base_model), backbone.fingerprint) if known else None
        return PolicyBundle(model, tokenizer, length, base=base)
    place = _base_of_file(base_model, init_from, chat_format, new_embeddings)
    with weights_on_first() as weights:
        bundle = load_policy(init_from, base_model=place, weights=weights)
    _adjust(bundle, init_from, tiktoken_encoding, max_length, attn_implementation)
    if hidden_dim is not None and hidden_dim != bundle.model.hidden_dim:
        bundle.model.hidden_dim = hidden_dim
        bundle.model.value_head = value_head(bundle.model.backbone.hidden_size, hidden_dim)
    return bundle


def open_reward_model(
    base_model: str | dict[str, Any] | None,
    tiktoken_encoding: str | None,
    max_length: int | None,
    init_from: str,
    *,
    chat_format: ChatFormatName | None = None,
    new_embeddings: bool = False,
    attn_implementation: str | None = None,
) -> RewardBundle:
    """The reward model in the model file ``init_from``; arguments and errors are those of :func:`open_policy`."""
    base = _base_of_file(base_model, init_from, chat_format, new_embeddings)
    with weights_on_first() as weights:
        bundle = load_reward_model(init_from, base_model=base, weights=weights)
    _adjust(bundle, init_from, tiktoken_encoding, max_length, attn_implementation)
    return bundle


def _base_of_file(
    base_model: str | dict[str, Any] | None, init_from: str, chat_format: ChatFormatName | None, new_embeddings: bool
) -> str | None:
    """Where the base of the adapter file ``init_from`` is, if an option says so."""
    if new_embeddings or chat_format is not None:
        option = "new_embeddings" if new_embeddings else "chat_format"
        raise UserError(f"{option} applies to a new model, and init_from {init_from} is a trained one; leave it out")
    if isinstance(base_model, dict) or (base_model is not None and not holds_adapter(init_from)):
        raise UserError(
            f"base_model and init_from {init_from} cannot be combined, because the model file contains a backbone; "
            f"set --model.base_model null, or leave out --model.init_from"
        )
    return base_model


def _adjust(
    bundle: PolicyBundle | RewardBundle,
    init_from: str,
    tiktoken_encoding: str | None,
    max_length: int | None,
    attn_implementation: str | None,
) -> None:
    """Applies the options of a stage to a loaded model."""
    if attn_implementation is not None:
        bundle.model.backbone.set_attention(attn_implementation)
    _check_encoding(init_from, bundle.tokenizer, tiktoken_encoding)
    if max_length is not None and max_length > bundle.max_length:
        raise UserError(
            f"invalid value {max_length} for max_length: the model file {init_from} has {bundle.max_length}; "
            f"lower it, or leave out --model.max_length"
        )
    bundle.max_length = max_length or bundle.max_length


def base_options(options: StageOptions) -> dict[str, Any]:
    """The options of a new base model, as keyword arguments of :func:`open_policy`."""
    return {
        "chat_format": options.chat_format,
        "new_embeddings": options.new_embeddings,
        "attn_implementation": options.attn_implementation,
    }


def open_tokenizer(
    base_model: str | dict[str, Any],
    tiktoken_encoding: str | None,
    chat_format: ChatFormatName | None = None,
    new_embeddings: bool = False,
) -> ChatTokenizer:
    """The tokenizer that the options ask for: by default the base model's own.

    The default is cl100k_base for an inline model, for ``distilbert-base-uncased`` (the default base model, whose own
    tokenizer has no exact form), and, with ``new_embeddings``, for a base model without tokenizer files.

    Raises:
        UserError: if ``chat_format`` is own and the encoding comes with none, or if the base model's own tokenizer or
            its chat template is missing or cannot be reproduced exactly.
    """
    own_format = chat_format != "rlchat"
    if tiktoken_encoding is not None:
        tokenizer = ChatTokenizer(tiktoken_encoding, own_format)
    elif isinstance(base_model, dict) or base_model == DEFAULT_BASE_MODEL:
        tokenizer = ChatTokenizer(DEFAULT_ENCODING)
    elif (files := tokenizer_files(base_model)) is not None:
        conversion = own_encoding(files)
        log.info("%s: its own tokenizer under tiktoken: %s", base_model, conversion.summary())
        encoding, form = own_format_of(files, conversion) if own_format else (conversion.encoding, None)
        tokenizer = ChatTokenizer.of(encoding, form)
    elif new_embeddings:
        tokenizer = ChatTokenizer(DEFAULT_ENCODING)
    else:
        raise no_tokenizer_files(base_model)
    if chat_format == "own" and not tokenizer.has_own_format:
        raise UserError(
            f"invalid value 'own' for chat_format: the encoding {tokenizer.name} comes with no chat template; leave it "
            f"out, or use the base model's own encoding"
        )
    return tokenizer


def _check_encoding(path: str, tokenizer: ChatTokenizer, requested: str | None) -> None:
    """Raises :class:`UserError` if ``requested`` differs from the encoding of the model file."""
    if requested is not None and ChatTokenizer(requested).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"init_from {path} was trained with the encoding {tokenizer.name}, not {requested}; "
            f"leave out --model.tiktoken_encoding, or use another model file"
        )

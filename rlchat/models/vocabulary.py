"""Checks whether the rows of a base model's embedding represent the same tokens as the ids of an encoding.

An equal number of tokens is not enough: two vocabularies of 32,000 tokens hardly agree on any id. The base model's
tokenizer files are compared with the encoding, token by token.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from rlchat.models.base_models import configuration
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.tokenizer.ranks import from_byte_letters

log = logging.getLogger("rlchat")

_FILES = ("tokenizer.json", "vocab.json")  # the format of transformers, and the older one of GPT-2
_GPT2_TOKENS = 50257
_GPT2_NAMES = ("gpt2", "r50k_base")  # two names of one encoding


def kept_rows(base_model: str | dict[str, Any], tokenizer: ChatTokenizer) -> int:
    """The number of rows of the embedding of ``base_model`` to keep with ``tokenizer``: all of them or none.

    All are kept if every id of the encoding has the same bytes in the base model's tokenizer. Without tokenizer
    files that can be compared, only GPT-2's 50,257 rows are kept, and only with the encoding gpt2. Raises
    :class:`UserError` if the base model's configuration cannot be loaded.
    """
    if isinstance(base_model, dict):
        return 0  # random weights
    count, config = tokenizer.base_size, configuration(base_model, tokenizer.vocab_size, max_length=1)
    if config.vocab_size != count:
        log.info(
            "the base model has %d tokens and the encoding %s has %d: the embeddings are initialized randomly",
            config.vocab_size,
            tokenizer.name,
            count,
        )
        return 0
    theirs = _base_vocabulary(base_model)
    if theirs is None and config.model_type == "gpt2" and count == _GPT2_TOKENS and tokenizer.name in _GPT2_NAMES:
        log.warning("%s has no tokenizer files to compare; its embeddings are kept as those of GPT-2", base_model)
        return count
    if theirs is None:
        log.warning(
            "%s has as many tokens as the encoding %s, but no byte-level tokenizer.json or vocab.json that could show "
            "whether they are the same: the embeddings are initialized randomly",
            base_model,
            tokenizer.name,
        )
        return 0
    names = {token: text.encode() for text, token in tokenizer.encoding.special_tokens.items()}
    ours = {**tokenizer.encoding.tokens, **names}
    different = [token for token, text in ours.items() if theirs.get(token) != text]
    if different:
        log.warning(
            "%s has as many tokens as the encoding %s, but %d of them differ: the embeddings are initialized randomly",
            base_model,
            tokenizer.name,
            len(different),
        )
        return 0
    return count


def _base_vocabulary(base_model: str) -> dict[int, bytes] | None:
    """The bytes of each token by id; None if there is no such file or if its vocabulary is not byte-level."""
    for name in _FILES:
        try:
            path = cached_file(
                base_model,
                name,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            if path is None:
                continue
            return _vocabulary(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def _vocabulary(content: dict[str, Any]) -> dict[int, bytes]:
    """The bytes of each token in a tokenizer file. Raises KeyError for a token that is not byte-level."""
    added = {str(token["content"]): int(token["id"]) for token in content.get("added_tokens", [])}
    if "model" in content:
        content = content["model"]["vocab"]
    plain = {number: from_byte_letters(token) for token, number in content.items() if token not in added}
    return {**plain, **{number: token.encode() for token, number in added.items()}}

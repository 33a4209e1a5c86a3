"""Which rows of a base model's embedding each id of a tokenizer starts from.

Rows are matched by the bytes of the tokens, never by their number: two vocabularies of 32,000 tokens share hardly any
id. A token that the base model has keeps its row. Another one starts from the rows of the pieces that the base
tokenizer makes of its bytes, and a control token from the base token with the same role.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from rlchat.conversation import ROLES
from rlchat.errors import UserError
from rlchat.models.base_models import configuration
from rlchat.tokenizer.base_files import TokenizerFiles, tokenizer_files
from rlchat.tokenizer.base_vocabulary import BaseVocabulary
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

log = logging.getLogger("rlchat")

AVERAGE = (-1,)  # the source of a row that starts from the average of all rows
_GPT2_TOKENS = 50257
_GPT2_NAMES = ("gpt2", "r50k_base")  # two names of one encoding


@dataclass(frozen=True)
class RowPlan:
    """``sources[i]`` are the rows of the base model that row i starts from; no source means random values."""

    sources: tuple[tuple[int, ...], ...]
    copied: int = 0  # rows of tokens with the same bytes or the same special token
    composed: int = 0  # rows from the pieces of their bytes
    by_role: int = 0  # rows of control tokens, from the base tokens with the same role
    averaged: int = 0  # rows of ids without text, and of bytes that the base model has no token for

    def summary(self) -> str:
        """One line for people."""
        return (
            f"rows of the embedding: {self.copied:,} copied by the bytes of their tokens, {self.composed:,} from "
            f"pieces, {self.by_role} control tokens by role, {self.averaged:,} from the average"
        )


def plan_rows(
    base_model: str | dict[str, Any], tokenizer: ChatTokenizer, new_embeddings: bool = False
) -> RowPlan | None:
    """The rows of the embedding of ``base_model`` for ``tokenizer``; None where all start from random values.

    They do so for an inline model and with ``new_embeddings``. Raises :class:`UserError` where the base model's
    tokenizer is not known, or its configuration cannot be loaded.
    """
    if isinstance(base_model, dict) or new_embeddings:
        return None
    config = configuration(base_model, tokenizer.vocab_size, max_length=1)
    files = tokenizer_files(base_model)
    if files is not None:
        plan = _Planner(files, config.vocab_size, tokenizer).plan()
        log.info("%s, %s", base_model, plan.summary())
        return plan
    same_size = config.model_type == "gpt2" and config.vocab_size == tokenizer.base_size == _GPT2_TOKENS
    if same_size and tokenizer.name in _GPT2_NAMES:
        log.warning("%s has no tokenizer files to compare; its embeddings are kept as those of GPT-2", base_model)
        rows = [(token,) for token in range(_GPT2_TOKENS)]
        markers = [(_GPT2_TOKENS - 1,)] * (tokenizer.vocab_size - _GPT2_TOKENS)
        return RowPlan((*rows, *markers), copied=_GPT2_TOKENS, by_role=len(markers))
    raise no_tokenizer_files(base_model)


def no_tokenizer_files(base_model: str) -> UserError:
    """The error for a base model whose tokenizer is not known."""
    return UserError(
        f"base_model {base_model} has no tokenizer files (tokenizer.json), so it is unknown which row of its embedding "
        f"stands for which token, and every embedding would start from random values: the model would lose its "
        f"vocabulary. Put tokenizer.json and tokenizer_config.json beside the weights, or set --model.new_embeddings "
        f"true"
    )


class _Planner:
    """Assigns sources to the ids of ``tokenizer``."""

    def __init__(self, files: TokenizerFiles, rows: int, tokenizer: ChatTokenizer) -> None:
        self.base, self.rows, self.tokenizer = BaseVocabulary(files), rows, tokenizer
        last = max([self.base.size - 1, *self.base.special.values()])  # tokenizers closes gaps before special tokens
        if last >= rows:
            raise UserError(
                f"base_model {files.source}: its tokenizer has ids up to {last}, but its embedding has "
                f"{rows} rows; use the tokenizer that belongs to the weights"
            )

    def plan(self) -> RowPlan:
        texts, names = self.tokenizer.encoding.tokens, self.tokenizer.special_tokens()
        unused = set(self.tokenizer.encoding.unused)
        sources: list[tuple[int, ...]] = []
        count = {"copied": 0, "composed": 0, "by_role": 0, "averaged": 0}

        def add(kind: str, source: tuple[int, ...]) -> None:
            count[kind] += 1
            sources.append(source)

        for token in range(self.tokenizer.vocab_size):
            if token in names:
                same = self.base.special.get(names[token])
                role = () if same is not None else self._role(names[token])
                add("copied" if same is not None else "by_role", (same,) if same is not None else role)
            elif token in texts and token not in unused and (same := self.base.by_bytes.get(texts[token])) is not None:
                add("copied", (same,))
            elif token in texts and (pieces := self.base.pieces(texts[token])):
                add("composed", pieces)
            else:
                add("averaged", AVERAGE)
        return RowPlan(tuple(sources), **count)

    def _role(self, name: str) -> tuple[int, ...]:
        """The base rows of the control token ``name``: its end token, or what it writes before a role."""
        form = self.tokenizer.format
        if name in (form.end, "<|endoftext|>"):
            return self.base.end() or AVERAGE
        if name == form.pad:
            return self.base.pad() or AVERAGE
        role = name.removeprefix("<|").removesuffix("|>")
        return (self.base.role(role) if role in ROLES else ()) or AVERAGE

"""A chat model as a folder that transformers loads: ``AutoModelForCausalLM`` and ``AutoTokenizer``, without rlchat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.export.output import complete
from rlchat.export.tokenizer_json import tokenizer_json
from rlchat.export.vocabulary import Vocabulary
from rlchat.export.weights import causal_lm, save_model
from rlchat.models.model_file import PolicyBundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

FILES = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""The files of an exported folder. Large models have several ``.safetensors`` files and an index."""

_TEXTS = (
    "Hello, how are you?",
    "  two spaces,\ttabs\nand lines\r\n \n",
    "1234567890 3.14 €5, it's WE'LL don't",
    "naïve Ελλάδα Привет 你好 こんにちは مرحبا e\u0301 👩\u200d👧",
    "def f(x):\n    return x  # 10_000\n\n\n   ",
    "",
)


def write_folder(bundle: PolicyBundle, folder: Path, card: str, dtype: torch.dtype = torch.float32) -> None:
    """Writes ``bundle`` to ``folder``, which appears complete or not at all. ``card`` is the text of ``README.md``.

    Raises :class:`UserError` for a model that has no class in transformers, and for a tokenizer or a chat template
    that would give other ids in transformers.
    """
    model = causal_lm(bundle)
    with complete(folder) as new:
        new.mkdir()
        write_tokenizer(bundle, new, card)
        save_model(model, new, dtype)


def write_tokenizer(bundle: PolicyBundle, folder: Path, card: str) -> None:
    """Writes the files of the tokenizer, the chat template and the model card ``card`` to the existing ``folder``.

    Raises :class:`UserError` for a tokenizer or a chat template that would give other ids in transformers.
    """
    vocabulary = Vocabulary.of(bundle.tokenizer)
    tokenizer = tokenizer_json(vocabulary)
    _check_tokenizer(bundle.tokenizer, vocabulary, tokenizer)
    texts = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": json.dumps(_options(vocabulary, bundle.max_length), indent=2, ensure_ascii=False),
        "chat_template.jinja": vocabulary.template,
        "README.md": card,
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _options(vocabulary: Vocabulary, max_length: int) -> dict[str, Any]:
    """The content of ``tokenizer_config.json``."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary.start,
        "eos_token": vocabulary.end,
        "pad_token": vocabulary.pad,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }


def _check_tokenizer(tokenizer: ChatTokenizer, vocabulary: Vocabulary, exported: str) -> None:
    """Raises :class:`UserError` for a text or a prompt that would get other ids than from ``tokenizer``."""
    theirs = Tokenizer.from_str(exported)
    for text in _TEXTS:
        if (ours := tokenizer.encode(text)) != (found := theirs.encode(text, add_special_tokens=False).ids):
            raise UserError(
                f"cannot export the tokenizer {tokenizer.name}: {text!r} would have the ids {found[:12]} in "
                f"transformers, expected {ours[:12]}"
            )
    for messages in ([Message("user", text)] for text in _TEXTS[:2]):
        written = _rendered(vocabulary, messages)
        ours = tokenizer.render_prompt(Conversation(tuple(messages))).ids
        if theirs.encode(written, add_special_tokens=False).ids != ours:
            raise UserError(
                f"cannot export the chat format of {tokenizer.name}: its template writes the prompt "
                f"{messages[0].text!r} as {written!r}, which has other ids than in rlchat"
            )


def _rendered(vocabulary: Vocabulary, messages: Sequence[Message]) -> str:
    rows = [{"role": message.role, "content": message.text} for message in messages]
    names = {"bos_token": vocabulary.start or "", "eos_token": vocabulary.end, "pad_token": vocabulary.pad}
    options: dict[str, Any] = dict(names)
    rendered = render_jinja_template([rows], chat_template=vocabulary.template, add_generation_prompt=True, **options)
    return str(rendered[0][0])  # also returns the places of the responses

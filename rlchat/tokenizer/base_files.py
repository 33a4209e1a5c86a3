"""The tokenizer files of a base model: a folder, or a name on the hub that is downloaded or cached."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlchat.errors import UserError
from rlchat.utils.hub import reachable_source

_OLDER = ("vocab.json", "vocab.txt", "tokenizer.model")  # layouts that transformers converts to tokenizer.json


@dataclass(frozen=True)
class TokenizerFiles:
    """``tokenizer`` is the content of ``tokenizer.json``, ``options`` that of ``tokenizer_config.json``."""

    source: str
    tokenizer: dict[str, Any]
    options: dict[str, Any]
    template: str | None  # the Jinja template of the chat format

    def token(self, name: str) -> str:
        """The special token that ``tokenizer_config.json`` has under ``name`` (``eos_token``); empty if it has none."""
        value = self.options.get(name)
        return str(value["content"] if isinstance(value, dict) else value or "")


def tokenizer_files(source: str) -> TokenizerFiles | None:
    """The tokenizer files of ``source``; None where it has none, or where they cannot be downloaded.

    Raises :class:`UserError` for files that are damaged.
    """
    tokenizer = _json(source, "tokenizer.json")
    if tokenizer is None and any(_file(source, name) for name in _OLDER):
        tokenizer = _converted_by_transformers(source)
    if tokenizer is None:
        return None
    options = _json(source, "tokenizer_config.json") or {}
    file = _file(source, "chat_template.jinja")
    template = options.get("chat_template") if file is None else file.read_text(encoding="utf-8")
    if isinstance(template, list):  # several, by name
        template = {one["name"]: one["template"] for one in template}.get("default")
    if "model" not in tokenizer:
        raise UserError(f"{source}: its tokenizer.json has no model; download the tokenizer again")
    return TokenizerFiles(source, tokenizer, options, template)


def no_tokenizer_json(source: str) -> UserError:
    """The error for a ``source`` without tokenizer files."""
    if Path(source, "vocab.txt").is_file():
        return UserError(
            f"{source}: found a vocab.txt but no tokenizer.json; a WordPiece vocabulary is not byte-level BPE, so it "
            f"has no exact form under tiktoken; choose a model with a byte-level BPE tokenizer, or another encoding"
        )
    return UserError(
        f"{source}: found no tokenizer.json; pass a folder that holds one, or the name of a model that was downloaded "
        f"or can be"
    )


def _file(source: str, name: str) -> Path | None:
    from transformers.utils import cached_file

    try:
        path = cached_file(
            reachable_source(source),
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # neither a folder nor a name that a hub can have
        return None
    return None if path is None else Path(path)


def _json(source: str, name: str) -> dict[str, Any] | None:
    if (path := _file(source, name)) is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {name} cannot be read ({error}); download the tokenizer again") from error
    if not isinstance(content, dict):
        raise UserError(f"{source}: {name} holds no JSON object; download the tokenizer again")
    return content


def _converted_by_transformers(source: str) -> dict[str, Any] | None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(reachable_source(source), trust_remote_code=False)
        content = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception:  # whatever a family of transformers raises for files that are not complete
        return None
    assert isinstance(content, dict)
    return content

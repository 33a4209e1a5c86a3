"""From the name of an encoding to the encoding: tiktoken's, packaged ones, rank files, tokenizers of base models."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import tiktoken

from rlchat.errors import UserError
from rlchat.tokenizer.chat_format import ChatFormat
from rlchat.tokenizer.ranks import PATTERN, format_ranks, parse_ranks
from rlchat.tokenizer.text_encoding import TextEncoding
from rlchat.utils.files import write_atomically

Loaded = tuple[TextEncoding, ChatFormat | None]


def load_encoding(name: str, own_format: bool = True) -> Loaded:
    """The encoding ``name``, and the chat format that comes with it unless ``own_format`` is False.

    Raises :class:`UserError` where there is none, where it is damaged, or where it cannot be reproduced exactly.
    """
    if name in packaged_encodings():
        text = _packaged().joinpath(f"{name}.tiktoken").read_bytes()
        return TextEncoding(name, PATTERN, parse_ranks(text, name)), None
    if name in tiktoken.list_encoding_names():
        return TextEncoding.of_tiktoken(_get_named(name)), None
    path = Path(name).expanduser()
    if path.is_file():
        return _from_file(path, own_format)
    if path.is_dir() or (name.count("/") == 1 and path.suffix != ".tiktoken" and not path.parent.exists()):
        return _from_base_model(name, own_format)
    if path.suffix == ".tiktoken" or os.sep in name:
        raise UserError(f"{name}: no such rank file; give its path, or make one with `rlchat tokenizer train`")
    known = [*packaged_encodings(), *tiktoken.list_encoding_names()]
    raise UserError(
        f"unknown encoding {name!r}; choose one of {', '.join(known)}, or give the path of a rank file or of a folder "
        f"with a tokenizer.json"
    )


def packaged_encodings() -> list[str]:
    """Names of the encodings that are installed with rlchat."""
    return sorted(p.name.removesuffix(".tiktoken") for p in _packaged().iterdir() if p.name.endswith(".tiktoken"))


def sidecar(rank_file: Path) -> Path:
    """The JSON file beside ``rank_file`` with what has no place in it: pattern, special tokens, chat format."""
    return rank_file.with_name(rank_file.name + ".json")


def write_encoding(rank_file: Path, encoding: TextEncoding, form: ChatFormat | None) -> None:
    """Writes the ranks of ``encoding`` to ``rank_file`` and the rest to its sidecar; both atomically."""
    rest = encoding.state()
    del rest["ranks"]
    if form is not None:
        rest["chat_format"] = form.state()
    text = json.dumps(rest, indent=1, ensure_ascii=False).encode() + b"\n"
    write_atomically(sidecar(rank_file), lambda file: file.write(text))
    write_atomically(rank_file, lambda file: file.write(format_ranks(encoding.ranks)))


def _from_file(path: Path, own_format: bool) -> Loaded:
    """A rank file. Without a sidecar it has the pattern of cl100k_base and no special tokens."""
    ranks, beside = path.read_bytes(), sidecar(path)
    if not beside.is_file():
        return TextEncoding(path.stem, PATTERN, parse_ranks(ranks, str(path))), None
    try:
        rest = json.loads(beside.read_text(encoding="utf-8"))
        form = ChatFormat.from_state(rest["chat_format"]) if rest.get("chat_format") else None
        encoding = TextEncoding.from_state({"name": path.stem, "special_tokens": {}, **rest, "ranks": ranks})
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{beside}: cannot be read ({type(error).__name__}: {error}); expected JSON with pattern and "
            f"special_tokens, as `rlchat tokenizer convert` writes it"
        ) from error
    return encoding, form if own_format else None


def _from_base_model(name: str, own_format: bool) -> Loaded:
    from rlchat.tokenizer.base_files import no_tokenizer_json, tokenizer_files
    from rlchat.tokenizer.own import own_encoding, own_format_of

    files = tokenizer_files(name)
    if files is None:
        raise no_tokenizer_json(name)
    conversion = own_encoding(files)
    return own_format_of(files, conversion) if own_format else (conversion.encoding, None)


def _get_named(name: str) -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # requests, urllib3, OS errors and tiktoken's own hash check, by version
        raise UserError(
            f"the encoding {name} is not on this machine and could not be fetched ({type(error).__name__}); connect "
            f"once, set TIKTOKEN_CACHE_DIR to a folder that holds it, or use the packaged {packaged_encodings()[0]}"
        ) from error


def _packaged() -> Any:
    return resources.files("rlchat.tokenizer") / "encodings"
